"""Canon layers in a block, against nn.Conv1d with padding that is cut off."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cat import Canon, ConvolutionAugmentedAttention
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from tests.helpers.reference import close, normal

VOCABULARY, LENGTH = 11, 9
MODELS = {
    "attention": {"mixer": "attention", "heads": 2, "kv_heads": 1, "position": "rotary", "conv_k": 2, "mlp": 2},
    "gated": {"mixer": "gla", "heads": 2, "gate_rank": 3, "mlp": 2, "activation": "swiglu", "norm": "rms"},
    "landmark": {"mixer": "landmark", "heads": 2, "block": 3, "top": 1, "qk_norm": True, "mlp": 2, "activation": "relu2"},
}
"""Grouped heads; more in the projection than q, k and v; a mixer whose cache has the projections of all tokens."""


def build(name="attention", canon="ABCD", **changes):
    settings = {"width": 8, "layers": 2, "canon": canon, **MODELS.get(name, {"mixer": name}), **changes}
    torch.manual_seed(0)
    return SequenceModel(model_config(**settings), vocabulary=VOCABULARY, length=LENGTH).double()


def tokens(batch=3, length=LENGTH):
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def naive_canon(x, kernel):
    """Reference implementation: nn.Conv1d correlates, so its weight is the kernel from the oldest value to the newest."""
    width, size = kernel.shape
    convolution = nn.Conv1d(width, width, size, groups=width, padding=size - 1, bias=False).double()
    convolution.weight.data = kernel.flip(-1)[:, None]
    return x + convolution(x.mT)[..., : x.shape[1]].mT


@pytest.mark.parametrize(("size", "length"), [(1, 5), (4, 2), (4, 9), (4, 150), (40, 60)])
def test_a_canon_layer_equals_conv1d_plus_its_input(size, length):
    layer, x = Canon(6, size).double(), normal(2, length, 6)
    close(layer(x), naive_canon(x, layer.kernel.detach()))


def test_its_kernel_starts_as_that_of_conv1d():
    torch.manual_seed(0)
    kernel, like = Canon(500).kernel, nn.Conv1d(500, 500, 4, groups=500).weight
    assert kernel.shape == (500, 4)
    assert kernel.abs().max() <= 0.5
    torch.testing.assert_close(kernel.std(), like.std(), rtol=0.05, atol=0)


@pytest.mark.parametrize("parts", [[1] * 7, [3, 1, 3], [7]])
def test_its_steps_equal_one_pass(parts):
    layer, x, inputs, outputs = Canon(6).double(), normal(2, 7, 6), None, []
    for part in x.split(parts, dim=1):
        y, inputs = layer.step(part, inputs)
        outputs.append(y)
        assert inputs.shape[1] <= 3
    close(torch.cat(outputs, dim=1), layer(x))


@pytest.mark.parametrize("name", MODELS)
def test_each_place_is_where_the_paper_has_it(name):
    block, x = build(name).blocks[1], normal(2, LENGTH, 8)
    canon = {place: functools.partial(naive_canon, kernel=layer.kernel.detach()) for place, layer in block.canon.items()}
    mixer, mlp = block.mixer, block.mlp
    projected = mixer.project(canon["A"](block.mixer_norm(x)))
    width = sum(mixer.widths.values())
    qkv = naive_canon(projected[..., :width], mixer.canon.kernel.detach())
    mixer.canon, canon_b = None, mixer.canon
    y = x + mixer.mix(torch.cat([qkv, projected[..., width:]], dim=-1))
    mixer.canon = canon_b
    inner = canon["C"](mlp[0](y))
    match MODELS[name].get("activation"):
        case "swiglu":
            gate, up = canon["D"](mlp[1].gate_and_up(inner)).chunk(2, dim=-1)
            hidden = F.silu(gate) * up
        case "relu2":
            hidden = canon["D"](mlp[1](inner)).clamp(min=0) ** 2
        case _:
            hidden = F.gelu(canon["D"](mlp[1](inner)))
    close(block(x), y + mlp[-1](hidden))


@pytest.mark.parametrize("place", "ABCD")
def test_each_letter_is_one_convolution_per_block(place):
    model, plain = build(canon=place), build(canon=None)
    names = {name for name, _ in model.named_parameters()} - {name for name, _ in plain.named_parameters()}
    kernel = "mixer.canon.kernel" if place == "B" else f"canon.{place}.kernel"
    assert names == {f"blocks.{index}.{kernel}" for index in (0, 1)}
    model.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(model(tokens()), plain(tokens()))
    for name in names:
        model.get_parameter(name).data.zero_()
    close(model(tokens()), plain(tokens()))


@pytest.mark.parametrize("canon", ["A", "C", "ABCD"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_caches_positions_and_look_up_equal_the_full_pass(name, layers, canon):
    model, given = build(name, canon, layers=layers), tokens()
    logits = model(given)  # 27 tokens, more than the vocabulary: projections are looked up unless Canon-A needs neighbours
    changed = given.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    close(model(changed)[:, :5], logits[:, :5])
    positions = torch.tensor([[1, 4], [0, 8], [6, 7]])
    close(model.logits_at(given, positions), logits[torch.arange(3)[:, None], positions])
    seen, caches = 0, []
    for part in given.split([4, 1, 1, 3], dim=1):
        seen += part.shape[1]
        step, caches = model.step(part, caches)
        close(step, logits[:, seen - 1])
    order = torch.tensor([2, 0])
    _, caches = model.step(given[:, :5])
    continued, _ = model.step(given[order, 5:], [cache.reorder(order) for cache in caches])
    close(continued, logits[order, -1])


@pytest.mark.parametrize("name", MODELS)
def test_no_convolution_crosses_documents_or_padding(name):
    model, given = build(name), tokens()
    documents = {
        "segment_ids": [(0, 0, 5), (0, 5, 9), (1, 0, 9), (2, 0, 1), (2, 1, 2), (2, 2, 9)],
        "attention_mask": [(0, 5, 9), (1, 0, 3), (2, 0, 9)],
    }
    for mask_name, parts in documents.items():
        mask = torch.zeros(3, LENGTH, dtype=torch.long)
        for index, (row, start, stop) in enumerate(parts, 1):
            mask[row, start:stop] = index if mask_name == "segment_ids" else 1
        logits = model(given, **{mask_name: mask})
        expected = torch.zeros_like(logits)
        for row, start, stop in parts:
            expected[row, start:stop] = model(given[row : row + 1, start:stop])[0]
        close(logits, expected)
        close(*(torch.autograd.grad(y.square().sum(), list(model.parameters())) for y in (logits, expected)))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9, [1] * 3 + [0] * 6])
    _, caches = model.step(given, attention_mask=mask)
    following = torch.tensor([[3, 1], [2, 0], [7, 7]])
    logits, _ = model.step(following, caches)
    for row, (start, stop) in enumerate([(4, 9), (0, 9), (0, 3)]):
        close(logits[row], model(torch.cat([given[row, start:stop], following[row]])[None])[0, -1])


def test_b_is_cat_per_channel_of_width_4_plus_the_identity():
    canon, cat = build(canon="B", conv_k=None), build(canon=None, conv_q=4, conv_k=4, conv_v=4, sharing="channel")
    cat.load_state_dict(canon.state_dict(), strict=False)
    for block, like in zip(cat.blocks, canon.blocks, strict=True):
        kernels = like.mixer.canon.kernel.split(list(like.mixer.widths.values()))
        for kernel, causal_filter in zip(kernels, block.mixer.filters.values(), strict=True):
            causal_filter.kernel.data = kernel.detach().view_as(causal_filter.kernel) + F.pad(torch.ones(1), (0, 3)).double()
    close(canon(tokens()), cat(tokens()))


def test_the_layer_with_residual_convolutions_per_channel_is_canon_b():
    torch.manual_seed(0)
    options = {"residual": True, "sharing": "channel", "filter_init": "uniform"}
    layer = ConvolutionAugmentedAttention(8, 2, conv_q=4, conv_k=4, conv_v=4, **options).double()
    plain, canon = ConvolutionAugmentedAttention(8, 2).double(), Canon(24).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    kernels = [causal_filter.kernel.detach() for causal_filter in layer.mixer.filters.values()]
    assert max(kernel.abs().max() for kernel in kernels) <= 0.5
    canon.kernel.data = torch.cat([kernel.flatten(0, 1) for kernel in kernels])
    x = normal(2, LENGTH, 8)
    close(layer(x), plain.mixer.mix(canon(plain.mixer.project(x))))


def test_it_needs_an_mlp_for_c_and_d_and_queries_for_b():
    with pytest.raises(ValueError, match=r"canon = ABC has a convolution in the MLP\. Fix: set mlp"):
        build(canon="ABC", mlp=None)
    with pytest.raises(ValueError, match="canon = AB: B needs queries, keys and values, which mamba does not have"):
        build("mamba", canon="AB")
    with pytest.raises(ValueError, match="canon_size = 3 needs canon"):
        build(canon=None, canon_size=3)
    with pytest.raises(ValueError, match="canon_size = 10 is longer than the training length of 9"):
        build(canon_size=10)
    assert build("mamba", canon="A")(tokens()).shape == (3, LENGTH, VOCABULARY)
