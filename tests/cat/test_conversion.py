"""Tests of CAT in models of transformers, and of the example that fine-tunes one.

All models are small, have random weights and are built from a configuration, so nothing is downloaded.
"""

import copy
import functools
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import cat
from cat import conversion
from cat.ops.conv.reference import naive_filter_channels, naive_filter_heads
from cat.tasks.recall import Recall
from examples import convert as example

ROOT = Path(__file__).parents[2]
VOCABULARY, LENGTH = 41, 13
SIZES = {"conv_q": 3, "conv_k": 4, "conv_v": 2}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2}),
    "mistral": (MistralForCausalLM, MistralConfig, {"num_key_value_heads": 2, "sliding_window": 6}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 1}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 6}),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, {}),
}
PADDING = torch.tensor([0, 4, 1])
"""Tokens of padding on the left of each row."""


@functools.cache
def original(family="llama"):
    model_class, config_class, options = FAMILIES[family]
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.4, pad_token_id=0, bos_token_id=1, eos_token_id=None, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return model_class(config).eval()


def converted(family="llama", *, seed=None, **options):
    """Convert a copy. With a seed, the kernels are random, as after training."""
    model = cat.convert(copy.deepcopy(original(family)), **(options or SIZES))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        for kernel in kernels(model):
            kernel.data += 0.5 * torch.randn(kernel.shape, generator=generator)
    return model


def kernels(model):
    return [weight for name, weight in model.named_parameters() if ".conv_" in name]


def batch(*, left=True):
    """Return random tokens with padding on one side, and their attention mask."""
    tokens = torch.randint(1, VOCABULARY, (len(PADDING), LENGTH), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(LENGTH) >= PADDING[:, None]).long()
    mask = mask if left else mask.flip(1)
    return tokens * mask, mask


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def generate(model, tokens, mask, **options):
    torch.manual_seed(0)
    return model.generate(tokens, attention_mask=mask, **{"max_new_tokens": 9, "do_sample": False, **options})


# Before training, nothing changes.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_before_training_all_outputs_are_unchanged_to_the_bit(family, dtype):
    before, after = copy.deepcopy(original(family)).to(dtype), copy.deepcopy(original(family)).to(dtype)
    cat.convert(after, **SIZES, dilation=2, sharing="channel")
    assert {kernel.dtype for kernel in kernels(after)} == {dtype}
    tokens, mask = batch()
    long = torch.randint(1, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(1))
    for attention in ("eager", "sdpa"):
        for model in (before, after):
            model.set_attn_implementation(attention)
        for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}, {"input_ids": long}):
            assert torch.equal(after(**inputs).logits, before(**inputs).logits)
    for options in ({}, {"do_sample": True}, {"num_beams": 3}):
        assert torch.equal(generate(after, tokens, mask, **options), generate(before, tokens, mask, **options))


@torch.no_grad()
def test_long_kernels_and_autocast_change_no_bit_either():
    tokens = torch.randint(1, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(1))
    model = converted(conv_k=40)
    assert torch.equal(model(tokens).logits, original()(tokens).logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(tokens).logits, original()(tokens).logits)


def test_float32_kernels_train_in_a_bfloat16_model():
    model = copy.deepcopy(original()).bfloat16()
    tokens, _ = batch()
    expected = model(tokens).logits
    for convolution in [
        module for module in cat.convert(model, conv_k=4).modules() if isinstance(module, conversion.CausalConvolution)
    ]:
        convolution.float()
    actual = model(tokens).logits
    assert torch.equal(actual, expected)
    actual.square().mean().backward()
    assert all(kernel.grad.dtype == torch.float32 and kernel.grad.abs().max() > 0 for kernel in kernels(model))


# After training, outputs are those of the definition, with and without a cache.


@pytest.mark.parametrize("sharing", ["head", "channel"])
@pytest.mark.parametrize("family", ["llama", "neox"])
def test_projections_are_followed_by_the_causal_convolution(family, sharing):
    model = converted(family, seed=1, **SIZES, sharing=sharing, dilation=2)
    attention = next(module for module in model.modules() if hasattr(module, "conv_q"))
    x = torch.randn(2, LENGTH, 16)
    if family == "llama":
        projections = {name: getattr(attention, f"{name}_proj") for name in "qkv"}
        before = {name: F.linear(x, p.weight, p.bias).unflatten(2, (-1, 4)) for name, p in projections.items()}
        after = {name: p(x).unflatten(2, (-1, 4)) for name, p in projections.items()}
    else:  # the layout of GPTNeoXAttention
        fused = attention.query_key_value
        before, after = (
            dict(zip("qkv", y.unflatten(2, (-1, 12)).chunk(3, dim=3), strict=True))
            for y in (F.linear(x, fused.weight, fused.bias), fused(x))
        )
    naive = naive_filter_heads if sharing == "head" else naive_filter_channels
    for name in "qkv":
        kernel = getattr(attention, f"conv_{name}").kernel
        assert kernel.shape[-1] == SIZES[f"conv_{name}"]
        close(after[name].transpose(1, 2), naive(before[name].transpose(1, 2), kernel, dilation=2))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_cache_continues_the_sequence(family):
    model = converted(family, seed=1)
    tokens, _ = batch()
    expected = model(tokens, use_cache=False).logits
    assert not torch.allclose(expected, original(family)(tokens).logits, atol=0.1)
    cache, outputs = DynamicCache(config=model.config), []
    for part in tokens.split([5, 1, 1, 4, 1, 1], dim=1):
        outputs.append(model(part, cache=cache).logits)
    close(torch.cat(outputs, dim=1), expected)


@torch.no_grad()
def test_several_caches_are_independent():
    """Also one without a configuration, which gets its layers at the first call, and one that is copied halfway."""
    model = converted(seed=1)
    rows = batch()[0].split(1)
    caches = [DynamicCache(config=model.config), DynamicCache(), None]
    for row, cache in zip(rows[:2], caches, strict=False):
        model(row[:, :6], cache=cache)
    caches[2] = copy.deepcopy(caches[1])
    for row, cache in zip((rows[0], rows[1], rows[1]), caches, strict=True):
        close(model(row[:, 6:], cache=cache).logits, model(row, use_cache=False).logits[:, 6:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_on_the_left_changes_no_output(family, attention):
    model = converted(family, seed=1)
    model.set_attn_implementation(attention)
    tokens, mask = batch()
    cache = DynamicCache(config=model.config)
    prompt, later = (
        model(tokens[:, part], attention_mask=mask[:, : part.stop], cache=cache).logits
        for part in (slice(0, 8), slice(8, LENGTH))
    )
    actual = torch.cat([prompt, later], dim=1)
    for row, padding in enumerate(PADDING):
        close(actual[row, padding:], converted(family, seed=1)(tokens[row : row + 1, padding:]).logits[0])


@torch.no_grad()
def test_padding_on_the_right_changes_no_output():
    model = converted(seed=1)
    tokens, mask = batch(left=False)
    actual = model(tokens, attention_mask=mask).logits
    for row, padding in enumerate(PADDING):
        end = LENGTH - padding
        close(actual[row, :end], model(tokens[row : row + 1, :end]).logits[0])


def test_the_masks_of_flash_and_flex_attention_give_the_padding():
    _, mask = batch()
    assert torch.equal(conversion._token_mask(mask, LENGTH), mask.bool())
    assert torch.equal(conversion._token_mask(mask, 3), mask[:, -3:].bool())

    def visible(b, h, q, k):
        return (q + LENGTH - 5 >= k) & mask.bool()[b, k]

    block_mask = create_block_mask(visible, len(mask), None, 5, LENGTH, device="cpu")
    assert torch.equal(conversion._token_mask(block_mask, 5), mask[:, -5:].bool())
    assert conversion._token_mask(None, LENGTH) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "neox"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@torch.no_grad()
def test_generation_with_a_cache_equals_that_without(family, options):
    model = converted(family, seed=1)
    tokens, mask = batch()
    actual = generate(model, tokens, mask, **options)
    assert torch.equal(actual, generate(model, tokens, mask, use_cache=False, **options))
    for row, padding in enumerate(PADDING):
        alone = generate(model, tokens[row : row + 1, padding:], mask[row : row + 1, padding:], **options)
        assert torch.equal(actual[row, padding:], alone[0])


@torch.no_grad()
def test_assisted_generation_crops_the_cache():
    model = converted(seed=1)
    tokens, mask = (x[:1] for x in batch())
    with_lookup = generate(model, tokens, mask, max_new_tokens=20, prompt_lookup_num_tokens=4)
    assert torch.equal(with_lookup, generate(model, tokens, mask, max_new_tokens=20))


@torch.no_grad()
def test_a_cache_is_cropped_as_far_as_its_inputs_reach():
    model = converted(seed=1)
    tokens = torch.randint(1, VOCABULARY, (1, 300), generator=torch.Generator().manual_seed(1))
    expected = model(tokens, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(tokens, cache=cache)
    inputs = [x for layer in cache.layers for x in layer.inputs.values()]
    assert len(inputs) == 6
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in inputs), "the inputs of the whole prompt stay in memory"
    cache.crop(-100)
    close(model(tokens[:, 200:], cache=cache).logits, expected[:, 200:])
    with pytest.raises(ValueError, match="cannot be cropped by 200 tokens, only by 128"):
        cache.crop(-200)
    short = DynamicCache(config=model.config)  # all its tokens may go
    model(tokens[:, :20], cache=short)
    short.crop(-20)
    close(model(tokens[:, :9], cache=short).logits, expected[:, :9])
    short.reset()
    close(model(tokens[:, :9], cache=short).logits, expected[:, :9])


@torch.no_grad()
def test_rows_of_a_cache_are_repeated_selected_and_reordered():
    model = converted(seed=1)
    tokens, _ = batch()
    expected = model(tokens, use_cache=False).logits[:, 7:]
    changes = {
        "reorder_cache": (torch.tensor([2, 0, 2]), [2, 0, 2]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    for method, (argument, rows) in changes.items():
        cache = DynamicCache(config=model.config)
        model(tokens[:, :7], cache=cache)
        getattr(cache, method)(argument)
        close(model(tokens[rows, 7:], cache=cache).logits, expected[rows])


@torch.no_grad()
def test_a_cache_that_lacks_the_inputs_of_the_convolutions_is_refused():
    tokens, mask = batch()
    cache = DynamicCache(config=original().config)
    original()(tokens, cache=cache)
    with pytest.raises(ValueError, match=r"^the cache has 13 tokens of another model\. Fix: compute them with"):
        converted()(tokens, cache=cache)
    with pytest.raises(ValueError, match=r"^a converted model cannot use a cache of StaticLayer\. Fix: use a DynamicCache$"):
        generate(converted(), tokens, mask, cache_implementation="static")


# Training, compiling, copying, saving.


def gradients(model, call=None):
    tokens, mask = batch()
    model.zero_grad()
    (model if call is None else call)(tokens, attention_mask=mask, use_cache=False).logits[mask.bool()].square().mean().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model = converted("neox", seed=1).train()
    expected = gradients(model)
    assert all(gradient.abs().max() > 0 for name, gradient in expected.items() if ".conv_" in name)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, expected[name]), name


def compile_to_one_graph():
    model = converted(seed=1)
    actual = gradients(model, torch.compile(model, backend="eager", fullgraph=True))
    for name, gradient in gradients(model).items():
        close(actual[name], gradient)


def test_a_converted_model_compiles_to_one_graph():
    """In another interpreter, because the type checks of the tests cannot be compiled."""
    script = "from tests.cat import test_conversion; test_conversion.compile_to_one_graph()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_copies_and_pickles_have_their_own_kernels():
    model = converted(seed=1)
    tokens, _ = batch()
    expected = model(tokens).logits
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for kernel in kernels(model):
        kernel.zero_()
    assert not torch.equal(model(tokens).logits, expected)
    assert all(torch.equal(other(tokens).logits, expected) for other in copies)


class Wrapped(nn.Module):
    """A projection with an addition, as LoRA wraps it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.added = base, nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.added(x)


@torch.no_grad()
def test_a_projection_that_is_wrapped_later_is_convolved_as_a_whole():
    """So merging the addition into the weight changes no output."""
    wrapped, merged = converted(seed=1), converted(seed=1)
    torch.manual_seed(1)
    attention = wrapped.model.layers[0].self_attn
    attention.k_proj = Wrapped(attention.k_proj)
    merged.model.layers[0].self_attn.k_proj.weight += attention.k_proj.added.weight
    tokens, _ = batch()
    close(wrapped(tokens).logits, merged(tokens).logits)
    assert not torch.allclose(merged(tokens).logits, converted(seed=1)(tokens).logits, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "neox"])
@torch.no_grad()
def test_a_saved_model_is_loaded_to_the_bit(family, dtype, tmp_path):
    model = converted(family, seed=1, conv_k=4, dilation=2, sharing="channel").to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    loaded = cat.load_converted(FAMILIES[family][0], tmp_path).eval()
    assert type(loaded) is FAMILIES[family][0]
    assert loaded.config.cat_convert == {"conv_q": None, "conv_k": 4, "conv_v": None, "sharing": "channel", "dilation": 2}
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    if dtype == torch.float32:  # `to` also rounds the frequencies of rotary positions, which are not saved
        tokens, _ = batch()
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_the_state_dict_has_only_the_kernels_in_addition():
    model = converted()
    added = model.state_dict().keys() - original().state_dict().keys()
    assert added == {f"model.layers.{layer}.self_attn.conv_{name}.kernel" for layer in (0, 1) for name in "qkv"}
    other = converted(seed=1)
    assert other.load_state_dict(model.state_dict()).missing_keys == []
    assert all(torch.equal(a, b) for a, b in zip(kernels(other), kernels(model), strict=True))


def test_a_folder_without_convolutions_is_refused(tmp_path):
    original().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config.json has no cat_convert, so the model was not converted before it was saved$"):
        cat.load_converted(LlamaForCausalLM, tmp_path)
    plain = copy.deepcopy(original())
    plain.config.cat_convert = {"conv_k": 2}
    plain.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for model.layers.0.self_attn.conv_k.kernel$"):
        cat.load_converted(LlamaForCausalLM, tmp_path)
    with pytest.raises(ValueError, match=r"^model_class = AutoModelForCausalLM is no class of a model"):
        cat.load_converted(AutoModelForCausalLM, tmp_path)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "conv_q, conv_k and conv_v are None, so nothing would change. Fix: set one of them, as conv_k=4"),
        ({"conv_k": 0}, "conv_k = 0 should be greater than or equal to 1"),
        ({"conv_q": -2, "conv_k": 4}, "conv_q = -2 should be greater than or equal to 1"),
        ({"conv_v": "full"}, "conv_v = 'full' should be a valid integer"),
        ({"conv_k": 4, "sharing": "mixing"}, "sharing = 'mixing' should be 'head' or 'channel'"),
        ({"conv_k": 4, "dilation": 0}, "dilation = 0 should be greater than or equal to 1"),
        ({"conv_k": 1, "dilation": 2}, "dilation = 2 needs a kernel size of 2 or more"),
    ],
)
def test_an_invalid_argument_is_a_one_line_error_that_names_it(options, message):
    model = copy.deepcopy(original())
    unchecked = getattr(cat.convert, "__wrapped__", cat.convert)  # without the type checks of the tests
    with pytest.raises(ValueError) as error:  # noqa: PT011
        unchecked(model, **options)
    assert str(error.value) == message
    assert model.state_dict().keys() == original().state_dict().keys()


def test_a_model_that_cannot_be_converted_is_a_one_line_error():
    size = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match=r"^model = BertModel has no attention with q_proj, k_proj, v_proj and head_dim"):
        cat.convert(BertModel(BertConfig(**size)), conv_k=4)
    with pytest.raises(ValueError, match=r"^model = ModuleList has no config, so it is no model of transformers$"):
        cat.convert(original().model.layers, conv_k=4)
    with pytest.raises(ValueError, match=r"^model is already converted: model.layers.0.self_attn has convolutions$"):
        cat.convert(converted(), conv_v=4)
    gated = copy.deepcopy(original())
    gated.model.layers[1].self_attn.q_proj = nn.Linear(16, 32)  # queries and their gate, as in Qwen3-Next
    with pytest.raises(ValueError, match=r"^model: model.layers.1.self_attn.q_proj has 32 outputs, not 16"):
        cat.convert(gated, conv_q=4)
    encoder = copy.deepcopy(original())
    encoder.model.layers[0].self_attn.is_causal = False
    with pytest.raises(ValueError, match=r"^model: model.layers.0.self_attn is no causal attention with a layer_idx$"):
        cat.convert(encoder, conv_q=4)


def test_the_repr_shows_the_convolutions():
    assert "(conv_k): CausalConvolution(kernel_size=4, dilation=1, sharing=head)" in repr(converted())


# Fine-tuning.


def test_a_converted_model_learns_recall_that_the_original_does_not(monkeypatch):
    task = Recall(
        kind="recall", ngram=1, keys=16, values=16, filler=1, pairs=4, queries="all", query_gap="uniform",
        length=20, multiples=(1,), train_examples=1, valid_examples=1, test_examples=1,
    )  # fmt: skip
    monkeypatch.setattr(example, "TASK", task)
    models = example.build(), cat.convert(example.build(), conv_k=4)
    for model in models:
        example.train(model, steps=130)
    without, with_convolution = (example.accuracy(model, count=100) for model in models)
    assert without < 0.5
    assert with_convolution > 0.95


def test_the_example_runs(capsys):
    example.main(steps=1)
    same, task, *accuracies, saved = capsys.readouterr().out.splitlines()
    assert same == "outputs before training are the same to the bit: True"
    assert saved == "outputs of the saved model are the same to the bit: True"
    assert "associative recall, 1 steps" in task
    assert [line.split(" accuracy")[0].strip() for line in accuracies] == ["Llama", "Llama with convolutions"]
