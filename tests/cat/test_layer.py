"""The library stands alone: a layer in three lines for somebody's own model, and an example that swaps it into a transformer."""

import re
import subprocess
import sys
import textwrap
import tomllib

import pytest
import torch
import torch.nn.functional as F

import cat
from cat import ConvolutionAugmentedAttention
from examples import transformer
from tests.helpers.reference import normal
from tests.helpers.study import ROOT
from tests.repo.test_imports import FOREIGN_TO_CAT, loaded_by

BLOCKED = FOREIGN_TO_CAT | {"yaml", "scipy", "rich", "markdown_it"}
README = (ROOT / "README.md").read_text(encoding="utf-8")
WIDTH, HEADS, LENGTH = 12, 2, 9
ATTENTIONS = {
    "torch": transformer.TorchAttention,
    "cat": lambda width, heads: ConvolutionAugmentedAttention(width, heads, conv_q=4, conv_k=4, conv_v=4),
}


def run(script):
    """What a script prints in a fresh interpreter, where no type is checked but by the code itself."""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_layer_needs_nothing_of_the_study():
    script = f"""
        import sys
        sys.modules.update(dict.fromkeys({sorted(BLOCKED)}))  # what is None there cannot be imported
        import torch
        from cat import ConvolutionAugmentedAttention
        layer = ConvolutionAugmentedAttention(width=8, heads=2, q=4, k=4, v=4)
        print(*layer(torch.randn(3, 5, 8)).shape)
    """
    assert run(textwrap.dedent(script)) == "3 5 8\n"


def test_the_three_lines_of_the_documentation_run():
    (snippet,) = re.findall(r"## The layer alone\n.*?```python\n(.*?)```", README, flags=re.DOTALL)
    documented = [line.strip() for line in cat.__doc__.splitlines() if line.startswith("    ")]
    for lines in (documented, snippet.replace("\n\n", "\n").splitlines()):
        assert len(lines) == 3
        names = {"x": torch.randn(2, 7, 256)}
        exec("\n".join(lines), names)
        assert names["y"].shape == names["x"].shape


def test_the_package_loads_what_is_asked_for():
    assert not loaded_by("import cat") & {"torch", "pydantic", "numpy"}
    assert "torch" not in loaded_by("from cat import Attention")
    assert "torch" not in loaded_by("import cat.config")
    assert "torch" in loaded_by("from cat import SequenceModel")


@pytest.mark.parametrize("name", cat.__all__)
def test_every_exported_name_is_there(name):
    assert getattr(cat, name) is not None
    assert name in dir(cat)


@pytest.mark.parametrize("name", ["Attentoin", "BaseModel"])
def test_other_names_are_not(name):
    with pytest.raises(AttributeError, match=f"module 'cat' has no attribute '{name}'"):
        getattr(cat, name)


def test_the_types_are_shipped():
    with (ROOT / "pyproject.toml").open("rb") as file:
        shipped = tomllib.load(file)["tool"]["setuptools"]["package-data"]["cat"]
    assert shipped == ["py.typed"]
    assert (ROOT / "cat" / "py.typed").is_file()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": 4},
        {"q": 4, "k": 3, "v": 2},
        {"k": "full", "length": 5},
        {"q": "state", "filter_size": 3, "length": 5},
        {"k": 4, "sharing": "mixing"},
        {"k": 4, "dilation": 2, "position": "rotary"},
        {"k": 4, "position": "alibi"},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 2, LENGTH, 40])
def test_any_length_and_nothing_of_what_comes_after(options, length):
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
        {"q": 4, "k": 3, "v": 2},
        {"k": 3, "position": "rotary"},
        {"k": 3, "position": "alibi"},
        {"k": 3, "sharing": "channel"},
        {"k": 3, "dilation": 2},
        {"k": 3, "filter_init": "random"},
        {"k": 3, "filter_bias": True},
        {"k": 3, "filter_norm": True},
        {"k": 3, "qk_norm": True},
        {"k": 3, "temperature": True},
        {"k": "full"},
        {"v": "network", "filter_size": 3},
    ],
    ids=str,
)
def test_every_argument_means_what_it_means_in_a_configuration(options):
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS, length=LENGTH, **options)
    torch.manual_seed(0)
    same = {"mixer": "attention", "layers": 1, "width": WIDTH, "heads": HEADS, "position": "none", **options}
    mixer = cat.build_mixer(cat.AttentionConfig(**same), LENGTH)
    ours, theirs = layer.mixer.state_dict(), mixer.state_dict()
    assert ours.keys() == theirs.keys()
    x = torch.randn(2, LENGTH, WIDTH)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0)
    torch.testing.assert_close(layer(x), mixer(x), rtol=0, atol=0)


def test_the_gradient_reaches_every_filter_and_the_input():
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS, conv_q=4, conv_k=3, conv_v=2)
    x = torch.randn(2, LENGTH, WIDTH, requires_grad=True)
    layer(x).square().sum().backward()
    taps = {name.split(".")[-2]: p for name, p in layer.named_parameters() if name.endswith("taps")}
    assert {stream: p.shape for stream, p in taps.items()} == {"q": (HEADS, 4), "k": (HEADS, 3), "v": (HEADS, 2)}
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().min() > 0


@pytest.mark.parametrize("parts", [[1] * 12, [7, 1, 4]])
@pytest.mark.parametrize("options", [{"q": 4, "k": 3}, {"v": "state", "filter_size": 3, "length": 9, "filter_norm": True}])
def test_what_is_read_part_by_part_is_what_is_read_at_once(options, parts):
    layer, x = ConvolutionAugmentedAttention(12, 2, position="rotary", **options).double(), normal(2, 12, 12)
    memory, outputs = None, []
    for part in x.split(parts, dim=1):
        y, memory = layer.step(part, memory)
        outputs.append(y)
    assert memory.length == 12
    torch.testing.assert_close(torch.cat(outputs, dim=1), layer(x))
    with pytest.raises(ValueError, match="x has shape"):
        layer.step(x[:, :0], memory)


def test_an_input_of_another_type_is_refused_but_where_torch_casts_it():
    layer, x = ConvolutionAugmentedAttention(12, 2, conv_k=4), torch.randn(2, 7, 12)
    with pytest.raises(ValueError, match=r"x is of torch.float64, the layer of torch.float32: x\.to\(torch.float32\)"):
        layer(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"x is of torch.float64, the layer of torch.float32"):
            layer(x.double())
        with pytest.raises(ValueError, match=r"x is of torch.float32, the layer of torch.float64"):
            ConvolutionAugmentedAttention(12, 2, conv_k=4, dtype=torch.float64)(x)


@pytest.mark.parametrize("sharing", ["head", "channel", "mixing"])
@pytest.mark.parametrize("taps", [4, 20, "full"])
def test_under_autocast_the_precision_of_what_is_kept_does_not_depend_on_the_length(taps, sharing):
    layer = ConvolutionAugmentedAttention(12, 2, conv_q=taps, conv_k=taps, conv_v=taps, sharing=sharing, length=40)
    with torch.autocast("cpu", torch.bfloat16):
        for length in (1, 8, 100, 300):
            y, memory = layer.step(torch.randn(2, length, 12))
            after, memory = layer.step(torch.randn(2, 1, 12), memory)
            assert {t.dtype for t in (y, after, *memory.state.values())} == {torch.bfloat16}, length


def test_padding_on_the_right_has_no_gradient_in_half_precision():
    layer = ConvolutionAugmentedAttention(16, 2, conv_q=2, conv_k=2, qk_norm=True, dtype=torch.float16)
    x = torch.randn(2, 7, 16).half()
    x[:, 4:] = 0
    layer(x)[:, :4].sum().backward()
    assert all(weight.grad.isfinite().all() for weight in layer.parameters())


def test_what_is_printed_of_it_tells_its_filters():
    layer = ConvolutionAugmentedAttention(12, 2, conv_q=4, conv_v="state", filter_size=3, length=9, position="rotary")
    assert "width=12, heads=2, position=rotary, q=4, v=state, filter_size=3" in repr(layer)
    assert "(q): ExplicitFilter(taps=4, sharing=head)" in repr(layer)
    assert "(v): DecayFilter(coefficients=3, sharing=head)" in repr(layer)
    spaced = ConvolutionAugmentedAttention(12, 2, conv_k=3, dilation=2, sharing="channel")
    assert "(k): ExplicitFilter(taps=3, dilation=2, sharing=channel)" in repr(spaced)


def test_it_is_made_where_and_of_what_it_is_asked_to_be():
    layer = ConvolutionAugmentedAttention(12, 2, conv_k="decay", filter_size=3, length=9, device="meta", dtype=torch.bfloat16)
    assert {(t.device.type, t.dtype) for t in layer.state_dict().values()} == {("meta", torch.bfloat16)}


def test_without_filters_it_is_the_attention_of_torch():
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS)
    x = torch.randn(2, LENGTH, WIDTH)
    q, k, v = ((x @ w.T).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in layer.mixer.projection.weight.chunk(3))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(layer(x), heads.transpose(1, 2).flatten(2) @ layer.mixer.output.weight.T)


def test_with_filters_it_is_the_attention_of_torch_to_filtered_streams():
    torch.manual_seed(0)
    layer = ConvolutionAugmentedAttention(WIDTH, HEADS, conv_q=4, conv_k=3, conv_v=2, filter_init="random")
    x = torch.randn(2, LENGTH, WIDTH)
    streams = []
    for stream, w in zip("qkv", layer.mixer.projection.weight.chunk(3), strict=True):
        taps = layer.mixer.filters[stream].taps.repeat_interleave(WIDTH // HEADS, dim=0)[:, None]
        padded = F.pad((x @ w.T).mT, (taps.shape[-1] - 1, 0))
        streams.append(F.conv1d(padded, taps.flip(-1), groups=WIDTH).mT.unflatten(-1, (HEADS, -1)).transpose(1, 2))
    heads = F.scaled_dot_product_attention(*streams, is_causal=True)
    torch.testing.assert_close(layer(x), heads.transpose(1, 2).flatten(2) @ layer.mixer.output.weight.T)


def test_mistakes_are_answered_in_one_line_that_names_the_argument():
    mistakes = {
        "heads = 3 does not divide width = 32": {"heads": 3},
        "heads = 0 should be greater than or equal to 1": {"heads": 0},
        "width = '32' should be a valid integer": {"width": "32"},
        "width = array([[1], [2]]) should be a valid integer": {"width": "numpy"},
        "k = 'ful' should be a valid integer or 'full', 'network', 'decay' or 'state'": {"k": "ful"},
        "q = 0 should be greater than or equal to 1 or 'full', 'network', 'decay' or 'state'": {"q": 0, "k": 0},
        "position = 'learned' should be 'none', 'rotary' or 'alibi'": {"position": "learned"},
        "k = full needs length, the tokens of a training sequence": {"k": "full"},
        "k = state needs filter_size, its hidden units or decays": {"k": "state", "length": 8},
        "k = 9 taps is longer than the training length of 8": {"k": 9, "length": 8},
        "length = 0 should be greater than or equal to 1": {"k": 2, "length": 0},
        "dilation = 2 without a filter on q, k or v": {"dilation": 2},
        "qk_norm = 1 should be a valid boolean": {"qk_norm": 1},
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


def test_the_attention_that_the_example_swaps_is_the_layer_without_filters():
    torch.manual_seed(0)
    layer, plain = ConvolutionAugmentedAttention(WIDTH, HEADS), transformer.TorchAttention(WIDTH, HEADS)
    plain.attention.in_proj_weight.data = layer.mixer.projection.weight.data
    plain.attention.out_proj.weight.data = layer.mixer.output.weight.data
    x = torch.randn(2, LENGTH, WIDTH)
    torch.testing.assert_close(plain(x), layer(x))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_few_steps_of_the_example_train_its_model(attention):
    before, after = (transformer.train(ATTENTIONS[attention], steps=steps, batch=4) for steps in (0, 3))
    assert 0 <= transformer.accuracy(after, count=4) <= 1
    for old, new in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert not torch.equal(old[1], new[1]), f"{old[0]} is not trained"


def test_the_example_counts_what_is_asked_and_nothing_else():
    tokens, targets = transformer.draw("test", 5, transformer.np.random.default_rng(1))
    answers = F.one_hot(targets.clamp(min=0), transformer.TASK.vocabulary).float()  # token 0 where nothing is asked
    assert transformer.accuracy(lambda _: answers, count=5) == 1
    half = answers.clone()
    rows, asked = (targets >= 0).nonzero(as_tuple=True)
    half[rows[::2], asked[::2]] = 0
    assert transformer.accuracy(lambda _: half, count=5) == 0.5
    assert tokens.shape == targets.shape == (5, transformer.TASK.length)


def test_the_example_prints_an_accuracy_a_model(capsys):
    transformer.main(steps=1)
    first, *others = capsys.readouterr().out.splitlines()
    assert "guessing one of the 8 values shown: 0.125" in first
    assert [line.split(" accuracy")[0].strip() for line in others] == [
        "torch's attention",
        "CAT, no filters",
        "CAT, q = k = v = 4 taps",
    ]
