"""Every mixer: one battery for all of them, and for each what makes it that mixer."""

import math
import sys
from functools import partial
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from cat.config import ModelConfig, QKVConfig
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.based.op import naive_taylor_attend
from cat.mixers.build import build_mixer
from cat.mixers.delta.config import DeltaConfig
from cat.mixers.delta.op import naive_delta_rule
from cat.mixers.gla.config import GLAConfig
from cat.mixers.gla.op import naive_gated_linear_attend
from cat.mixers.landmark.op import block_ends, in_tiles, landmark_attend, naive_landmark_attend
from cat.mixers.linear.op import features, linear_attend, naive_linear_attend
from cat.mixers.mamba.op import NUMBERS_AT_ONCE, fused_scan, naive_selective_scan, selective_scan, selective_scan_next
from cat.mixers.performer.op import naive_performer_attend
from cat.mixers.qkv import group_adjacent
from cat.mixers.registry import AnyModel, SingleMixer
from cat.model import SequenceModel
from cat.ops.attention import naive_attend
from cat.ops.conv.causal import HEAD_LIMITS
from cat.ops.conv.reference import naive_filter_channels, naive_filter_heads, naive_mix_heads
from cat.ops.position import gather_positions, rotate
from cat.training.fit import build_model
from tests.helpers.reference import assert_twins, close, in_parts, normal

BATCH, WIDTH, HEADS = 2, 18, 3

STREAMS = {"heads": HEADS, "position": "none"}
UNSCALED = {"q": 2, "k": 4, "v": 3, "filter_norm": True, "sharing": "channel", "dilation": 2, "filter_bias": True}
FILTERED = {**UNSCALED, "qk_norm": True}
GENERATED = {"q": "network", "k": "state", "v": "decay", "filter_size": 3, "filter_init": "random"}
LANDMARK = {"mixer": "landmark", **STREAMS, "block": 5, "top": 2}
BATTERY = {
    "attention": {"mixer": "attention", **STREAMS},
    "attention_q": {"mixer": "attention", **STREAMS, "q": 3, "position": "rotary"},
    "attention_k": {"mixer": "attention", **STREAMS, "k": "full", "position": "alibi"},
    "attention_v": {"mixer": "attention", **STREAMS, "v": 1, "position": "learned"},
    "attention_all": {"mixer": "attention", **STREAMS, "q": 2, "k": 4, "v": "full", "filter_norm": True, "qk_norm": True},
    "attention_sinusoidal": {"mixer": "attention", **STREAMS, "position": "sinusoidal", "qk_norm": True},
    "attention_channel": {
        "mixer": "attention",
        **STREAMS,
        "q": 3,
        "k": "full",
        "sharing": "channel",
        "filter_bias": True,
        "qk_norm": True,
    },
    "attention_mixing": {
        "mixer": "attention",
        **STREAMS,
        "k": 3,
        "v": "full",
        "sharing": "mixing",
        "filter_norm": True,
        "dilation": 2,
    },
    "attention_network": {"mixer": "attention", **STREAMS, "q": "network", "v": "network", "filter_size": 5, "temperature": True},
    "attention_decay": {
        "mixer": "attention",
        **STREAMS,
        "q": "decay",
        "k": "decay",
        "v": 2,
        "filter_size": 3,
        "filter_init": "random",
    },
    "attention_state": {"mixer": "attention", **STREAMS, "k": "state", "v": "state", "filter_size": 3, "sharing": "channel"},
    "linear": {"mixer": "linear", **STREAMS},
    "linear_q": {"mixer": "linear", **STREAMS, "q": 3, "position": "rotary"},
    "linear_k": {"mixer": "linear", **STREAMS, "k": "full", "position": "learned"},
    "linear_all": {"mixer": "linear", **STREAMS, **FILTERED},
    "linear_state": {"mixer": "linear", **STREAMS, **GENERATED, "temperature": True},
    "linear_sinusoidal": {"mixer": "linear", **STREAMS, "position": "sinusoidal"},
    "landmark": LANDMARK,
    "landmark_q": {**LANDMARK, "q": 3, "position": "rotary", "top": 1},
    "landmark_k": {**LANDMARK, "k": "full", "position": "learned", "block": 3},
    "landmark_all": {**LANDMARK, **FILTERED, "block": 7},
    "landmark_state": {**LANDMARK, **GENERATED, "temperature": True},
    "landmark_summary": {**LANDMARK, "k": 2, "summary": 7, "qk_norm": True, "sharing": "mixing", "top": 1},
    "landmark_summary_state": {**LANDMARK, "summary": "state", "filter_size": 2, "top": 1},
    "landmark_sinusoidal": {**LANDMARK, "position": "sinusoidal", "top": 100},
    "based": {"mixer": "based", **STREAMS, "window": 4},
    "based_q": {"mixer": "based", **STREAMS, "q": 3, "position": "rotary", "window": 1},
    "based_k": {"mixer": "based", **STREAMS, "k": "full", "position": "learned", "window": 12},
    "based_all": {"mixer": "based", **STREAMS, **FILTERED, "position": "sinusoidal", "window": 7},
    "based_state": {"mixer": "based", **STREAMS, **GENERATED, "window": 2, "temperature": True},
    "performer": {"mixer": "performer", **STREAMS, "features": 5},
    "performer_q": {"mixer": "performer", **STREAMS, "q": 3, "position": "rotary", "features": 16},
    "performer_k": {"mixer": "performer", **STREAMS, "k": "full", "position": "learned", "features": 7},
    "performer_all": {"mixer": "performer", **STREAMS, **FILTERED, "position": "sinusoidal", "features": 6},
    "performer_state": {"mixer": "performer", **STREAMS, **GENERATED, "features": 6, "temperature": True},
    "delta": {"mixer": "delta", **STREAMS},
    "delta_q": {"mixer": "delta", **STREAMS, "q": 3, "gate": True},
    "delta_k": {"mixer": "delta", **STREAMS, "k": "full", "position": "learned"},
    "delta_all": {"mixer": "delta", **STREAMS, **UNSCALED, "position": "sinusoidal", "gate": True},
    "delta_state": {"mixer": "delta", **STREAMS, **GENERATED},
    "gla": {"mixer": "gla", **STREAMS, "gate_rank": 5},
    "gla_q": {"mixer": "gla", **STREAMS, "q": 3, "gate_rank": 1, "output_gate": True},
    "gla_k": {"mixer": "gla", **STREAMS, "k": "full", "position": "learned", "gate_rank": 7},
    "gla_all": {"mixer": "gla", **STREAMS, **UNSCALED, "position": "sinusoidal", "gate_rank": WIDTH, "output_gate": True},
    "gla_state": {"mixer": "gla", **STREAMS, **GENERATED, "gate_rank": 3},
    "hyena": {"mixer": "hyena", "conv": 3, "filter_size": 5},
    "hyena_small": {"mixer": "hyena", "conv": 1, "filter_size": 2},
    "mamba": {"mixer": "mamba"},
    "mamba_small": {"mixer": "mamba", "expand": 1, "state": 3, "conv": 2},
    "mamba_single": {"mixer": "mamba", "state": 1, "conv": 1},
}
every_mixer = pytest.mark.parametrize("name", BATTERY)


def configure(**parameters: object) -> ModelConfig:
    return TypeAdapter(AnyModel).validate_python({"width": WIDTH, "layers": 1, **parameters})


def build(parameters: dict[str, object], length: int) -> nn.Module:
    """A mixer in float64, its weights the same whenever it is built."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_mixer(configure(**parameters), length).double()


def hidden(length: int, seed: int = 0) -> Tensor:
    return normal(BATCH, length, WIDTH, seed=seed)


def reached(mixer: nn.Module, length: int) -> Tensor:
    """Whether the output at token i depends on the input at token j: [i, j]."""
    x = hidden(length)[:1].requires_grad_()
    outputs = mixer(x)[0] @ normal(WIDTH, seed=1)
    return torch.stack([torch.autograd.grad(out, x, retain_graph=True)[0][0].abs().sum(-1) > 0 for out in outputs])


# What holds for every mixer.


def test_the_battery_covers_every_mixer_and_every_switch():
    configurations = [configure(**parameters) for parameters in BATTERY.values()]
    members = get_args(SingleMixer)
    assert {type(c) for c in configurations} == set(members)
    for member in members:
        for name in set(member.model_fields) - set(ModelConfig.model_fields) - {"mixer", "heads"}:
            values = {getattr(c, name) for c in configurations if type(c) is member}
            if member in (DeltaConfig, GLAConfig) and name in ("qk_norm", "temperature"):
                continue  # refused: rows of the one have unit length always, and so has what the other reads
            assert len(values) > 1, f"{member.__name__}.{name} has one value only"
        if issubclass(member, QKVConfig):
            refused = {AttentionConfig: set(), DeltaConfig: {"alibi", "rotary"}, GLAConfig: {"alibi", "rotary"}}.get(
                member, {"alibi"}
            )
            positions = {c.position for c in configurations if type(c) is member}
            assert positions == {"none", "rotary", "alibi", "learned", "sinusoidal"} - refused


@every_mixer
@pytest.mark.parametrize("length", [1, 2, 13, 29])
def test_shape_is_kept_at_any_length(name, length):
    assert build(BATTERY[name], 13)(hidden(length)).shape == (BATCH, length, WIDTH)


@every_mixer
def test_a_token_depends_on_all_tokens_up_to_it_and_on_none_after(name):
    length = 67  # longer than the chunks of linear attention and of the scan
    pattern, lower = reached(build(BATTERY[name], length), length), torch.ones(length, length).tril().bool()
    assert not (pattern & ~lower).any()
    if BATTERY[name]["mixer"] == "landmark":  # which reads its own block and what it retrieves: see below
        block = BATTERY[name]["block"]
        own = torch.block_diag(*[torch.ones(block, block).bool()] * length)[:length, :length]
        assert pattern[own & lower].all()
    else:
        assert pattern[lower].all()


@every_mixer
@pytest.mark.parametrize("length", [3, 29])  # within one block of landmarks, and over several
def test_asked_positions_are_those_rows_of_the_whole(name, length):
    mixer, at = build(BATTERY[name], 29), torch.tensor([[0, 2], [1, length - 1]])
    x = hidden(length).requires_grad_()
    inputs = (x, *mixer.parameters())
    outputs = mixer(x, at), mixer(x)[torch.arange(2)[:, None], at]
    close(*outputs)
    cotangent = normal(BATCH, 2, WIDTH, seed=3)
    close(*(torch.autograd.grad(out, inputs, cotangent, materialize_grads=True) for out in outputs))


@every_mixer
@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_looks_projections_up_where_tokens_are_many(name, layers):
    """29 tokens of a vocabulary of 5, and the same model with 1,000 more tokens that never stand anywhere."""
    config = configure(**BATTERY[name], mlp=2).model_copy(update={"layers": layers})
    small, large = (SequenceModel(config, vocabulary=size, length=29).double() for size in (5, 1005))
    large.load_state_dict(
        {
            n: F.pad(w, (0, 0, 0, 1000)) if n in ("embedding.token.weight", "head.weight") else w
            for n, w in small.state_dict().items()
        }
    )
    tokens, at = torch.randint(5, (2, 29), generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 7], [0, 28]])
    projected = []
    for model in (small, large):
        first, project = model.blocks[0], model.blocks[0].project
        first.project = lambda x, project=project: projected.append(x.shape[:-1]) or project(x)
    logits = small.logits_at(tokens, at)
    close(logits, small(tokens)[torch.arange(2)[:, None], at])
    close(logits, large.logits_at(tokens, at)[..., :5])
    added = small.embedding.scheme != "none"  # what is added to a token depends on its place
    assert projected == [(2, 29) if added else (5,)] * 2 + [(2, 29)]
    cotangent = normal(2, 2, 5, seed=1)
    gradients = [
        torch.autograd.grad(model.logits_at(tokens, at)[..., :5], [*model.parameters()], cotangent, materialize_grads=True)
        for model in (small, large)
    ]
    close(gradients[0], tuple(g[: len(s)] if s.dim() else g for s, g in zip(*gradients, strict=True)))


@every_mixer
def test_every_weight_gets_a_gradient(name):
    mixer = build(BATTERY[name], 13)
    (mixer(hidden(13)) * hidden(13, seed=1)).sum().backward()
    for weight, parameter in mixer.named_parameters():
        assert (parameter.grad != 0).all(), weight


@every_mixer
def test_rows_of_a_batch_do_not_see_each_other(name):
    mixer, x = build(BATTERY[name], 13), hidden(29)
    close(mixer(x), torch.cat([mixer(row) for row in x.split(1)]))


@every_mixer
def test_float32_agrees_with_float64(name):
    mixer, x = build(BATTERY[name], 29), hidden(29)
    expected = mixer(x).float()
    torch.testing.assert_close(mixer.float()(x.float()), expected, rtol=1e-4, atol=1e-5)


@every_mixer
def test_bfloat16_agrees_with_float32_roughly(name):
    mixer, x = build(BATTERY[name], 29).float(), hidden(29).float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(x)
    assert (rough - mixer(x)).norm() < 0.05 * mixer(x).norm()


@every_mixer
@pytest.mark.parametrize("length", [29, 150])  # filters are matrices here, and applied by FFT there
def test_a_model_of_bfloat16_trains_in_it(name, length):
    mixer, x = build(BATTERY[name], length), hidden(length).bfloat16().requires_grad_()
    y = mixer.bfloat16()(x)
    y.float().square().sum().backward()
    assert {y.dtype, x.grad.dtype, *(p.grad.dtype for p in mixer.parameters() if p.grad is not None)} == {torch.bfloat16}
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@every_mixer
@pytest.mark.parametrize("length", [29, 150])
def test_an_empty_batch_comes_out_empty(name, length):
    x = torch.zeros(0, length, WIDTH, dtype=torch.float64)
    assert build(BATTERY[name], length)(x).shape == x.shape


@every_mixer
def test_no_gradient_is_nan_on_its_way(name):
    mixer, x = build(BATTERY[name], 29), hidden(50).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        mixer(x).square().sum().backward()


@every_mixer
def test_a_mixer_begins_as_it_was_built(name, monkeypatch):
    built = []

    def record(config, length):
        mixer = build_mixer(config, length)
        built.append({weight: value.clone() for weight, value in mixer.state_dict().items()})
        return mixer

    monkeypatch.setattr("cat.model.build_mixer", record)
    model = SequenceModel(configure(**BATTERY[name], mlp=2), vocabulary=11, length=13)
    for weight, value in model.blocks[0].mixer.state_dict().items():
        assert torch.equal(value, built[0][weight]), weight


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch maps over some of its own one by one
@every_mixer
@pytest.mark.parametrize("length", [19, 131])
def test_gradients_of_each_sequence_are_those_that_it_has_alone(name, length):
    mixer = build(BATTERY[name], 13)
    weights = {weight: parameter.detach() for weight, parameter in mixer.named_parameters()}
    x = hidden(length)

    def loss(weights, sequence):
        return torch.func.functional_call(mixer, weights, (sequence[None],)).square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))
    ours = torch.vmap(gradients, in_dims=(None, 0))(weights, x)
    for place, sequence in enumerate(x):
        of_weights, of_sequence = gradients(weights, sequence)
        close(ours[1][place], of_sequence)
        for weight, gradient in of_weights.items():
            close(ours[0][weight][place], gradient)


@every_mixer
@pytest.mark.parametrize("length", [1, 3, 19])  # shorter than some filters, and than `full` ones
def test_a_mixer_is_its_naive_twin(name, length, monkeypatch):
    mixer = build(BATTERY[name], 13)
    names = [weight for weight, _ in mixer.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), x)

    def run_naively(x, *weights):
        with monkeypatch.context() as patch:
            patch.setattr("cat.mixers.filters.filter_heads", naive_filter_heads)
            patch.setattr("cat.mixers.filters.filter_channels", naive_filter_channels)
            patch.setattr("cat.mixers.filters.mix_heads", naive_mix_heads)
            patch.setattr("cat.mixers.attention.layer.attend", naive_attend)
            patch.setattr("cat.mixers.linear.layer.linear_attend", naive_linear_attend)
            patch.setattr("cat.mixers.landmark.layer.landmark_attend", naive_landmark_attend)
            patch.setattr("cat.mixers.mamba.layer.selective_scan", naive_selective_scan)
            patch.setattr("cat.mixers.based.layer.taylor_attend", naive_taylor_attend)
            patch.setattr("cat.mixers.performer.layer.performer_attend", naive_performer_attend)
            patch.setattr("cat.mixers.delta.layer.delta_rule", naive_delta_rule)
            patch.setattr("cat.mixers.gla.layer.gated_linear_attend", naive_gated_linear_attend)
            return run(x, *weights)

    assert_twins(run, run_naively, hidden(length), *mixer.parameters())


# Queries, keys and values.


@pytest.mark.parametrize("stream", "qkv")
def test_a_filter_acts_on_its_own_stream(stream):
    filtered = build({**BATTERY["attention"], stream: 2}, 13)
    plain = build(BATTERY["attention"], 13)
    plain.load_state_dict(filtered.state_dict(), strict=False)
    with torch.no_grad():
        filtered.filters[stream].taps.copy_(torch.tensor([0.0, 1.0]))
    unfiltered, streams = (mixer.streams(mixer.project(hidden(13))) for mixer in (plain, filtered))
    for s, before, after in zip("qkv", unfiltered, streams, strict=True):
        close(after, F.pad(before[:, :, :-1], (0, 0, 1, 0)) if s == stream else before)


@pytest.mark.parametrize("mixer", ["attention", "linear"])
def test_identity_filters_make_cat_the_transformer(mixer):
    cat = build({"mixer": mixer, **STREAMS, "position": "rotary", "q": 2, "k": "full", "v": 3}, 13)
    transformer = build({"mixer": mixer, **STREAMS, "position": "rotary"}, 13)
    with torch.no_grad():
        for head_filter in cat.filters.values():
            head_filter.taps.zero_()[:, 0] = 1
    transformer.load_state_dict({name: w for name, w in cat.state_dict().items() if "filters" not in name})
    close(cat(hidden(13)), transformer(hidden(13)))


def test_filters_begin_near_the_identity_and_full_is_the_training_length():
    taps = build({**BATTERY["attention"], "q": "full"}, 13).filters["q"].taps
    assert taps.shape == (HEADS, 13)
    assert ((taps - torch.eye(13)[0]).abs() < 0.2).all()


def test_normalised_filters_are_divided_by_the_sum_of_their_absolute_taps():
    head_filter = build({**BATTERY["attention"], "k": 3, "filter_norm": True}, 13).filters["k"]
    x, taps = normal(BATCH, HEADS, 13, 5), normal(HEADS, 3, seed=1)
    with torch.no_grad():
        head_filter.taps.copy_(taps)
    close(head_filter(x), naive_filter_heads(x, taps / taps.abs().sum(1, keepdim=True)))


def test_normalised_rows_have_unit_length_after_the_filter_and_a_temperature():
    mixer = build(BATTERY["attention_all"], 13)
    q, k, _ = mixer.streams(mixer.project(hidden(13)))
    close(k.norm(dim=-1), torch.ones(BATCH, HEADS, 13).double())
    torch.testing.assert_close(q.norm(dim=-1), torch.full((BATCH, HEADS, 13), 8.0).double())


@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_positions_and_the_scale_act_after_the_filters(position, qk_norm):
    mixer = build({**BATTERY["attention"], "k": 3, "position": position, "qk_norm": qk_norm}, 13)
    q, k, v = mixer.streams(mixer.project(hidden(13)))
    if position == "rotary":
        q, k = rotate(q), rotate(k)
    heads = naive_attend(q, k, v, scale=1.0 if qk_norm else (WIDTH // HEADS) ** -0.5, alibi=position == "alibi")
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.output.weight.T)


# Linear attention.


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 131])
def test_linear_attention_is_the_definition(length, rotary):
    q, k, v = (normal(2, 3, length, 4, seed=s) for s in range(3))
    assert_twins(partial(linear_attend, rotary=rotary), partial(naive_linear_attend, rotary=rotary), q, k, v)


def test_linear_attention_without_a_filter_is_that_of_its_paper():
    mixer = build(BATTERY["linear"], 13)
    q, k, v = mixer.streams(mixer.project(hidden(13)))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    heads = weights / weights.sum(-1, keepdim=True) @ v
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.output.weight.T)


def test_linear_attention_with_rotary_position_turns_the_features():
    mixer = build({**BATTERY["linear"], "position": "rotary"}, 13)
    q, k, v = (stream for stream in mixer.streams(mixer.project(hidden(13))))
    weights = (rotate(F.elu(q) + 1) @ rotate(F.elu(k) + 1).mT).tril()
    total = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril().sum(-1, keepdim=True)
    heads = weights / total @ v
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.output.weight.T)


def test_features_stay_positive_where_elu_rounds_to_zero():
    x = torch.tensor([-50.0, -1.0, 0.0, 2.0, 200.0]).view(1, 1, 1, 5).requires_grad_()
    slopes = torch.autograd.grad(features(x).sum(), x)[0]
    assert features(x).flatten().tolist() == pytest.approx([math.exp(-50), math.exp(-1), 1, 3, 201], rel=1e-6, abs=0)
    assert slopes.flatten().tolist() == pytest.approx([math.exp(-50), math.exp(-1), 1, 1, 1], rel=1e-6, abs=0)


# Landmark attention.


@pytest.mark.parametrize("many", [0, 100])
@pytest.mark.parametrize("reach", [0, 2, 5])
@pytest.mark.parametrize("top", [1, 2, 7])
@pytest.mark.parametrize("length", [1, 5, 6, 10, 23])
@pytest.mark.parametrize("asked", [False, True])
def test_landmark_attention_is_the_definition(length, top, reach, many, asked, monkeypatch):
    monkeypatch.setattr("cat.mixers.landmark.op.MANY", {"all": many, "asked": many})
    lengths = 3 if asked else length, length, length, length // 5
    streams = [normal(2, 3, tokens, 7, seed=s) for s, tokens in enumerate(lengths)]
    at = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 2, length - 1]]) if asked else None
    sizes = {"scale": 0.7, "block": 5, "top": top, "reach": reach, "at": at}
    assert_twins(partial(landmark_attend, **sizes), partial(naive_landmark_attend, **sizes), *streams)


@pytest.mark.parametrize(("block", "top"), [(23, 1), (3, 7), (5, 100), (1, 22)])
@pytest.mark.parametrize("position", ["none", "rotary"])
def test_landmark_attention_that_reads_every_block_is_dense(block, top, position):
    streams = {**STREAMS, "position": position, "q": 3, "k": "full", "v": 2, "qk_norm": position == "rotary"}
    landmark = build({"mixer": "landmark", **streams, "block": block, "top": top, "summary": 3}, 23)
    dense = build({"mixer": "attention", **streams}, 23)
    dense.load_state_dict({name: weight for name, weight in landmark.state_dict().items() if "summary" not in name})
    assert_twins(landmark, dense, hidden(23))


@pytest.mark.parametrize("top", [1, 3])
def test_a_query_reads_its_own_block_and_the_best_of_those_before(top):
    block, length = 5, 33
    q, k, v = (normal(1, 1, length, 7, seed=s).requires_grad_() for s in range(3))
    landmarks = normal(1, 1, length // block, 7, seed=3)
    out = landmark_attend(q, k, v, landmarks, scale=1.0, block=block, top=top, reach=0)[0, 0].sum(-1)
    for i in range(length):
        own = i // block
        matches = [(landmarks[0, 0, n] @ q[0, 0, i]).item() for n in range(own)]
        best = sorted(range(own), key=lambda n: -matches[n])[:top]
        expected = [j // block == own or j // block in best for j in range(i + 1)] + [False] * (length - i - 1)
        assert (torch.autograd.grad(out[i], v, retain_graph=True)[0][0, 0].abs().sum(-1) > 0).tolist() == expected


def test_the_overlap_of_blocks_is_the_reach_of_the_longest_filter_and_at_most_a_block():
    filters = [{}, {"q": 2, "v": 4}, {"k": 6}, {"k": "full"}, {"k": 3, "dilation": 2}, {"summary": 7}]
    filters.append({"k": "state", "filter_size": 2})
    assert [build({**LANDMARK, **filter_}, 13).reach for filter_ in filters] == [0, 3, 5, 5, 4, 0, 5]


@pytest.mark.parametrize(("dilation", "taps_of_block"), [(1, 5), (2, 3), (5, 1)])
@pytest.mark.parametrize("sharing", ["head", "channel", "mixing"])
def test_a_summary_begins_as_the_sum_of_the_block_s_keys(sharing, dilation, taps_of_block):
    mixer = build({**LANDMARK, "k": 2, "summary": 9, "sharing": sharing, "dilation": dilation}, 13)
    taps = mixer.filters["summary"].taps
    one = torch.eye(HEADS)[..., None] if sharing == "mixing" else torch.ones(1)
    assert ((taps[..., :taps_of_block] - one).abs() < 0.2).all()
    assert (taps[..., taps_of_block:].abs() < 0.2).all()
    k = mixer.filtered(mixer.project(hidden(13)))[1]
    landmarks = mixer.streams(mixer.project(hidden(13)))[3]
    close(landmarks, mixer.filters["summary"](k)[:, :, [4, 9]])


def test_a_sum_of_keys_does_not_see_which_tokens_stood_side_by_side():
    mixer = build({**LANDMARK, "k": 2, "summary": 5}, 13)
    with torch.no_grad():
        mixer.filters["summary"].taps.fill_(1)
    x = hidden(13)
    swapped = x[:, [0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 10, 11, 12]]  # inside the block of tokens 5 to 9
    landmarks = [mixer.streams(mixer.project(tokens))[3][:, :, 1] for tokens in (x, swapped)]
    assert not torch.equal(mixer.streams(mixer.project(x))[1], mixer.streams(mixer.project(swapped))[1])
    close(*landmarks)


def test_a_summary_is_of_keys_before_they_are_normalised_and_is_normalised_itself():
    mixer = build({**LANDMARK, "k": 2, "summary": 5, "qk_norm": True}, 13)
    _, k, _ = mixer.filtered(mixer.project(hidden(13)))
    close(mixer.streams(mixer.project(hidden(13)))[3], F.normalize(mixer.filters["summary"](k)[:, :, [4, 9]], dim=-1))
    plain = build({**LANDMARK, "k": 2, "qk_norm": True}, 13)
    close(plain.streams(plain.project(hidden(13)))[3], plain.streams(plain.project(hidden(13)))[1][:, :, [4, 9]])


def test_landmarks_are_turned_by_the_positions_of_the_last_tokens_of_their_blocks():
    mixer = build({**LANDMARK, "position": "rotary", "top": 1}, 23)
    q, k, v = (normal(1, HEADS, 23, WIDTH // HEADS, seed=s) for s in range(3))
    turned = rotate(k)
    sizes = {"scale": mixer.scale, "block": mixer.block, "top": 1, "reach": 0}
    close(mixer.mix(q, k, v), naive_landmark_attend(rotate(q), turned, v, block_ends(turned, mixer.block), **sizes))


def test_a_landmark_that_matches_better_gets_its_block_more_attention():
    q, k, v = torch.zeros(3, 1, 1, 7, 2).double()
    q[..., 6, 0], v[..., :2, 0] = 1, 1  # the last query chooses one of three blocks of two; the values are those of block 0
    shares = []
    for match in (1.0, 2.0):
        k[..., 1, 0] = match
        shares.append(landmark_attend(q, k, v, block_ends(k, 2), scale=1.0, block=2, top=1, reach=0)[0, 0, 6, 0].item())
    assert shares == pytest.approx([math.e / (math.e + 1), math.e**2 / (math.e**2 + 1)])


@pytest.mark.parametrize("group", [[0], [0] * 7, [2] * 21 + [4, 1], [4, 1, 4, 4, 0, 1, 4, 4, 3, 4, 4], [2, 2, 1]])
def test_each_row_has_a_place_of_its_own_in_a_tile_of_its_group(group):
    groups = 5
    place, owner, size = in_tiles(torch.tensor(group), groups)
    assert owner[place // size].tolist() == group
    assert len(set(place.tolist())) == len(group)
    assert len(owner) * size <= 4 / 3 * len(group) + groups


# Mamba.


@pytest.mark.parametrize("at_once", [1, 7, None])  # tokens
@pytest.mark.parametrize("length", [1, 2, 7, 8, 47])
def test_the_selective_scan_is_the_definition(length, at_once, monkeypatch):
    if at_once is not None:
        monkeypatch.setitem(NUMBERS_AT_ONCE, "cpu", at_once * 2 * 5 * 3)
    x, delta, a = normal(2, length, 5), normal(2, length, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    inputs = x, delta, a, normal(2, length, 3, seed=3), normal(2, length, 3, seed=4)
    assert_twins(selective_scan, naive_selective_scan, *inputs)
    with torch.no_grad():  # the states are not kept
        close(selective_scan(*inputs), naive_selective_scan(*inputs))


@pytest.mark.parametrize("parts", [[1] * 5, [9, 1, 20]], ids=str)
def test_the_selective_scan_goes_on_from_a_state(parts, monkeypatch):
    monkeypatch.setitem(NUMBERS_AT_ONCE, "cpu", 7 * 2 * 5 * 3)
    length = sum(parts)
    x, delta, a = normal(2, length, 5), normal(2, length, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    b, c = normal(2, length, 3, seed=3), normal(2, length, 3, seed=4)

    def stepwise(x, delta, a, b, c):
        def step(x, delta, b, c, state):
            return selective_scan_next(x, delta, a, b, c, state=state)

        return in_parts(step, (x, delta, b, c), parts, dim=1)[0]

    assert_twins(stepwise, naive_selective_scan, x, delta, a, b, c)
    with torch.no_grad():  # the states are not kept
        close(stepwise(x, delta, a, b, c), naive_selective_scan(x, delta, a, b, c))


@pytest.fixture
def mamba_ssm(monkeypatch):
    """In the place of its kernel, the naive scan in its layout, (B, E, L), and (B, S, L) for the vectors, all of one dtype."""

    def kernel(u, delta, a, b, c):
        assert u.shape == delta.shape == (len(u), len(a), u.shape[2])
        assert b.shape == c.shape == (len(u), a.shape[1], u.shape[2])
        assert {t.dtype for t in (u, delta, b, c)} == {a.dtype}
        return naive_selective_scan(u.mT, delta.mT, a, b.mT, c.mT).mT

    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", SimpleNamespace(selective_scan_fn=kernel))
    fused_scan.cache_clear()
    yield kernel
    fused_scan.cache_clear()


def test_the_kernel_of_mamba_ssm_is_taken_on_a_gpu_for_states_that_it_takes(mamba_ssm):
    assert fused_scan("cuda", torch.float32, 16) is mamba_ssm
    assert fused_scan("cuda", torch.float32, 256) is mamba_ssm
    assert fused_scan("cuda", torch.float32, 257) is None
    assert fused_scan("cuda", torch.float64, 16) is None
    assert fused_scan("cpu", torch.float32, 16) is None


def test_without_mamba_ssm_there_is_no_kernel(mamba_ssm, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)  # as where it is not installed
    assert fused_scan("cuda", torch.float32, 16) is None


def test_the_kernel_of_mamba_ssm_is_given_its_own_layout(mamba_ssm, monkeypatch):
    asked = []
    monkeypatch.setattr("cat.mixers.mamba.op.fused_scan", lambda *about: asked.append(about) or mamba_ssm)
    x, delta, a = normal(2, 7, 5), normal(2, 7, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    b, c = normal(2, 7, 3, seed=3), normal(2, 7, 3, seed=4)
    assert_twins(selective_scan, naive_selective_scan, x, delta, a, b, c)
    assert asked == [("cpu", torch.float64, 3)]

    rough = [t.bfloat16() for t in (x, delta, b, c)]
    exact = [t.double() for t in rough]
    close(selective_scan(*rough[:2], a, *rough[2:]), naive_selective_scan(*exact[:2], a, *exact[2:]))


def test_a_state_that_is_never_forgotten_is_a_sum():
    x, ones = normal(2, 37, 5), torch.ones(2, 37, 1).double()
    close(selective_scan(x, torch.ones_like(x), torch.zeros(5, 1).double(), ones, ones), x.cumsum(1))


def test_mamba_begins_with_the_rates_and_steps_of_its_paper():
    mixer = build({"mixer": "mamba", "width": 1000}, 13)
    torch.testing.assert_close(-mixer.log_rate.exp(), -torch.arange(1.0, 17.0).double().expand(2000, 16))
    assert (mixer.skip == 1).all()
    steps = F.softplus(mixer.step.bias)
    assert [steps.min().item(), steps.max().item()] == pytest.approx([0.001, 0.1], abs=0.0005)
    assert steps.mean().item() == pytest.approx(0.0505, abs=0.003)


def test_mamba_has_the_sizes_of_its_configuration():
    mixer = build({"mixer": "mamba", "expand": 3, "state": 5, "conv": 7}, 13)
    assert mixer.log_rate.shape == (3 * WIDTH, 5)
    assert mixer.convolution.weight.shape == (3 * WIDTH, 1, 7)


def test_a_state_adds_up_in_the_precision_of_the_weights():
    ones = torch.ones(1, 8191, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        sums = selective_scan(ones, ones, torch.zeros(1, 1), ones, ones)
    assert sums[0, -1].item() == pytest.approx(8191, rel=0.01)  # in bfloat16, 4096 + 16 is 4096


def test_mamba_is_gated_skips_and_convolves():
    mixer = build(BATTERY["mamba"], 13)
    x = hidden(13)
    u, gate = (x @ mixer.input.weight.T).chunk(2, dim=-1)
    taps = mixer.convolution.weight[:, 0].flip(1)  # PyTorch correlates: its last tap is the present one
    u = F.silu(naive_filter_heads(u.mT[..., None], taps)[..., 0].mT + mixer.convolution.bias)
    step, b, c = (u @ mixer.selection.weight.T).split([2, 16, 16], dim=-1)
    delta = F.softplus(step @ mixer.step.weight.T + mixer.step.bias)
    y = naive_selective_scan(u, delta, -mixer.log_rate.exp(), b, c) + mixer.skip * u
    close(mixer(x), (y * F.silu(gate)) @ mixer.output.weight.T)


# Hyena.


def test_hyena_is_a_gated_long_convolution_of_what_is_convolved_shortly():
    mixer, x = build(BATTERY["hyena"], 13), hidden(29)
    convolved = naive_filter_channels((x @ mixer.projection.weight.T)[:, None], mixer.short.taps)[:, 0]
    q, k, v = convolved.split(WIDTH, dim=-1)
    long = naive_filter_channels((k * v)[:, None], mixer.long.response(29))[:, 0]
    close(mixer(x), (q * long) @ mixer.output.weight.T)


def test_hyena_has_a_filter_a_channel_that_begins_short_as_the_identity_and_long_at_random():
    mixer = build({**BATTERY["hyena"], "conv": 4}, 13)
    assert mixer.short.taps.shape == (1, 3 * WIDTH, 4)
    assert ((mixer.short.taps - torch.eye(4)[0]).abs() < 0.3).all()
    assert mixer.long.response(29).shape == (1, WIDTH, 29)
    assert not mixer.long.direct.any()


# Parameters.

CAT = {"mixer": "attention", "width": 64, "heads": 1, "position": "none", "qk_norm": True, "q": 4, "k": 4}
AS_LARGE = {
    "transformer": {**CAT, "q": None, "k": None},
    "all streams": {**CAT, "v": 4},
    "full": {**CAT, "q": "full", "k": "full"},
    "channel": {**CAT, "sharing": "channel", "filter_bias": True},
    "mixing": {**CAT, "heads": 2, "sharing": "mixing"},
    "network": {**CAT, "q": "network", "k": "network", "filter_size": 16},
    "decay": {**CAT, "q": "decay", "k": "decay", "filter_size": 4},
    "state": {**CAT, "q": "state", "k": "state", "filter_size": 4},
    "state a channel": {**CAT, "q": "state", "k": "state", "filter_size": 4, "sharing": "channel"},
    "landmark": {**CAT, "mixer": "landmark", "summary": 16, "block": 16, "top": 4},
    "linear": {**CAT, "mixer": "linear", "q": None, "k": None, "qk_norm": False},
    "lincat": {**CAT, "mixer": "linear", "qk_norm": False},
    "based": {**CAT, "mixer": "based", "window": 8, "q": None, "k": None, "qk_norm": False},
    "performer": {**CAT, "mixer": "performer", "features": 64, "q": None, "k": None, "qk_norm": False},
    "delta": {**CAT, "mixer": "delta", "v": 4, "sharing": "channel", "qk_norm": False},
    "gated delta": {**CAT, "mixer": "delta", "v": 4, "sharing": "channel", "qk_norm": False, "gate": True},
    "gla": {**CAT, "mixer": "gla", "q": None, "k": None, "qk_norm": False, "gate_rank": 16},
    "mamba": {"mixer": "mamba", "width": 64, "expand": 1},
    "hyena": {"mixer": "hyena", "width": 64, "conv": 4, "filter_size": 32},
}
"""One layer of width 64 at a training length of 128."""
LARGER = {
    "mamba": {"mixer": "mamba", "width": 64},  # three maps of 2 d channels, 6 d^2, where attention has 4 d^2
    "full a channel": {**CAT, "q": "full", "k": "full", "sharing": "channel"},  # 2 L d taps
    "learned": {**CAT, "position": "learned"},  # L d positions
}


def count_parameters(parameters: dict[str, object]) -> int:
    """Of a whole model with the vocabulary of 64 keys, 64 values, BOS and a blank."""
    model = SequenceModel(configure(**parameters), vocabulary=130, length=128)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", AS_LARGE)
def test_a_baseline_has_as_many_parameters_as_cat(name):
    assert count_parameters(AS_LARGE[name]) == pytest.approx(count_parameters(CAT), rel=0.1)


@pytest.mark.parametrize("name", LARGER)
def test_these_have_more_and_are_no_equal_baselines(name):
    assert count_parameters(LARGER[name]) > 1.2 * count_parameters(CAT)


def test_every_mixer_is_compared_with_cat_at_its_size():
    members = get_args(SingleMixer)
    assert {type(configure(**parameters)) for parameters in AS_LARGE.values()} == set(members)


# What cannot be built, in words.


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({**BATTERY["linear"], "position": "alibi"}, "linear attention has none"),
        ({**LANDMARK, "position": "alibi"}, "landmark attention has none"),
        ({"mixer": "landmark", **STREAMS, "block": 5}, "top"),
        ({"mixer": "landmark", **STREAMS, "top": 5}, "block"),
        ({**BATTERY["mamba"], "heads": 3}, "heads"),
        ({**BATTERY["linear"], "heads": 4}, "heads = 4 does not divide width = 18"),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(parameters, words):
    with pytest.raises(ValidationError, match=words):
        configure(**parameters)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({**LANDMARK, "block": 64}, "block = 64 is longer than the training length of 32"),
        ({**LANDMARK, "k": 33}, "k = 33 taps is longer than the training length of 32"),
        ({**BATTERY["linear"], "v": 33}, "v = 33 taps is longer than the training length of 32"),
        ({**BATTERY["mamba"], "conv": 33}, "conv = 33 taps reach past the training length of 32"),
    ],
)
def test_a_model_longer_than_its_sequences_is_refused(parameters, words):
    config = configure(**parameters)
    config.check_length(64)
    with pytest.raises(ValueError, match=words):
        SequenceModel(config, vocabulary=11, length=32)


@every_mixer
def test_shapes_are_found_without_numbers(name):
    model = build_model(configure(**BATTERY[name]), vocabulary=16, length=64, seed=0).to("meta")
    logits = model(torch.zeros(2, 64, dtype=torch.long, device="meta"))
    logits.sum().backward()
    assert logits.shape == (2, 64, 16)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({}, ["q", "k", "v"]),
        ({"k": 3}, ["q", "k", "v"]),
        ({"q": 3, "k": 3}, ["qk", "v"]),
        ({"q": 3, "v": 3}, ["q", "k", "v"]),
        ({"q": 3, "k": 3, "v": 2, "filter_bias": True}, ["qk", "v"]),
        ({"q": 3, "k": 3, "v": 3, "sharing": "channel", "filter_bias": True, "filter_norm": True}, ["qkv"]),
        ({"q": "full", "k": "full", "v": "full", "dilation": 1}, ["q", "k", "v"]),
        ({"q": 3, "k": 3, "sharing": "mixing"}, ["q", "k", "v"]),
        ({"q": "state", "k": "state", "filter_size": 3}, ["q", "k", "v"]),
    ],
)
def test_streams_filtered_at_once_are_those_filtered_one_by_one(changes, parts, monkeypatch):
    of_many_sequences = HEAD_LIMITS.numba._replace(work=0)
    monkeypatch.setattr("cat.ops.conv.causal.OF_HEADS", HEAD_LIMITS._replace(loops=of_many_sequences))
    mixer = build_mixer(configure(mixer="attention", **{**STREAMS, **changes}), 97).double()
    with torch.no_grad():
        for weight in mixer.filters.parameters():
            weight += torch.linspace(-1, 1, weight.numel()).view_as(weight)
    projected = torch.randn(2, 97, mixer.projection.out_features, generator=torch.Generator().manual_seed(0)).double()
    assert group_adjacent(mixer.filters, "qkv", projected) == parts
    alone = {
        name: mixer.filters[name](x) if name in mixer.filters else x
        for name, x in zip("qkv", mixer.heads(projected), strict=True)
    }
    for ours, theirs in zip(mixer.filtered(projected), alone.values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    at = torch.tensor([[0, 3, 96], [1, 2, 7]])
    for ours, theirs in zip(
        mixer.filtered(projected, at), (gather_positions(alone["q"], at), alone["k"], alone["v"]), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
