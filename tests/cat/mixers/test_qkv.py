"""Queries, keys and values: their convolutions, scales and positions, and the rules of their configuration."""

import pytest
import torch
import torch.nn.functional as F

from cat.mixers.qkv import group_adjacent
from cat.model import SequenceModel
from cat.ops.attention import naive_attend
from cat.ops.conv.causal import HEAD_LIMITS
from cat.ops.conv.reference import naive_filter_heads
from cat.ops.position import alibi_slopes, gather_positions, rotate
from tests.helpers.mixers import BATCH, EXAMPLES, HEADS, QKV, WIDTH, build, configure, hidden
from tests.helpers.reference import close, normal

LANDMARK = {"mixer": "landmark", "heads": 3, "block": 5, "top": 2}


@pytest.mark.parametrize("projection", "qkv")
def test_a_convolution_acts_on_its_own_projection(projection):
    convolved = build({**EXAMPLES["attention"], f"conv_{projection}": 2}, 13)
    plain = build(EXAMPLES["attention"], 13)
    plain.load_state_dict(convolved.state_dict(), strict=False)
    with torch.no_grad():
        convolved.filters[projection].kernel.copy_(torch.tensor([0.0, 1.0]))
    before, after = (mixer.prepare(mixer.project(hidden(13))) for mixer in (plain, convolved))
    for name, x, y in zip("qkv", before, after, strict=True):
        close(y, F.pad(x[:, :, :-1], (0, 0, 1, 0)) if name == projection else x)


@pytest.mark.parametrize("mixer", ["attention", "linear"])
def test_identity_kernels_make_cat_the_transformer(mixer):
    cat = build({"mixer": mixer, **QKV, "position": "rotary", "conv_q": 2, "conv_k": "full", "conv_v": 3}, 13)
    transformer = build({"mixer": mixer, **QKV, "position": "rotary"}, 13)
    with torch.no_grad():
        for filter_ in cat.filters.values():
            filter_.kernel.zero_()[:, 0] = 1
    transformer.load_state_dict({name: w for name, w in cat.state_dict().items() if "filters" not in name})
    close(cat(hidden(13)), transformer(hidden(13)))


def previous(x):
    """Each token's predecessor, and zeros before the first."""
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def test_kv_shifting_is_cat_with_its_start():
    """Per head a_1 k_t + a_2 k_{t-1}, and the same with b for the values (arXiv 2411.19574)."""
    mixer = build({"mixer": "attention", **QKV, "conv_k": 2, "conv_v": 2, "filter_init": "shift"}, 13)
    q, k, v = mixer.split_heads(mixer.project(hidden(13)))
    a, b = (mixer.filters[name].kernel[:, :, None, None].unbind(1) for name in "kv")
    assert ((a[0] > 0) & (a[0] < 1)).all()
    close((a[0] + a[1], b[0] + b[1]), (torch.ones_like(a[0]), torch.ones_like(a[0])))
    expected = naive_attend(q, a[0] * k + a[1] * previous(k), b[0] * v + b[1] * previous(v), scale=mixer.scale)
    close(mixer(hidden(13)), mixer.merge_heads(expected))


def test_the_attention_of_primer_is_cat_per_channel():
    """Its pseudocode: each of q, k and v is a sum of its last three tokens, weighted per channel (arXiv 2109.08668)."""
    sizes = {"conv_q": 3, "conv_k": 3, "conv_v": 3, "sharing": "channel"}
    mixer = build({"mixer": "attention", **QKV, **sizes, "filter_init": "primer"}, 13)
    expected = []
    for name, x in zip("qkv", mixer.split_heads(mixer.project(hidden(13))), strict=True):
        filter_ = mixer.filters[name]
        filter_.kernel.data += normal(*filter_.kernel.shape)
        now, before, earlier = filter_.kernel[:, None].unbind(-1)
        expected.append(now * x + before * previous(x) + earlier * previous(previous(x)))
    close(mixer(hidden(13)), mixer.merge_heads(naive_attend(*expected, scale=mixer.scale)))


@pytest.mark.parametrize("mixer", ["attention", "delta", "gla", "landmark"])
def test_token_shift_mixes_the_input_of_each_projection_with_the_one_before(mixer):
    """Per channel m x_t + (1 - m) x_{t-1}, with its own m for q, k and v (arXiv 2305.13048)."""
    plain, shifted = build(EXAMPLES[mixer], 13), build({**EXAMPLES[mixer], "token_shift": True}, 13)
    plain.load_state_dict(shifted.state_dict(), strict=False)
    ramp = (torch.arange(WIDTH).double() + 0.5) / WIDTH
    torch.testing.assert_close(shifted.token_shift.weight, torch.stack([ramp.sqrt(), ramp, ramp]), rtol=1e-6, atol=1e-7)
    weights, x = shifted.token_shift.weight.data.copy_(normal(3, WIDTH)), hidden(13)
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    inputs = [m * x + (1 - m) * before for m in weights]
    projections = [projection(part) for projection, part in zip((plain.q_proj, plain.k_proj, plain.v_proj), inputs, strict=True)]
    others = plain.project(x)[..., sum(plain.widths.values()) :]
    close(shifted(x), plain.mix(torch.cat([*projections, others], dim=-1)))
    shifted.token_shift.weight.data.fill_(1)
    close(shifted(x), plain(x))


def test_kernels_start_near_the_identity_and_full_is_the_training_length():
    kernel = build({**EXAMPLES["attention"], "conv_q": "full"}, 13).filters["q"].kernel
    assert kernel.shape == (HEADS, 13)
    assert ((kernel - torch.eye(13)[0]).abs() < 0.2).all()


def test_a_normalized_kernel_is_divided_by_the_sum_of_its_absolute_values():
    filter_ = build({**EXAMPLES["attention"], "conv_k": 3, "filter_norm": True}, 13).filters["k"]
    x, kernel = normal(BATCH, HEADS, 13, 5), normal(HEADS, 3, seed=1)
    with torch.no_grad():
        filter_.kernel.copy_(kernel)
    close(filter_(x), naive_filter_heads(x, kernel / kernel.abs().sum(1, keepdim=True)))


def test_qk_norm_scales_after_the_convolution_and_adds_a_temperature():
    mixer = build(EXAMPLES["attention_all"], 13)
    q, k, _ = mixer.prepare(mixer.project(hidden(13)))
    close(k.norm(dim=-1), torch.ones(BATCH, HEADS, 13).double())
    torch.testing.assert_close(q.norm(dim=-1), torch.full((BATCH, HEADS, 13), 8.0).double())


@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_positions_and_the_scale_act_after_the_convolutions(position, qk_norm):
    mixer = build({**EXAMPLES["attention"], "conv_k": 3, "position": position, "qk_norm": qk_norm}, 13)
    q, k, v = mixer.prepare(mixer.project(hidden(13)))
    if position == "rotary":
        q, k = rotate(q), rotate(k)
    heads = naive_attend(
        q,
        k,
        v,
        scale=1.0 if qk_norm else (WIDTH // HEADS) ** -0.5,
        slopes=alibi_slopes(HEADS, q) if position == "alibi" else None,
    )
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.o_proj.weight.T)


@pytest.mark.parametrize(
    ("changes", "groups"),
    [
        ({}, ["q", "k", "v"]),
        ({"conv_k": 3}, ["q", "k", "v"]),
        ({"conv_q": 3, "conv_k": 3}, ["qk", "v"]),
        ({"conv_q": 3, "conv_v": 3}, ["q", "k", "v"]),
        ({"conv_q": 3, "conv_k": 3, "conv_v": 2, "filter_bias": True}, ["qk", "v"]),
        ({"conv_q": 3, "conv_k": 3, "conv_v": 3, "sharing": "channel", "filter_bias": True, "filter_norm": True}, ["qkv"]),
        ({"conv_q": "full", "conv_k": "full", "conv_v": "full", "dilation": 1}, ["q", "k", "v"]),
        ({"conv_q": 3, "conv_k": 3, "sharing": "mixing"}, ["q", "k", "v"]),
        ({"conv_q": "state", "conv_k": "state", "filter_size": 3}, ["q", "k", "v"]),
    ],
)
def test_projections_convolved_in_one_call_equal_those_convolved_separately(changes, groups, monkeypatch):
    any_work = HEAD_LIMITS.numba._replace(work=0)
    monkeypatch.setattr("cat.ops.conv.causal.HEAD_LIMITS", HEAD_LIMITS._replace(numba=any_work))
    mixer = build({"mixer": "attention", **QKV, **changes}, 97)
    with torch.no_grad():
        for weight in mixer.filters.parameters():
            weight += torch.linspace(-1, 1, weight.numel()).view_as(weight)
    projected = torch.randn(2, 97, 3 * mixer.width, generator=torch.Generator().manual_seed(0)).double()
    assert group_adjacent(mixer.filters, "qkv", projected) == groups
    separate = {
        name: mixer.filters[name](x) if name in mixer.filters else x
        for name, x in zip("qkv", mixer.split_heads(projected), strict=True)
    }
    for actual, expected in zip(mixer.convolve(projected), separate.values(), strict=True):
        torch.testing.assert_close(actual, expected)
    positions = torch.tensor([[0, 3, 96], [1, 2, 7]])
    at_positions = gather_positions(separate["q"], positions), separate["k"], separate["v"]
    for actual, expected in zip(mixer.convolve(projected, positions), at_positions, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({**EXAMPLES["linear"], "position": "alibi"}, "position = alibi needs a softmax"),
        ({**LANDMARK, "position": "alibi"}, "position = alibi would choose landmarks by distance"),
        ({"mixer": "landmark", **QKV, "block": 5}, "top"),
        ({"mixer": "landmark", **QKV, "top": 5}, "block"),
        ({**EXAMPLES["mamba"], "heads": 3}, "heads: unknown key"),
        ({**EXAMPLES["attention"], "token_shift": True, "bias": True}, "token_shift = true projects two parts"),
        ({**EXAMPLES["linear"], "residual": True}, "residual = true needs a convolution"),
        ({**EXAMPLES["linear"], "conv_k": 2, "conv_q": 3, "filter_init": "shift"}, "needs kernels of size 2, not conv_q = 3"),
        ({**EXAMPLES["attention_state"], "filter_init": "uniform"}, "needs kernels with a size, not conv_k = state"),
        ({**EXAMPLES["linear"], "conv_k": 2, "sharing": "mixing", "filter_init": "primer"}, "head or channel, not mixing"),
        ({**EXAMPLES["linear"], "heads": 4}, "heads = 4 does not divide width = 18"),
    ],
)
def test_an_invalid_configuration_is_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        configure(**parameters)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({**LANDMARK, "block": 64}, "block = 64 is longer than the training length of 32"),
        ({**LANDMARK, "conv_k": 33}, "conv_k = 33 is longer than the training length of 32"),
        ({**EXAMPLES["linear"], "conv_v": 33}, "conv_v = 33 is longer than the training length of 32"),
        ({**EXAMPLES["mamba"], "conv_size": 33}, "conv_size = 33 is longer than the training length of 32"),
    ],
)
def test_a_kernel_or_block_longer_than_its_sequences_is_refused(parameters, message):
    config = configure(**parameters)
    config.check_length(64)
    with pytest.raises(ValueError, match=message):
        SequenceModel(config, vocabulary=11, length=32)


@pytest.mark.parametrize("mixer", ["attention", "delta", "gla", "landmark"])
def test_the_activation_follows_each_convolution_and_nothing_else(mixer):
    sizes = {"conv_q": 3, "conv_k": None, "conv_v": "full"}
    plain, activated = (build({**EXAMPLES[mixer], **sizes, "conv_activation": activation}, 13) for activation in ("none", "silu"))
    projected = plain.project(hidden(13))[..., : sum(plain.widths.values())]
    q, k, v = plain.convolve(projected)
    for actual, expected in zip(activated.convolve(projected), (F.silu(q), k, F.silu(v)), strict=True):
        close(actual, expected)


def test_projections_of_unequal_width_are_convolved_one_by_one():
    mixer = build({"mixer": "gla", **QKV, "conv_q": 3, "conv_k": 3, "conv_v": 3, "sharing": "channel"}, 13)
    projected = mixer.split_projection(mixer.project(hidden(13)))[0]
    assert group_adjacent(mixer.filters, "qkv", projected) == ["qk", "v"]
