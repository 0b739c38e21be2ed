"""The parts of a block that are no mixer, against their formulas. Models with several mixers."""

import pytest
import torch

from cat.mixers.attention.layer import CausalAttention
from cat.mixers.mamba.layer import Mamba
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.training.fit import build_model, split_by_weight_decay
from tests.helpers.reference import close

VOCABULARY, LENGTH = 11, 67  # longer than the chunks of every mixer
MAMBA = {"mixer": "mamba", "state": 3}
ATTENTION = {"mixer": "attention", "heads": 2, "position": "rotary", "qk_norm": True, "conv_k": 3}
LLAMA = {"mlp": 3, "activation": "swiglu", "norm": "rms"}


def model(**changes):
    line = {"mixer": "attention", "width": 8, "layers": 2, "heads": 2, "position": "none", "conv_k": 3, **changes}
    torch.manual_seed(0)
    built = SequenceModel(model_config(**line), vocabulary=11, length=9).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)  # scales of norms are 1 at first
    return built


def rms_norm(x, scale):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * scale


def test_a_gated_mlp_behind_an_rms_norm_is_its_formula():
    block = model(**LLAMA).blocks[1]
    norm, inner, out = block.mlp
    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mixed = x + block.mixer(rms_norm(x, block.mixer_norm.weight))
    y = rms_norm(mixed, norm.weight)
    gate, up = y @ inner.gate_and_up.weight[:24].T, y @ inner.gate_and_up.weight[24:].T
    expected = mixed + (gate * torch.sigmoid(gate) * up) @ out.weight.T + out.bias
    torch.testing.assert_close(block(x), expected)


def test_the_head_reads_what_the_chosen_norm_makes():
    built = model(**LLAMA)
    tokens = torch.tensor([[1, 5, 10, 0]])
    x = built.embedding(tokens)
    for block in built.blocks:
        x = block(x)
    torch.testing.assert_close(built(tokens), rms_norm(x, built.norm.weight) @ built.head.weight.T)


def test_weight_decay_is_on_the_maps_of_a_gated_mlp_and_on_no_norm():
    built = model(**LLAMA)
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    decayed = {names[id(p)] for p in split_by_weight_decay(built)[0]}
    assert {"blocks.0.mlp.1.gate_and_up.weight", "blocks.0.mlp.2.weight"} < decayed
    assert not any("norm" in name or name.endswith("mlp.0.weight") for name in decayed)


def test_an_activation_needs_an_mlp():
    with pytest.raises(ValueError, match="activation = swiglu needs an MLP"):
        model(activation="swiglu")


# Several mixers.


def several(mixers, **changes):
    config = model_config(**{"mixer": mixers, "width": 12, "layers": 4, "mlp": 2, **changes})
    return build_model(config, vocabulary=VOCABULARY, length=LENGTH, seed=0)


def test_each_block_has_its_mixer():
    blocks = several([MAMBA, ATTENTION]).layers()
    assert [type(block.mixer) for block in blocks] == 2 * [Mamba, CausalAttention]
    assert all(block.mlp is not None for block in blocks)


def test_equal_mixers_equal_the_model_with_that_mixer():
    model, expected = several([ATTENTION, ATTENTION], layers=2), several([ATTENTION], layers=2)
    for (name, weight), (its_name, its_weight) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == its_name
        assert torch.equal(weight, its_weight)


@pytest.mark.parametrize(
    ("mixers", "position"),
    [([MAMBA, ATTENTION], "none"), ([MAMBA, ATTENTION], "learned"), ([ATTENTION, MAMBA], "sinusoidal")],
    ids=["none", "learned", "sinusoidal"],
)
def test_a_model_with_several_mixers_is_causal_and_continues_from_its_cache(mixers, position):
    model = several(mixers, position=position).double()
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    close(model(changed)[:, :5], logits[:, :5])
    assert not torch.allclose(model(changed)[:, 5:], logits[:, 5:])
    _, caches = model.step(tokens[:, :4])
    close(model.step(tokens[:, 4:], caches)[0], logits[:, -1])
    positions = torch.tensor([[1, 4]]).expand(3, -1)
    close(model.logits_at(tokens, positions), logits[:, [1, 4]])


@pytest.mark.parametrize("position", ["none", "rotary", "learned", "sinusoidal"])
def test_documents_and_padded_sequences_equal_separate_ones(position):
    """Also the gradient of every weight; the look-up of projections, which many tokens cause, included."""
    built = model(position=position)
    tokens = torch.randint(11, (3, 9), generator=torch.Generator().manual_seed(1))
    documents = {
        "segment_ids": [(0, 0, 5), (0, 5, 9), (1, 0, 9), (2, 0, 1), (2, 1, 2), (2, 2, 9)],
        "attention_mask": [(0, 5, 9), (1, 0, 3), (2, 0, 9)],
    }
    for name, parts in documents.items():
        mask = torch.zeros(3, 9, dtype=torch.long)
        for index, (row, start, stop) in enumerate(parts, 1):
            mask[row, start:stop] = index if name == "segment_ids" else 1
        given = tokens.masked_fill(mask == 0, -100)  # no token of the vocabulary
        logits = built(given, **{name: mask})
        expected = torch.zeros_like(logits)
        for row, start, stop in parts:
            expected[row, start:stop] = built(tokens[row : row + 1, start:stop])[0]
        close(logits, expected)
        close(*(torch.autograd.grad(y.square().sum(), list(built.parameters())) for y in (logits, expected)))
        positions = torch.tensor([[2, 6, 8], [0, 1, 2], [3, 4, 5]])
        close(built.logits_at(given, positions, **{name: mask}), expected[torch.arange(3)[:, None], positions])


@pytest.mark.parametrize("layers", [1, 2])
def test_projecting_the_distinct_tokens_of_a_batch_equals_projecting_each_token(monkeypatch, layers):
    """At every position and at some, with gradients. The batch has 3 distinct tokens in 10 places, fewer than the vocabulary."""
    built = model(layers=layers)
    tokens, positions = torch.tensor([[9, 2, 2, 9, 4], [4, 4, 9, 2, 2]]), torch.tensor([[1, 4], [0, 3]])

    def outputs():
        every, some = built(tokens), built.logits_at(tokens, positions)
        return every, some, *torch.autograd.grad(every.square().sum() + some.square().sum(), list(built.parameters()))

    assert built.embedding_table(tokens)[1] is None
    expected = outputs()
    monkeypatch.setattr("cat.model.MIN_DISTINCT", 10)
    assert built.embedding_table(tokens)[1].shape == (3, 8)
    close(outputs(), expected)
    assert built.embedding_table(torch.arange(10).view(2, 5))[1] is None  # nothing to share
    mapped = torch.vmap(lambda row: built.embedding_table(row[None])[0])(tokens.repeat(1, 2)[:, :10])
    assert mapped[:, 0].tolist() == tokens.repeat(1, 2).tolist()


def test_learned_positions_restart_in_each_document():
    built, tokens = model(position="learned"), torch.zeros(1, 14, dtype=torch.long)
    ids = torch.arange(14)[None] // 7
    close(*built(tokens, segment_ids=ids).split(7, dim=1))
    with pytest.raises(ValueError, match="learned positions reach 9 tokens, not 10"):
        built(tokens, segment_ids=(torch.arange(14)[None] >= 10).long())


def test_learned_positions_belong_to_the_whole_model():
    model = several([MAMBA, ATTENTION], position="learned")
    assert model.embedding.position.shape == (LENGTH, 12)
    assert model.max_length == LENGTH
    with pytest.raises(ValueError, match=f"learned positions reach {LENGTH} tokens"):
        model(torch.zeros(1, LENGTH + 1, dtype=torch.long))
