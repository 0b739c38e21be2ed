"""Tests of CAT attention as a layer for your own model, and of the example that uses it in a transformer."""

import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import cat
from cat import ConvolutionAugmentedAttention
from examples import transformer
from tests.helpers.reference import normal
from tests.repo.test_imports import FOREIGN_TO_CAT, loaded_by

ROOT = Path(__file__).parents[2]
BLOCKED = FOREIGN_TO_CAT | {"yaml", "scipy", "rich", "markdown_it"}
WIDTH, HEADS, LENGTH = 12, 2, 9
ATTENTIONS = {
    "torch": transformer.TorchAttention,
    "cat": lambda width, heads: ConvolutionAugmentedAttention(width, heads, conv_q=4, conv_k=4, conv_v=4),
}


def run(script):
    """Return what a script prints in a fresh interpreter, without the type checks of the tests."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def projections(layer):
    return [linear.weight for linear in (layer.mixer.q_proj, layer.mixer.k_proj, layer.mixer.v_proj)]


def test_the_layer_does_not_import_the_study():
    script = f"""
        import sys
        sys.modules.update(dict.fromkeys({sorted(BLOCKED)}))  # None prevents the import
        import torch
        from cat import ConvolutionAugmentedAttention
        layer = ConvolutionAugmentedAttention(width=8, heads=2, conv_q=4, conv_k=4, conv_v=4)
        print(*layer(torch.randn(3, 5, 8)).shape)
    """
    assert run(textwrap.dedent(script)) == "3 5 8\n"


def test_the_example_of_the_docstring_runs():
    lines = [line.strip() for line in cat.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 3
    names = {"x": torch.randn(2, 7, 256)}
    exec("\n".join(lines), names)
    assert names["y"].shape == names["x"].shape


def test_importing_a_configuration_does_not_import_torch():
    assert not loaded_by("import cat") & {"torch", "pydantic", "numpy"}
    assert "torch" not in loaded_by("from cat import AttentionConfig")
    assert "torch" not in loaded_by("import cat.config")
    assert "torch" in loaded_by("from cat import SequenceModel")


@pytest.mark.parametrize("name", cat.__all__)
def test_every_exported_name_exists(name):
    assert getattr(cat, name) is not None
    assert name in dir(cat)


@pytest.mark.parametrize("name", ["Attentoin", "BaseModel"])
def test_an_unknown_name_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'cat' has no attribute '{name}'"):
        getattr(cat, name)


def test_the_package_has_its_types():
    with (ROOT / "pyproject.toml").open("rb") as file:
        shipped = tomllib.load(file)["tool"]["setuptools"]["package-data"]["cat"]
    assert shipped == ["py.typed"]
    assert (ROOT / "cat" / "py.typed").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv_k": 4},
        {"conv_q": 4, "conv_k": 3, "conv_v": 2},
        {"conv_k": "full", "length": 5},
        {"conv_q": "state", "filter_size": 3, "length": 5},
        {"conv_k": 4, "sharing": "mixing"},
        {"conv_k": 4, "dilation": 2, "position": "rotary"},
        {"conv_k": 4, "position": "alibi"},
        {"conv_k": 4, "kv_heads": 1, "bias": True},
        {"conv_k": 4, "window": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, LENGTH, 40])
def test_any_length_is_causal(options, length):
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS, **options)
    x = torch.randn(2, length, WIDTH)
    y = layer(x)
    assert y.shape == x.shape
    for end in range(1, length):
        changed = x.clone()
        changed[:, end:] = torch.randn(2, length - end, WIDTH)
        torch.testing.assert_close(layer(changed)[:, :end], y[:, :end])
        assert not torch.allclose(layer(changed)[:, end], y[:, end])


@pytest.mark.parametrize(
    "options",
    [
        {"conv_q": 4, "conv_k": 3, "conv_v": 2},
        {"conv_k": 3, "position": "rotary"},
        {"conv_k": 3, "position": "alibi"},
        {"conv_k": 3, "sharing": "channel"},
        {"conv_k": 3, "dilation": 2},
        {"conv_k": 3, "filter_init": "random"},
        {"conv_k": 3, "residual": True},
        {"token_shift": True},
        {"conv_k": 3, "filter_bias": True},
        {"conv_k": 3, "filter_norm": True},
        {"conv_k": 3, "qk_norm": True},
        {"conv_k": 3, "temperature": True},
        {"conv_k": "full"},
        {"conv_v": "network", "filter_size": 3},
        {"kv_heads": 1},
        {"bias": True},
        {"position": "rotary", "rope_base": 100.0, "rope_scale": 2.0},
        {"window": 3},
    ],
    ids=str,
)
def test_every_argument_equals_its_configuration_key(options):
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS, length=LENGTH, **options)
    torch.manual_seed(0)
    mixer = cat.build_mixer(cat.AttentionConfig(heads=HEADS, **options), width=WIDTH, length=LENGTH)
    actual, expected = layer.mixer.state_dict(), mixer.state_dict()
    assert actual.keys() == expected.keys()
    x = torch.randn(2, LENGTH, WIDTH)
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    torch.testing.assert_close(layer(x), mixer(x), rtol=0, atol=0)


def test_every_kernel_and_the_input_have_a_gradient():
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS, conv_q=4, conv_k=3, conv_v=2)
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    layer(x).square().sum().backward()
    kernels = {name.split(".")[-2]: p for name, p in layer.named_parameters() if name.endswith("kernel")}
    assert {projection: kernel.shape for projection, kernel in kernels.items()} == {
        "q": (HEADS, 4),
        "k": (HEADS, 3),
        "v": (HEADS, 2),
    }
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().min() > 0


@pytest.mark.parametrize("parts", [[1] * 12, [7, 1, 4]])
@pytest.mark.parametrize(
    "options", [{"conv_q": 4, "conv_k": 3}, {"conv_v": "state", "filter_size": 3, "length": 9, "filter_norm": True}]
)
def test_steps_with_a_cache_equal_one_forward_pass(options, parts):
    layer, x = ConvolutionAugmentedAttention(12, 2, position="rotary", **options).double(), normal(2, 12, 12)
    cache, outputs = None, []
    for part in x.split(parts, dim=1):
        y, cache = layer.step(part, cache)
        outputs.append(y)
    assert cache.length == 12
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))
    with pytest.raises(ValueError, match="x has shape"):
        layer.step(x[:, :0], cache)


def test_an_input_of_another_dtype_is_refused_unless_autocast_converts_it():
    layer, x = ConvolutionAugmentedAttention(12, 2, conv_k=4), torch.randn(2, 7, 12)
    with pytest.raises(ValueError, match=r"x has dtype torch.float64, the layer torch.float32. Fix: x\.to\(torch.float32\)"):
        layer(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"x has dtype torch.float64, the layer torch.float32"):
            layer(x.double())
        with pytest.raises(ValueError, match=r"x has dtype torch.float32, the layer torch.float64"):
            ConvolutionAugmentedAttention(12, 2, conv_k=4, dtype=torch.float64)(x)


@pytest.mark.parametrize("sharing", ["head", "channel", "mixing"])
@pytest.mark.parametrize("kernel_size", [4, 20, "full"])
def test_under_autocast_the_precision_of_the_cache_does_not_depend_on_the_length(kernel_size, sharing):
    sizes = dict.fromkeys(("conv_q", "conv_k", "conv_v"), kernel_size)
    layer = ConvolutionAugmentedAttention(12, 2, **sizes, sharing=sharing, length=40)
    with torch.autocast("cpu", torch.bfloat16):
        for length in (1, 8, 100, 300):
            y, cache = layer.step(torch.randn(2, length, 12))
            after, cache = layer.step(torch.randn(2, 1, 12), cache)
            assert {t.dtype for t in (y, after, *cache.state.values())} == {torch.bfloat16}, length


def test_padding_on_the_right_has_finite_gradients_in_half_precision():
    layer = ConvolutionAugmentedAttention(16, 2, conv_q=2, conv_k=2, qk_norm=True, dtype=torch.float16)
    x = torch.randn(2, 7, 16).half()
    x[:, 4:] = 0
    layer(x)[:, :4].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())


MASKED = [
    {"conv_q": 4, "conv_k": 3, "filter_bias": True},
    {"conv_v": "state", "filter_size": 3, "length": 9, "position": "alibi"},
]


@pytest.mark.parametrize("options", MASKED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_is_not_finite_reaches_no_token_and_no_gradient(options, side):
    torch.manual_seed(0)
    layer, x = ConvolutionAugmentedAttention(12, 2, **options).double(), normal(3, 9, 12)
    lengths, column = torch.tensor([[4], [9], [1]]), torch.arange(9)
    mask = column < lengths if side == "right" else column >= 9 - lengths
    padded = x.masked_fill(~mask[..., None], float("inf")).requires_grad_()
    y = layer(padded, attention_mask=mask)
    y.sum().backward()
    gradients = {name: weight.grad for name, weight in layer.named_parameters()}
    layer.zero_grad()
    x.requires_grad_()
    for row in range(3):
        alone = layer(x[row : row + 1, mask[row]])[0]
        torch.testing.assert_close(y[row, mask[row]], alone)
        alone.sum().backward()
    assert not y[~mask].any()
    for name, weight in layer.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad)
    torch.testing.assert_close(padded.grad, x.grad)


def test_packed_documents_do_not_see_each_other():
    torch.manual_seed(0)
    layer, x = ConvolutionAugmentedAttention(12, 2, **MASKED[0]).double(), normal(1, 9, 12)
    y = layer(x, segment_ids=torch.tensor([[3, 3, 3, 3, 3, 1, 2, 2, 2]]))
    torch.testing.assert_close(y, torch.cat([layer(part) for part in x.split([5, 1, 3], dim=1)], dim=1))


@pytest.mark.parametrize("options", MASKED)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_continue_from_one_cache(options, side):
    torch.manual_seed(0)
    layer, x = ConvolutionAugmentedAttention(12, 2, **options).double(), normal(3, 15, 12)
    lengths, column = torch.tensor([[4], [9], [1]]), torch.arange(9)
    mask = column < lengths if side == "right" else column >= 9 - lengths
    y, cache = layer.step(x[:, :9].masked_fill(~mask[..., None], float("nan")), attention_mask=mask)
    assert not y[~mask].any()
    outputs = [y]
    for part in x[:, 9:].split([1, 1, 4], dim=1):
        y, cache = layer.step(part, cache)
        outputs.append(y)
    actual, is_token = torch.cat(outputs, dim=1), torch.cat([mask, torch.ones(3, 6, dtype=torch.bool)], dim=1)
    for row in range(3):
        torch.testing.assert_close(actual[row, is_token[row]], layer(x[row : row + 1, is_token[row]])[0])
    with pytest.raises(ValueError, match="attention_mask needs an empty cache, not one of 15 tokens"):
        layer.step(x[:, :1], cache, attention_mask=mask[:, :1])


def test_the_repr_shows_the_convolutions():
    layer = ConvolutionAugmentedAttention(12, 2, conv_q=4, conv_v="state", filter_size=3, length=9, position="rotary")
    assert "width=12, heads=2, conv_q=4, conv_v=state, filter_size=3, position=rotary" in repr(layer)
    assert "(q): ExplicitFilter(kernel_size=4, sharing=head)" in repr(layer)
    assert "(v): DecayFilter(coefficients=3, sharing=head)" in repr(layer)
    dilated = ConvolutionAugmentedAttention(12, 2, conv_k=3, dilation=2, sharing="channel")
    assert "(k): ExplicitFilter(kernel_size=3, dilation=2, sharing=channel)" in repr(dilated)


def test_weights_have_the_requested_device_and_dtype():
    layer = ConvolutionAugmentedAttention(12, 2, conv_k="decay", filter_size=3, length=9, device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in layer.state_dict().values()} == {("meta", torch.bfloat16)}


def test_without_convolutions_it_equals_the_attention_of_torch():
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS)
    x = torch.randn(2, LENGTH, WIDTH)
    q, k, v = ((x @ w.T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in projections(layer))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), heads.transpose(1, 2).flatten(2) @ layer.mixer.o_proj.weight.T)


def test_with_convolutions_it_equals_the_attention_of_torch_after_conv1d():
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS, conv_q=4, conv_k=3, conv_v=2, filter_init="random")
    x = torch.randn(2, LENGTH, WIDTH)
    qkv = []
    for projection, w in zip("qkv", projections(layer), strict=True):
        kernel = layer.mixer.filters[projection].kernel.repeat_interleave(WIDTH // HEADS, dim=0)[:, None]
        padded = F.pad((x @ w.T).mT, (kernel.shape[-1] - 1, 0))
        qkv.append(F.conv1d(padded, kernel.flip(-1), groups=WIDTH).mT.unflatten(-1, (HEADS, -1)).transpose(1, 2))
    heads = F.scaled_dot_product_attention(*qkv, is_causal=True)
    torch.testing.assert_close(layer(x), heads.transpose(1, 2).flatten(2) @ layer.mixer.o_proj.weight.T)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_equal_full_heads_with_repeated_weights(kv_heads):
    """Consecutive heads of queries share a head of keys and values (arXiv 2305.13245)."""
    options = {"conv_q": 3, "conv_k": 4, "conv_v": 2, "bias": True, "filter_init": "random", "dtype": torch.float64}
    layer = ConvolutionAugmentedAttention(24, 4, kv_heads=kv_heads, **options)
    full = ConvolutionAugmentedAttention(24, 4, **options)
    weights = layer.state_dict()
    for name, weight in weights.items():
        if "k_proj" in name or "v_proj" in name:
            by_head = weight.unflatten(0, (kv_heads, 6))
            weights[name] = by_head.repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
        elif "filters.k" in name or "filters.v" in name:
            weights[name] = weight.repeat_interleave(4 // kv_heads, dim=0)
    full.load_state_dict(weights)
    x = normal(2, LENGTH, 24)
    torch.testing.assert_close(layer(x), full(x))
    _, cache = layer.step(x)
    assert {name: state.shape[1] for name, state in cache.state.items()} == {
        "keys": kv_heads, "values": kv_heads, "q": 4, "k": kv_heads, "v": kv_heads,
    }  # fmt: skip


@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
def test_with_a_window_the_cache_keeps_only_the_tokens_that_the_next_one_sees(position):
    layer = ConvolutionAugmentedAttention(12, 2, window=4, conv_k=2, position=position, dtype=torch.float64)
    x, cache, outputs = normal(2, 12, 12), None, []
    for part in x.split([2, 1, 6, 1, 2], dim=1):
        y, cache = layer.step(part, cache)
        outputs.append(y)
        assert cache.state["keys"].shape[2] == min(3, cache.length)
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))


def test_an_output_depends_on_the_tokens_of_its_window():
    layer = ConvolutionAugmentedAttention(12, 2, window=3, dtype=torch.float64)
    x = normal(1, 200, 12).requires_grad_()
    for i in (0, 1, 2, 63, 64, 150, 199):
        (gradient,) = torch.autograd.grad(layer(x)[0, i].sum(), x)
        assert gradient[0].any(-1).nonzero()[:, 0].tolist() == list(range(max(0, i - 2), i + 1))


def test_dropout_acts_in_training_mode_only():
    layer = ConvolutionAugmentedAttention(12, 2, dropout=0.5, dtype=torch.float64)
    x = normal(2, LENGTH, 12)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    plain = ConvolutionAugmentedAttention(12, 2, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(layer.step(x)[0], plain(x))


def test_the_bias_is_that_of_every_projection():
    layer = ConvolutionAugmentedAttention(12, 2, bias=True)
    names = {name for name, _ in layer.mixer.named_parameters() if name.endswith("bias")}
    assert names == {f"{projection}_proj.bias" for projection in "qkvo"}


def test_an_invalid_argument_is_a_one_line_error_that_names_it():
    mistakes = {
        "heads = 3 does not divide width = 32": {"heads": 3},
        "heads = 0 should be greater than or equal to 1": {"heads": 0},
        "width = '32' should be a valid integer": {"width": "32"},
        "width = array([[1], [2]]) should be a valid integer": {"width": "numpy"},
        "conv_k = 'ful' should be a valid integer or 'full', 'network', 'decay' or 'state'": {"conv_k": "ful"},
        "conv_q = 0 should be greater than or equal to 1 or 'full', 'network', 'decay' or 'state'": {"conv_q": 0, "conv_k": 0},
        "position = 'learned' should be 'none', 'rotary' or 'alibi'": {"position": "learned"},
        "conv_k = full needs length, the training length in tokens": {"conv_k": "full"},
        "conv_k = state needs filter_size, its hidden units or decays": {"conv_k": "state", "length": 8},
        "conv_k = 9 is longer than the training length of 8": {"conv_k": 9, "length": 8},
        "length = 0 should be greater than or equal to 1": {"conv_k": 2, "length": 0},
        "dilation = 2 needs a convolution. Fix: set conv_q, conv_k or conv_v": {"dilation": 2},
        "qk_norm = 1 should be a valid boolean": {"qk_norm": 1},
        "kv_heads = 3 does not divide heads = 4": {"kv_heads": 3},
        "kv_heads = 8 does not divide heads = 4": {"kv_heads": 8},
        "kv_heads = 0 should be greater than or equal to 1": {"kv_heads": 0},
        "sharing = mixing needs more than one head of keys and values, not kv_heads = 1": {
            "kv_heads": 1,
            "conv_k": 3,
            "sharing": "mixing",
        },
        "rope_base = 100 needs position = rotary": {"rope_base": 100.0},
        "rope_scale = 2 needs position = rotary": {"rope_scale": 2, "position": "alibi"},
        "rope_scale = 0.0 should be greater than 0": {"rope_scale": 0.0, "position": "rotary"},
        "window = 0 should be greater than or equal to 1": {"window": 0},
        "dropout = 1.0 should be less than 1": {"dropout": 1.0},
        "dropout = -0.1 should be greater than or equal to 0": {"dropout": -0.1},
    }
    script = f"""
        import numpy
        from cat import ConvolutionAugmentedAttention
        for options in {list(mistakes.values())!r}:
            options = {{"width": 32, "heads": 4, **options}}
            if options["width"] == "numpy":
                options["width"] = numpy.array([[1], [2]])
            try:
                ConvolutionAugmentedAttention(**options)
            except ValueError as error:
                print(error)
            else:
                print("no error for", options)
    """
    assert run(textwrap.dedent(script)).splitlines() == list(mistakes)


@pytest.mark.parametrize("shape", [(2, 5, WIDTH + 1), (2, 0, WIDTH)])
def test_an_input_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"^x has shape \(2, \d, 1\d\), not \(batch, length, 12\) with at least one token$"):
        ConvolutionAugmentedAttention(WIDTH, HEADS, conv_k=4)(torch.zeros(shape))


def test_torch_attention_of_the_example_equals_the_layer_without_convolutions():
    torch.manual_seed(0)
    layer, plain = ConvolutionAugmentedAttention(WIDTH, HEADS), transformer.TorchAttention(WIDTH, HEADS)
    plain.attention.in_proj_weight.data = torch.cat(projections(layer)).data
    plain.attention.out_proj.weight.data = layer.mixer.o_proj.weight.data
    x = torch.randn(2, LENGTH, WIDTH)
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_few_steps_of_the_example_train_its_model(attention):
    before, after = (transformer.train(ATTENTIONS[attention], steps=steps, batch=4) for steps in (0, 3))
    assert 0 <= transformer.accuracy(after, count=4) <= 1
    for old, new in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert not torch.equal(old[1], new[1]), f"{old[0]} is not trained"


def test_the_example_scores_only_target_positions():
    tokens, targets = transformer.draw("test", 5, transformer.np.random.default_rng(1))
    answers = F.one_hot(targets.clamp(min=0), transformer.TASK.vocabulary).float()  # token 0 at other positions
    assert transformer.accuracy(lambda _: answers, count=5) == 1
    half = answers.clone()
    sequences, positions = (targets >= 0).nonzero(as_tuple=True)
    half[sequences[::2], positions[::2]] = 0
    assert transformer.accuracy(lambda _: half, count=5) == 0.5
    assert tokens.shape == targets.shape == (5, transformer.TASK.length)


def test_the_example_prints_one_accuracy_per_model(capsys):
    transformer.main(steps=1)
    first, *others = capsys.readouterr().out.splitlines()
    assert "chance (8 values in the sequence): 0.125" in first
    assert [line.split(" accuracy")[0].strip() for line in others] == [
        "torch's attention",
        "CAT, no convolutions",
        "CAT, kernel size 4",
    ]
