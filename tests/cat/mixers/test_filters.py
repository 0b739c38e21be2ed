"""Filters: where taps come from, how they begin, what they are at other lengths, who shares them."""

import math
from functools import partial

import pytest
import torch

from cat.mixers.attention.config import AttentionConfig
from cat.mixers.build import build_mixer
from cat.mixers.filters import DecayFilter, ExplicitFilter, Layout, NetworkFilter, build_filter, time_scales
from cat.ops.position import gather_positions
from tests.helpers.reference import assert_twins, close, normal

HEADS, CHANNELS, LENGTH = 3, 5, 19
KINDS = [4, "full", "network", "decay", "state"]
SHARING = {"head": (HEADS,), "channel": (HEADS, CHANNELS), "mixing": (HEADS, HEADS)}


def build(taps, *, seed=0, init="identity", dilation=1, length=LENGTH, **layout):
    """A filter in float64, its weights the same whenever it is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build_filter(
            Layout(heads=HEADS, channels=CHANNELS, **layout), taps, init=init, length=length, dilation=dilation, size=7
        )
    return made.double()


@pytest.mark.parametrize("taps", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_taps_have_a_row_for_everyone_who_has_a_filter(taps, sharing):
    width = {4: 4, "full": LENGTH}.get(taps, 2 * LENGTH)
    assert build(taps, sharing=sharing).response(2 * LENGTH).shape == (*SHARING[sharing], width)


@pytest.mark.parametrize("taps", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_a_filter_begins_near_the_identity(taps, sharing):
    x = normal(2, HEADS, LENGTH, CHANNELS)
    made = build(taps, sharing=sharing)
    assert (made(x) - x).norm() < 0.75 * x.norm()
    tap = made.response(LENGTH)[..., 0]
    identity = torch.eye(HEADS) if sharing == "mixing" else torch.ones(SHARING[sharing])
    assert (tap - identity).abs().max() < 0.5


@pytest.mark.parametrize("taps", KINDS)
def test_a_filter_that_begins_at_random_has_no_tap_that_stands_out(taps):
    made = build(taps, init="random", sharing="channel")
    response = made.response(LENGTH)
    assert response[..., 0].mean().abs() < 0.5
    assert response.std() > 0.05


@pytest.mark.parametrize("taps", ["network", "decay", "state"])
def test_generated_taps_go_on_at_longer_lengths_and_fade(taps):
    made = build(taps, init="random")
    short, long = made.response(LENGTH), made.response(40 * LENGTH)
    close(long[:, :LENGTH], short)
    assert long[:, -LENGTH:].abs().max() < 1e-3 * short.abs().max()
    assert long[:, LENGTH : 2 * LENGTH].abs().max() > 1e-3 * short.abs().max()


@pytest.mark.parametrize("longest", [0, LENGTH])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("sharing", SHARING)
def test_the_outputs_at_some_positions_are_those_among_all(sharing, dilation, longest, monkeypatch):
    monkeypatch.setattr("cat.ops.conv.causal.MATRIX", longest)
    made, x = build(4, sharing=sharing, dilation=dilation, bias=True), normal(2, HEADS, LENGTH, CHANNELS)
    with torch.no_grad():
        made.bias.copy_(normal(HEADS, 1, CHANNELS, seed=1))
    for at in (torch.tensor([[0, 3, 18], [2, 2, 5]]), torch.arange(LENGTH - 2).expand(2, -1)):
        assert_twins(lambda x, at=at: made(x, at), lambda x, at=at: gather_positions(made(x), at), x)


def test_decays_add_up_as_written():
    made = build("state")
    with torch.no_grad():
        made.log_rate.copy_(normal(HEADS, 7, seed=1))
    decays = torch.exp(-made.log_rate.exp())
    taps = made.response(LENGTH)
    for j in range(LENGTH):
        expected = (made.coefficients * decays**j).sum(-1) + (made.direct if j == 0 else 0)
        close(taps[:, j], expected)


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


def test_time_scales_go_from_a_token_to_the_training_length():
    scales = time_scales(4, 27)
    torch.testing.assert_close(scales, torch.tensor([1.0, 3.0, 9.0, 27.0]))
    assert time_scales(3, 1).tolist() == [1, 1, 1]


def test_a_network_s_taps_fade_at_the_rate_that_it_has_learned():
    made = build("network", init="random")
    with torch.no_grad():
        made.log_fading.fill_(math.log(3.0))
        made.direct.zero_()
    taps = made.response(LENGTH)
    with torch.no_grad():
        made.log_fading.fill_(-torch.inf)
    close(taps, made.response(LENGTH) * torch.exp(-3.0 * torch.arange(LENGTH).double()))


@pytest.mark.parametrize("taps", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_normalised_taps_sum_to_one_for_everyone_who_reads_them(taps, sharing):
    response = build(taps, sharing=sharing, norm=True).response(LENGTH).abs()
    total = response.sum((-2, -1) if sharing == "mixing" else -1)
    close(total, torch.ones_like(total))


@pytest.mark.parametrize("taps", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
def test_normalised_taps_do_not_change_with_the_length(taps, sharing):
    made = build(taps, sharing=sharing, norm=True)
    expected = made.response(LENGTH)
    for length in (LENGTH // 2, 3 * LENGTH):
        common = min(length, expected.shape[-1])
        close(made.response(length)[..., :common], expected[..., :common])


def test_taps_that_are_all_zero_stay_zero_when_normalised():
    made = build(3, norm=True)
    with torch.no_grad():
        made.taps.zero_()
    assert not made(normal(2, HEADS, LENGTH, CHANNELS)).any()


def test_a_bias_is_added_to_every_token():
    made, plain, x = build(3, bias=True), build(3), normal(2, HEADS, LENGTH, CHANNELS)
    with torch.no_grad():
        made.bias.copy_(normal(HEADS, 1, CHANNELS, seed=1))
    close(made(x), plain(x) + made.bias)


def test_dilation_is_for_taps_that_are_counted():
    assert build(3, dilation=2).dilation == 2
    assert {build(kind, dilation=2).dilation for kind in KINDS[1:]} == {1}


def test_what_a_configuration_names_is_what_is_built():
    def filters(**keys):
        config = AttentionConfig(mixer="attention", width=12, layers=1, heads=2, position="none", **keys)
        return build_mixer(config, LENGTH).filters

    assert filters().keys() == set()
    made = filters(q=3, k="full", dilation=2, sharing="channel", filter_norm=True, filter_bias=True)
    assert {name: (type(f), f.taps.shape, f.dilation) for name, f in made.items()} == {
        "q": (ExplicitFilter, (2, 6, 3), 2),
        "k": (ExplicitFilter, (2, 6, LENGTH), 1),
    }
    assert made["q"].layout == Layout(heads=2, channels=6, sharing="channel", norm=True, bias=True)
    made = filters(q="network", k="decay", v="state", filter_size=5, filter_init="random")
    assert [(type(f), f.coefficients.shape) for f in made.values()] == [
        (NetworkFilter, (2, 5)),
        (DecayFilter, (2, 5)),
        (DecayFilter, (2, 5)),
    ]
    assert not any(f.direct.any() for f in made.values())


@pytest.mark.parametrize("taps", KINDS)
@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(("length", "block"), [(3, 5), (5, 5), (23, 5), (23, 1)])
def test_at_the_ends_of_blocks_a_filter_is_what_it_is_there(taps, sharing, length, block, monkeypatch):
    made = build(taps, sharing=sharing, init="random", norm=True, bias=True, dilation=2)
    names = [name for name, _ in made.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(made, dict(zip(names, weights, strict=True)), x)

    def run_at_ends(x, *weights):
        with monkeypatch.context() as patch:
            patch.setattr(made, "forward", partial(made.at_block_ends, block=block))
            return run(x, *weights)

    x = normal(2, HEADS, length, CHANNELS)
    assert_twins(run_at_ends, lambda *inputs: run(*inputs)[:, :, block - 1 :: block], x, *made.parameters())
