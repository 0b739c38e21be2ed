"""Tests of filters: kernels and their generators, initialization, other lengths, sharing."""

import math
from functools import partial

import pytest
import torch

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.build import build_mixer
from cat.mixers.filters import DecayFilter, ExplicitFilter, Layout, NetworkFilter, build_filter, time_scales
from cat.ops.position import gather_positions
from tests.helpers.reference import assert_matches_reference, close, normal

HEADS, CHANNELS, LENGTH = 3, 5, 19
KINDS = [4, "full", "network", "decay", "state"]
SHARING = {"head": (HEADS,), "channel": (HEADS, CHANNELS), "mixing": (HEADS, HEADS)}


def build(kernel, *, seed=0, init="identity", dilation=1, length=LENGTH, **layout):
    """Build a filter in float64 with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build_filter(
            Layout(heads=HEADS, channels=CHANNELS, **layout), kernel, init=init, length=length, dilation=dilation, size=7
        )
    return made.double()


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_kernel_has_the_shape_of_its_sharing(kernel, sharing):
    width = {4: 4, "full": LENGTH}.get(kernel, 2 * LENGTH)
    assert build(kernel, sharing=sharing).response(2 * LENGTH).shape == (*SHARING[sharing], width)


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("residual", [False, True])
def test_a_filter_starts_near_the_identity(kernel, sharing, residual):
    x = normal(2, HEADS, LENGTH, CHANNELS)
    made = build(kernel, sharing=sharing, residual=residual)
    assert (made(x) - x).norm() < 0.75 * x.norm()
    present = made.response(LENGTH)[..., 0]
    identity = torch.eye(HEADS) if sharing == "mixing" else torch.ones(SHARING[sharing])
    assert (present - identity).abs().max() < 0.5


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_residual_filter_adds_its_input(kernel, sharing):
    options = {"sharing": sharing, "norm": True, "bias": True, "init": "random"}
    plain, made, x = build(kernel, **options), build(kernel, residual=True, **options), normal(2, HEADS, LENGTH, CHANNELS)
    made.bias.data.normal_()
    plain.load_state_dict(made.state_dict())
    close(made(x), x + plain(x))
    steps, last = made.step(x[:, :, :-1], x[:, :, :0]), x[:, :, -1:]
    close(made.step(last, steps[1])[0], last + plain(x)[:, :, -1:])


@pytest.mark.parametrize(("sharing", "bound"), [("head", 0.5), ("channel", 0.5), ("mixing", 12**-0.5)])
def test_a_uniform_kernel_starts_as_that_of_conv1d(sharing, bound):
    """With mixing, every output has the kernels of all three heads as inputs."""
    kernels = torch.stack([build(4, seed=seed, init="uniform", sharing=sharing).kernel for seed in range(100)])
    assert kernels.abs().max() <= bound
    torch.testing.assert_close(kernels.std().item(), bound / 3**0.5, rtol=0.1, atol=0)


def test_a_shift_kernel_starts_as_in_kv_shifting():
    kernels = torch.stack([build(2, seed=seed, init="shift").kernel for seed in range(200)])
    close(kernels.sum(-1), torch.ones(200, HEADS).double())
    assert kernels.min() > 0
    torch.testing.assert_close(
        kernels[..., 0].quantile(torch.tensor([0.25, 0.75]).double()), torch.tensor([0.25, 0.75]).double(), rtol=0, atol=0.05
    )


def test_a_primer_kernel_starts_as_in_the_authors_code():
    kernel = build(3, init="primer", sharing="channel").kernel
    torch.testing.assert_close(kernel.float(), torch.tensor([1 / 2, 1 / 6, 1 / 6]).expand(HEADS, CHANNELS, 3))


@pytest.mark.parametrize("kernel", KINDS)
def test_a_random_filter_has_no_dominant_value(kernel):
    made = build(kernel, init="random", sharing="channel")
    response = made.response(LENGTH)
    assert response[..., 0].mean().abs() < 0.5
    assert response.std() > 0.05


@pytest.mark.parametrize("kernel", ["network", "decay", "state"])
def test_a_generated_kernel_continues_at_longer_lengths_and_decays(kernel):
    made = build(kernel, init="random")
    short, long = made.response(LENGTH), made.response(40 * LENGTH)
    close(long[:, :LENGTH], short)
    assert long[:, -LENGTH:].abs().max() < 1e-3 * short.abs().max()
    assert long[:, LENGTH : 2 * LENGTH].abs().max() > 1e-3 * short.abs().max()


@pytest.mark.parametrize("max_matrix", [0, LENGTH])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("sharing", SHARING)
def test_outputs_at_positions_are_a_subset_of_all_outputs(sharing, dilation, max_matrix, monkeypatch):
    monkeypatch.setattr("cat.ops.conv.causal.MAX_MATRIX", max_matrix)
    made, x = build(4, sharing=sharing, dilation=dilation, bias=True), normal(2, HEADS, LENGTH, CHANNELS)
    with torch.no_grad():
        made.bias.copy_(normal(HEADS, 1, CHANNELS, seed=1))
    for positions in (torch.tensor([[0, 3, 18], [2, 2, 5]]), torch.arange(LENGTH - 2).expand(2, -1)):
        assert_matches_reference(lambda x, at=positions: made(x, at), lambda x, at=positions: gather_positions(made(x), at), x)


def test_a_state_kernel_is_its_sum_of_decays():
    made = build("state")
    with torch.no_grad():
        made.log_rate.copy_(normal(HEADS, 7, seed=1))
    decays = torch.exp(-made.log_rate.exp())
    kernel = made.response(LENGTH)
    for j in range(LENGTH):
        expected = (made.coefficients * decays**j).sum(-1) + (made.direct if j == 0 else 0)
        close(kernel[:, j], expected)


def test_a_state_space_filter_is_its_recurrence():
    made, x = build("state", sharing="channel"), normal(2, HEADS, LENGTH, CHANNELS)
    decays, state, outputs = torch.exp(-made.log_rate.exp()), torch.zeros(2, HEADS, CHANNELS, 7).double(), []
    for t in range(LENGTH):
        state = decays * state + x[:, :, t, :, None]
        outputs.append((made.coefficients * state).sum(-1) + made.direct * x[:, :, t])
    close(made(x), torch.stack(outputs, dim=2))


def test_only_the_decays_of_a_state_space_are_learned():
    assert "log_rate" in dict(build("state").named_parameters())
    assert "log_rate" not in dict(build("decay").named_parameters())
    torch.testing.assert_close(torch.exp(build("decay").log_rate).float(), 1 / time_scales(7, LENGTH))


def test_time_scales_range_from_one_token_to_the_training_length():
    scales = time_scales(4, 27)
    torch.testing.assert_close(scales, torch.tensor([1.0, 3.0, 9.0, 27.0]))
    assert time_scales(3, 1).tolist() == [1, 1, 1]


def test_a_network_kernel_decays_at_its_learned_rate():
    made = build("network", init="random")
    with torch.no_grad():
        made.log_fading.fill_(math.log(3.0))
        made.direct.zero_()
    kernel = made.response(LENGTH)
    with torch.no_grad():
        made.log_fading.fill_(-torch.inf)
    close(kernel, made.response(LENGTH) * torch.exp(-3.0 * torch.arange(LENGTH).double()))


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_normalized_kernel_has_an_absolute_sum_of_one(kernel, sharing):
    response = build(kernel, sharing=sharing, norm=True).response(LENGTH).abs()
    total = response.sum((-2, -1) if sharing == "mixing" else -1)
    close(total, torch.ones_like(total))


@pytest.mark.parametrize("kernel", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_normalized_kernel_does_not_depend_on_the_length(kernel, sharing):
    made = build(kernel, sharing=sharing, norm=True)
    expected = made.response(LENGTH)
    for length in (LENGTH // 2, 3 * LENGTH):
        common = min(length, expected.shape[-1])
        close(made.response(length)[..., :common], expected[..., :common])


def test_a_zero_kernel_stays_zero_if_normalized():
    made = build(3, norm=True)
    with torch.no_grad():
        made.kernel.zero_()
    assert not made(normal(2, HEADS, LENGTH, CHANNELS)).any()


def test_a_bias_is_added_to_every_token():
    made, plain, x = build(3, bias=True), build(3), normal(2, HEADS, LENGTH, CHANNELS)
    with torch.no_grad():
        made.bias.copy_(normal(HEADS, 1, CHANNELS, seed=1))
    close(made(x), plain(x) + made.bias)


def test_only_explicit_kernels_have_a_dilation():
    assert build(3, dilation=2).dilation == 2
    assert {build(kind, dilation=2).dilation for kind in KINDS[1:]} == {1}


def test_a_configuration_builds_its_filters():
    def filters(**keys):
        return build_mixer(AttentionConfig(heads=2, **keys), width=12, length=LENGTH).filters

    assert filters().keys() == set()
    made = filters(conv_q=3, conv_k="full", dilation=2, sharing="channel", filter_norm=True, filter_bias=True)
    assert {name: (type(f), f.kernel.shape, f.dilation) for name, f in made.items()} == {
        "q": (ExplicitFilter, (2, 6, 3), 2),
        "k": (ExplicitFilter, (2, 6, LENGTH), 1),
    }
    assert made["q"].layout == Layout(heads=2, channels=6, sharing="channel", norm=True, bias=True)
    made = filters(conv_q="network", conv_k="decay", conv_v="state", filter_size=5, filter_init="random")
    assert [(type(f), f.coefficients.shape) for f in made.values()] == [
        (NetworkFilter, (2, 5)),
        (DecayFilter, (2, 5)),
        (DecayFilter, (2, 5)),
    ]
    assert not any(f.direct.any() for f in made.values())


@pytest.mark.parametrize(("length", "block", "kernel"), [(3, 5, 4), (5, 5, 4), (23, 1, 4), *((23, 5, kind) for kind in KINDS)])
@pytest.mark.parametrize("sharing", SHARING)
def test_outputs_at_block_ends_are_a_subset_of_all_outputs(kernel, sharing, length, block, monkeypatch):
    made = build(kernel, sharing=sharing, init="random", norm=True, bias=True, dilation=2)
    names = [name for name, _ in made.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(made, dict(zip(names, weights, strict=True)), x)

    def run_at_ends(x, *weights):
        with monkeypatch.context() as patch:
            patch.setattr(made, "forward", partial(made.at_block_ends, block=block))
            return run(x, *weights)

    x = normal(2, HEADS, length, CHANNELS)
    assert_matches_reference(run_at_ends, lambda *inputs: run(*inputs)[:, :, block - 1 :: block], x, *made.parameters())
