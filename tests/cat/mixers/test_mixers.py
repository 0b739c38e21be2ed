"""Tests of every mixer: common tests for all of them, then tests of each one's definition."""

import math
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cat.config import ModelConfig
from cat.mixers.based.op import naive_taylor_attend
from cat.mixers.build import build_mixer
from cat.mixers.delta.op import naive_delta_rule
from cat.mixers.gla.op import naive_gated_linear_attend
from cat.mixers.landmark.op import block_ends, in_tiles, landmark_attend, naive_landmark_attend
from cat.mixers.linear.op import features, linear_attend, naive_linear_attend
from cat.mixers.mamba.op import MAX_CHUNK_ELEMENTS, fused_scan, naive_selective_scan, selective_scan, selective_scan_step
from cat.mixers.performer.op import naive_performer_attend
from cat.mixers.qkv import group_adjacent
from cat.mixers.registry import mixer_class, mixer_names, model_config
from cat.model import SequenceModel
from cat.ops.attention import naive_attend
from cat.ops.conv.causal import HEAD_LIMITS
from cat.ops.conv.reference import naive_filter_channels, naive_filter_heads, naive_mix_heads
from cat.ops.position import gather_positions, rotate
from cat.training.fit import build_model
from tests.helpers.reference import assert_matches_reference, close, in_parts, normal

BATCH, WIDTH, HEADS = 2, 18, 3

QKV = {"heads": HEADS, "position": "none"}
UNSCALED = {"conv_q": 2, "conv_k": 4, "conv_v": 3, "filter_norm": True, "sharing": "channel", "dilation": 2, "filter_bias": True}
FILTERED = {**UNSCALED, "qk_norm": True}
GENERATED = {"conv_q": "network", "conv_k": "state", "conv_v": "decay", "filter_size": 3, "filter_init": "random"}
LANDMARK = {"mixer": "landmark", **QKV, "block": 5, "top": 2}
BATTERY = {
    "attention": {"mixer": "attention", **QKV},
    "attention_q": {"mixer": "attention", **QKV, "conv_q": 3, "position": "rotary"},
    "attention_k": {"mixer": "attention", **QKV, "conv_k": "full", "position": "alibi"},
    "attention_v": {"mixer": "attention", **QKV, "conv_v": 1, "position": "learned"},
    "attention_all": {
        "mixer": "attention",
        **QKV,
        "conv_q": 2,
        "conv_k": 4,
        "conv_v": "full",
        "filter_norm": True,
        "qk_norm": True,
    },
    "attention_sinusoidal": {"mixer": "attention", **QKV, "position": "sinusoidal", "qk_norm": True},
    "attention_channel": {
        "mixer": "attention",
        **QKV,
        "conv_q": 3,
        "conv_k": "full",
        "sharing": "channel",
        "filter_bias": True,
        "qk_norm": True,
    },
    "attention_mixing": {
        "mixer": "attention",
        **QKV,
        "conv_k": 3,
        "conv_v": "full",
        "sharing": "mixing",
        "filter_norm": True,
        "dilation": 2,
    },
    "attention_network": {
        "mixer": "attention",
        **QKV,
        "conv_q": "network",
        "conv_v": "network",
        "filter_size": 5,
        "temperature": True,
    },
    "attention_decay": {
        "mixer": "attention",
        **QKV,
        "conv_q": "decay",
        "conv_k": "decay",
        "conv_v": 2,
        "filter_size": 3,
        "filter_init": "random",
    },
    "attention_state": {
        "mixer": "attention",
        **QKV,
        "conv_k": "state",
        "conv_v": "state",
        "filter_size": 3,
        "sharing": "channel",
    },
    "linear": {"mixer": "linear", **QKV},
    "linear_q": {"mixer": "linear", **QKV, "conv_q": 3, "position": "rotary"},
    "linear_k": {"mixer": "linear", **QKV, "conv_k": "full", "position": "learned"},
    "linear_all": {"mixer": "linear", **QKV, **FILTERED},
    "linear_state": {"mixer": "linear", **QKV, **GENERATED, "temperature": True},
    "linear_sinusoidal": {"mixer": "linear", **QKV, "position": "sinusoidal"},
    "landmark": LANDMARK,
    "landmark_q": {**LANDMARK, "conv_q": 3, "position": "rotary", "top": 1},
    "landmark_k": {**LANDMARK, "conv_k": "full", "position": "learned", "block": 3},
    "landmark_all": {**LANDMARK, **FILTERED, "block": 7},
    "landmark_state": {**LANDMARK, **GENERATED, "temperature": True},
    "landmark_summary": {**LANDMARK, "conv_k": 2, "conv_summary": 7, "qk_norm": True, "sharing": "mixing", "top": 1},
    "landmark_summary_state": {**LANDMARK, "conv_summary": "state", "filter_size": 2, "top": 1},
    "landmark_sinusoidal": {**LANDMARK, "position": "sinusoidal", "top": 100},
    "based": {"mixer": "based", **QKV, "window": 4},
    "based_q": {"mixer": "based", **QKV, "conv_q": 3, "position": "rotary", "window": 1},
    "based_k": {"mixer": "based", **QKV, "conv_k": "full", "position": "learned", "window": 12},
    "based_all": {"mixer": "based", **QKV, **FILTERED, "position": "sinusoidal", "window": 7},
    "based_state": {"mixer": "based", **QKV, **GENERATED, "window": 2, "temperature": True},
    "performer": {"mixer": "performer", **QKV, "features": 5},
    "performer_q": {"mixer": "performer", **QKV, "conv_q": 3, "position": "rotary", "features": 16},
    "performer_k": {"mixer": "performer", **QKV, "conv_k": "full", "position": "learned", "features": 7},
    "performer_all": {"mixer": "performer", **QKV, **FILTERED, "position": "sinusoidal", "features": 6},
    "performer_state": {"mixer": "performer", **QKV, **GENERATED, "features": 6, "temperature": True},
    "delta": {"mixer": "delta", **QKV},
    "delta_q": {"mixer": "delta", **QKV, "conv_q": 3, "gate": True},
    "delta_k": {"mixer": "delta", **QKV, "conv_k": "full", "position": "learned"},
    "delta_all": {"mixer": "delta", **QKV, **UNSCALED, "position": "sinusoidal", "gate": True},
    "delta_state": {"mixer": "delta", **QKV, **GENERATED},
    "gla": {"mixer": "gla", **QKV, "gate_rank": 5},
    "gla_q": {"mixer": "gla", **QKV, "conv_q": 3, "gate_rank": 1, "output_gate": True},
    "gla_k": {"mixer": "gla", **QKV, "conv_k": "full", "position": "learned", "gate_rank": 7},
    "gla_all": {"mixer": "gla", **QKV, **UNSCALED, "position": "sinusoidal", "gate_rank": WIDTH, "output_gate": True},
    "gla_state": {"mixer": "gla", **QKV, **GENERATED, "gate_rank": 3},
    "hyena": {"mixer": "hyena", "conv_size": 3, "filter_size": 5},
    "hyena_small": {"mixer": "hyena", "conv_size": 1, "filter_size": 2},
    "mamba": {"mixer": "mamba"},
    "mamba_small": {"mixer": "mamba", "expand": 1, "state": 3, "conv_size": 2},
    "mamba_single": {"mixer": "mamba", "state": 1, "conv_size": 1},
}
ONE_PER_MIXER = [
    "attention_all",
    "linear_all",
    "landmark_all",
    "based_all",
    "performer_all",
    "delta_all",
    "gla_all",
    "hyena",
    "mamba",
]
CONVOLUTIONS = [name for name in BATTERY if name.startswith("attention_")] + ["landmark_summary", "landmark_summary_state"]
"""Every kind of convolution. The code is the same for all mixers with queries, keys and values."""
every_configuration = pytest.mark.parametrize("name", BATTERY)
one_per_mixer = pytest.mark.parametrize("name", ONE_PER_MIXER)
mixers_and_convolutions = pytest.mark.parametrize("name", dict.fromkeys([*ONE_PER_MIXER, *CONVOLUTIONS]))


def configure(**parameters: object) -> ModelConfig:
    return model_config(**{"width": WIDTH, "layers": 1, **parameters})


def build(parameters: dict[str, object], length: int) -> nn.Module:
    """Build a mixer in float64 with the same weights at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = configure(**parameters)
        return build_mixer(config.mixers[0], width=config.width, length=length).double()


def hidden(length: int, seed: int = 0) -> Tensor:
    return normal(BATCH, length, WIDTH, seed=seed)


def dependencies(mixer: nn.Module, length: int) -> Tensor:
    """Whether the output at token i depends on the input at token j: [i, j]."""
    x = hidden(length)[:1].requires_grad_()
    outputs = mixer(x)[0] @ normal(WIDTH, seed=1)
    return torch.stack([torch.autograd.grad(out, x, retain_graph=True)[0][0].abs().sum(-1) > 0 for out in outputs])


# Every mixer.


def test_the_battery_covers_every_mixer_and_every_switch():
    models = [configure(**parameters) for parameters in BATTERY.values()]
    assert {model.mixers[0].mixer for model in models} == set(mixer_names())
    assert sorted(BATTERY[name]["mixer"] for name in ONE_PER_MIXER) == sorted(mixer_names())
    for member in map(mixer_class, mixer_names()):
        configs = [model.mixers[0] for model in models if isinstance(model.mixers[0], member)]
        for name in set(member.model_fields) - {"heads"}:
            values = {getattr(config, name) for config in configs}
            assert len(values) > 1, f"{member.__name__}.{name} has one value only"


@one_per_mixer
@pytest.mark.parametrize("length", [1, 2, 13, 29])
def test_output_has_the_input_shape_at_any_length(name, length):
    assert build(BATTERY[name], 13)(hidden(length)).shape == (BATCH, length, WIDTH)


@every_configuration
def test_output_depends_on_all_earlier_tokens_and_no_later_token(name):
    length = 67  # longer than the chunks of linear attention and of the scan
    pattern, lower = dependencies(build(BATTERY[name], length), length), torch.ones(length, length).tril().bool()
    assert not (pattern & ~lower).any()
    if BATTERY[name]["mixer"] == "landmark":  # attends only to its own block and the chosen ones, tested below
        block = BATTERY[name]["block"]
        own = torch.block_diag(*[torch.ones(block, block).bool()] * length)[:length, :length]
        assert pattern[own & lower].all()
    else:
        assert pattern[lower].all()


@every_configuration
def test_outputs_at_positions_are_a_subset_of_all_outputs(name):
    lengths = [3, 29] if BATTERY[name]["mixer"] == "landmark" else [29]  # within one block of landmarks, and over several
    for length in lengths:
        mixer, positions = build(BATTERY[name], 29), torch.tensor([[0, 2], [1, length - 1]])
        x = hidden(length).requires_grad_()
        inputs = (x, *mixer.parameters())
        outputs = mixer(x, positions), mixer(x)[torch.arange(2)[:, None], positions]
        close(*outputs)
        cotangent = normal(BATCH, 2, WIDTH, seed=3)
        close(*(torch.autograd.grad(out, inputs, cotangent, materialize_grads=True) for out in outputs))


@pytest.mark.parametrize("name", [*ONE_PER_MIXER, "attention", "attention_v", "attention_sinusoidal"])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_projects_its_embeddings_if_tokens_are_many(name, layers):
    """Compare a model with a vocabulary of 5 on 29 tokens and the same model with 1,000 more, unused tokens."""
    config = configure(**BATTERY[name], mlp=2).model_copy(update={"layers": layers})
    small, large = (SequenceModel(config, vocabulary=size, length=29).double() for size in (5, 1005))
    large.load_state_dict(
        {
            n: F.pad(w, (0, 0, 0, 1000)) if n in ("embedding.token.weight", "head.weight") else w
            for n, w in small.state_dict().items()
        }
    )
    tokens, positions = torch.randint(5, (2, 29), generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 7], [0, 28]])
    projected = []
    for model in (small, large):
        first, project = model.blocks[0], model.blocks[0].project
        first.project = lambda x, project=project: projected.append(x.shape[:-1]) or project(x)
    logits = small.logits_at(tokens, positions)
    close(logits, small(tokens)[torch.arange(2)[:, None], positions])
    close(logits, large.logits_at(tokens, positions)[..., :5])
    added = small.embedding.scheme != "none"  # what is added to a token depends on its position
    assert projected == [(2, 29) if added else (5,)] * 2 + [(2, 29)]
    cotangent = normal(2, 2, 5, seed=1)
    gradients = [
        torch.autograd.grad(model.logits_at(tokens, positions)[..., :5], [*model.parameters()], cotangent, materialize_grads=True)
        for model in (small, large)
    ]
    close(gradients[0], tuple(g[: len(s)] if s.dim() else g for s, g in zip(*gradients, strict=True)))


@every_configuration
def test_every_weight_has_a_gradient(name):
    mixer = build(BATTERY[name], 13)
    (mixer(hidden(13)) * hidden(13, seed=1)).sum().backward()
    for weight, parameter in mixer.named_parameters():
        assert (parameter.grad != 0).all(), weight


@mixers_and_convolutions
def test_sequences_of_a_batch_are_independent(name):
    mixer, x = build(BATTERY[name], 13), hidden(29)
    close(mixer(x), torch.cat([mixer(sequence) for sequence in x.split(1)]))


@mixers_and_convolutions
def test_float32_agrees_with_float64(name):
    mixer, x = build(BATTERY[name], 29), hidden(29)
    expected = mixer(x).float()
    torch.testing.assert_close(mixer.float()(x.float()), expected, rtol=1e-4, atol=1e-5)


@mixers_and_convolutions
def test_bfloat16_agrees_roughly_with_float32(name):
    mixer, x = build(BATTERY[name], 29).float(), hidden(29).float()
    with torch.autocast("cpu", torch.bfloat16):
        rough = mixer(x)
    assert (rough - mixer(x)).norm() < 0.05 * mixer(x).norm()


@mixers_and_convolutions
@pytest.mark.parametrize("length", [29, 150])  # convolutions are matrix products at 29, FFTs at 150
def test_a_bfloat16_model_trains_in_bfloat16(name, length):
    mixer, x = build(BATTERY[name], length), hidden(length).bfloat16().requires_grad_()
    y = mixer.bfloat16()(x)
    y.float().square().sum().backward()
    assert {y.dtype, x.grad.dtype, *(p.grad.dtype for p in mixer.parameters() if p.grad is not None)} == {torch.bfloat16}
    assert y.isfinite().all()
    assert x.grad.isfinite().all()


@mixers_and_convolutions
@pytest.mark.parametrize("length", [29, 150])
def test_an_empty_batch_has_an_empty_output(name, length):
    x = torch.zeros(0, length, WIDTH, dtype=torch.float64)
    assert build(BATTERY[name], length)(x).shape == x.shape


@mixers_and_convolutions
def test_no_intermediate_gradient_is_nan(name):
    mixer, x = build(BATTERY[name], 29), hidden(50).requires_grad_()
    with torch.autograd.set_detect_anomaly(True):
        mixer(x).square().sum().backward()


@one_per_mixer
def test_a_model_keeps_the_initial_weights_of_its_mixer(name, monkeypatch):
    built = []

    def record(config, **sizes):
        mixer = build_mixer(config, **sizes)
        built.append({weight: value.clone() for weight, value in mixer.state_dict().items()})
        return mixer

    monkeypatch.setattr("cat.model.build_mixer", record)
    model = SequenceModel(configure(**BATTERY[name], mlp=2), vocabulary=11, length=13)
    for weight, value in model.blocks[0].mixer.state_dict().items():
        assert torch.equal(value, built[0][weight]), weight


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch maps over some of its own operations one by one
@mixers_and_convolutions
@pytest.mark.parametrize("length", [19, 131])
def test_vmap_computes_the_gradients_of_each_sequence(name, length):
    mixer = build(BATTERY[name], 13)
    weights = {weight: parameter.detach() for weight, parameter in mixer.named_parameters()}
    x = hidden(length)

    def loss(weights, sequence):
        return torch.func.functional_call(mixer, weights, (sequence[None],)).square().sum()

    gradients = torch.func.grad(loss, argnums=(0, 1))
    actual = torch.vmap(gradients, in_dims=(None, 0))(weights, x)
    for index, sequence in enumerate(x):
        expected_weights, expected_x = gradients(weights, sequence)
        close(actual[1][index], expected_x)
        for weight, gradient in expected_weights.items():
            close(actual[0][weight][index], gradient)


@every_configuration
@pytest.mark.parametrize("length", [1, 19])  # shorter than some kernels, and longer than `full` ones
def test_a_mixer_matches_its_reference_implementation(name, length, monkeypatch):
    mixer = build(BATTERY[name], 13)
    names = [weight for weight, _ in mixer.named_parameters()]

    def run(x, *weights):
        return torch.func.functional_call(mixer, dict(zip(names, weights, strict=True)), x)

    def run_reference(x, *weights):
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

    assert_matches_reference(run, run_reference, hidden(length), *mixer.parameters())


# Queries, keys and values.


@pytest.mark.parametrize("projection", "qkv")
def test_a_convolution_acts_on_its_own_projection(projection):
    convolved = build({**BATTERY["attention"], f"conv_{projection}": 2}, 13)
    plain = build(BATTERY["attention"], 13)
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


def test_kernels_start_near_the_identity_and_full_is_the_training_length():
    kernel = build({**BATTERY["attention"], "conv_q": "full"}, 13).filters["q"].kernel
    assert kernel.shape == (HEADS, 13)
    assert ((kernel - torch.eye(13)[0]).abs() < 0.2).all()


def test_a_normalized_kernel_is_divided_by_the_sum_of_its_absolute_values():
    filter_ = build({**BATTERY["attention"], "conv_k": 3, "filter_norm": True}, 13).filters["k"]
    x, kernel = normal(BATCH, HEADS, 13, 5), normal(HEADS, 3, seed=1)
    with torch.no_grad():
        filter_.kernel.copy_(kernel)
    close(filter_(x), naive_filter_heads(x, kernel / kernel.abs().sum(1, keepdim=True)))


def test_qk_norm_scales_after_the_convolution_and_adds_a_temperature():
    mixer = build(BATTERY["attention_all"], 13)
    q, k, _ = mixer.prepare(mixer.project(hidden(13)))
    close(k.norm(dim=-1), torch.ones(BATCH, HEADS, 13).double())
    torch.testing.assert_close(q.norm(dim=-1), torch.full((BATCH, HEADS, 13), 8.0).double())


@pytest.mark.parametrize("position", ["none", "rotary", "alibi"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_positions_and_the_scale_act_after_the_convolutions(position, qk_norm):
    mixer = build({**BATTERY["attention"], "conv_k": 3, "position": position, "qk_norm": qk_norm}, 13)
    q, k, v = mixer.prepare(mixer.project(hidden(13)))
    if position == "rotary":
        q, k = rotate(q), rotate(k)
    heads = naive_attend(q, k, v, scale=1.0 if qk_norm else (WIDTH // HEADS) ** -0.5, alibi=position == "alibi")
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.output.weight.T)


# Linear attention.


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 131])
def test_linear_attention_matches_its_reference_implementation(length, rotary):
    q, k, v = (normal(2, 3, length, 4, seed=s) for s in range(3))
    assert_matches_reference(partial(linear_attend, rotary=rotary), partial(naive_linear_attend, rotary=rotary), q, k, v)


def test_linear_attention_without_convolutions_matches_its_paper():
    mixer = build(BATTERY["linear"], 13)
    q, k, v = mixer.prepare(mixer.project(hidden(13)))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    heads = weights / weights.sum(-1, keepdim=True) @ v
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.output.weight.T)


def test_linear_attention_rotates_its_features():
    mixer = build({**BATTERY["linear"], "position": "rotary"}, 13)
    q, k, v = mixer.prepare(mixer.project(hidden(13)))
    weights = (rotate(F.elu(q) + 1) @ rotate(F.elu(k) + 1).mT).tril()
    total = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril().sum(-1, keepdim=True)
    heads = weights / total @ v
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.output.weight.T)


def test_features_stay_positive_if_elu_rounds_to_zero():
    x = torch.tensor([-50.0, -1.0, 0.0, 2.0, 200.0]).view(1, 1, 1, 5).requires_grad_()
    slopes = torch.autograd.grad(features(x).sum(), x)[0]
    assert features(x).flatten().tolist() == pytest.approx([math.exp(-50), math.exp(-1), 1, 3, 201], rel=1e-6, abs=0)
    assert slopes.flatten().tolist() == pytest.approx([math.exp(-50), math.exp(-1), 1, 1, 1], rel=1e-6, abs=0)


# Landmark attention.


@pytest.mark.parametrize("ratio", [0, 100])  # queries sorted by window, and one product with all windows
@pytest.mark.parametrize(("top", "reach"), [(1, 2), (2, 0), (2, 2), (2, 5), (7, 5)])
@pytest.mark.parametrize("length", [6, 10, 23])  # a single block is dense attention
@pytest.mark.parametrize("at_positions", [False, True])
def test_landmark_attention_matches_its_reference_implementation(length, top, reach, ratio, at_positions, monkeypatch):
    monkeypatch.setattr("cat.mixers.landmark.op.DENSE_RATIO", {"all": ratio, "positions": ratio})
    lengths = 3 if at_positions else length, length, length, length // 5
    inputs = [normal(2, 3, tokens, 7, seed=s) for s, tokens in enumerate(lengths)]
    positions = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 2, length - 1]]) if at_positions else None
    options = {"scale": 0.7, "block": 5, "top": top, "reach": reach, "positions": positions}
    assert_matches_reference(partial(landmark_attend, **options), partial(naive_landmark_attend, **options), *inputs)


@pytest.mark.parametrize(("block", "top"), [(23, 1), (3, 7), (5, 100), (1, 22)])
@pytest.mark.parametrize("position", ["none", "rotary"])
def test_landmark_attention_to_every_block_is_dense(block, top, position):
    options = {**QKV, "position": position, "conv_q": 3, "conv_k": "full", "conv_v": 2, "qk_norm": position == "rotary"}
    landmark = build({"mixer": "landmark", **options, "block": block, "top": top, "conv_summary": 3}, 23)
    dense = build({"mixer": "attention", **options}, 23)
    dense.load_state_dict({name: weight for name, weight in landmark.state_dict().items() if "summary" not in name})
    assert_matches_reference(landmark, dense, hidden(23))


@pytest.mark.parametrize("top", [1, 3])
def test_a_query_attends_to_its_own_block_and_the_best_earlier_blocks(top):
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


def test_blocks_overlap_by_the_reach_of_the_longest_kernel_and_at_most_a_block():
    filters = [
        {},
        {"conv_q": 2, "conv_v": 4},
        {"conv_k": 6},
        {"conv_k": "full"},
        {"conv_k": 3, "dilation": 2},
        {"conv_summary": 7},
    ]
    filters.append({"conv_k": "state", "filter_size": 2})
    assert [build({**LANDMARK, **filter_}, 13).reach for filter_ in filters] == [0, 3, 5, 5, 4, 0, 5]


@pytest.mark.parametrize(("dilation", "in_block"), [(1, 5), (2, 3), (5, 1)])
@pytest.mark.parametrize("sharing", ["head", "channel", "mixing"])
def test_a_summary_starts_as_the_sum_of_the_keys_of_a_block(sharing, dilation, in_block):
    mixer = build({**LANDMARK, "conv_k": 2, "conv_summary": 9, "sharing": sharing, "dilation": dilation}, 13)
    kernel = mixer.filters["summary"].kernel
    identity = torch.eye(HEADS)[..., None] if sharing == "mixing" else torch.ones(1)
    assert ((kernel[..., :in_block] - identity).abs() < 0.2).all()
    assert (kernel[..., in_block:].abs() < 0.2).all()
    k = mixer.convolve(mixer.project(hidden(13)))[1]
    landmarks = mixer.prepare(mixer.project(hidden(13)))[3]
    close(landmarks, mixer.filters["summary"](k)[:, :, [4, 9]])


def test_a_sum_of_keys_does_not_show_which_tokens_are_adjacent():
    mixer = build({**LANDMARK, "conv_k": 2, "conv_summary": 5}, 13)
    with torch.no_grad():
        mixer.filters["summary"].kernel.fill_(1)
    x = hidden(13)
    swapped = x[:, [0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 10, 11, 12]]  # inside the block of tokens 5 to 9
    landmarks = [mixer.prepare(mixer.project(tokens))[3][:, :, 1] for tokens in (x, swapped)]
    assert not torch.equal(mixer.prepare(mixer.project(x))[1], mixer.prepare(mixer.project(swapped))[1])
    close(*landmarks)


def test_a_summary_is_of_unscaled_keys_and_is_then_scaled():
    mixer = build({**LANDMARK, "conv_k": 2, "conv_summary": 5, "qk_norm": True}, 13)
    _, k, _ = mixer.convolve(mixer.project(hidden(13)))
    close(mixer.prepare(mixer.project(hidden(13)))[3], F.normalize(mixer.filters["summary"](k)[:, :, [4, 9]], dim=-1))
    plain = build({**LANDMARK, "conv_k": 2, "qk_norm": True}, 13)
    close(plain.prepare(plain.project(hidden(13)))[3], plain.prepare(plain.project(hidden(13)))[1][:, :, [4, 9]])


def test_landmarks_are_rotated_by_the_positions_of_the_last_tokens_of_their_blocks():
    mixer = build({**LANDMARK, "position": "rotary", "top": 1}, 23)
    q, k, v = (normal(1, HEADS, 23, WIDTH // HEADS, seed=s) for s in range(3))
    rotated = rotate(k)
    sizes = {"scale": mixer.scale, "block": mixer.block, "top": 1, "reach": 0}
    close(mixer.attend(q, k, v), naive_landmark_attend(rotate(q), rotated, v, block_ends(rotated, mixer.block), **sizes))


def test_a_better_matching_landmark_gives_its_block_more_attention():
    q, k, v = torch.zeros(3, 1, 1, 7, 2).double()
    q[..., 6, 0], v[..., :2, 0] = 1, 1  # the last query chooses one of three blocks of two tokens; only block 0 has values
    shares = []
    for match in (1.0, 2.0):
        k[..., 1, 0] = match
        shares.append(landmark_attend(q, k, v, block_ends(k, 2), scale=1.0, block=2, top=1, reach=0)[0, 0, 6, 0].item())
    assert shares == pytest.approx([math.e / (math.e + 1), math.e**2 / (math.e**2 + 1)])


@pytest.mark.parametrize("group", [[0], [0] * 7, [2] * 21 + [4, 1], [4, 1, 4, 4, 0, 1, 4, 4, 3, 4, 4], [2, 2, 1]])
def test_each_row_has_its_own_place_in_a_tile_of_its_group(group):
    groups = 5
    place, owner, size = in_tiles(torch.tensor(group), groups)
    assert owner[place // size].tolist() == group
    assert len(set(place.tolist())) == len(group)
    assert len(owner) * size <= 4 / 3 * len(group) + groups


# Mamba.


@pytest.mark.parametrize("chunk", [1, 7, None])  # tokens
@pytest.mark.parametrize("length", [1, 2, 7, 8, 47])
def test_the_selective_scan_matches_its_reference_implementation(length, chunk, monkeypatch):
    if chunk is not None:
        monkeypatch.setitem(MAX_CHUNK_ELEMENTS, "cpu", chunk * 2 * 5 * 3)
    x, delta, a = normal(2, length, 5), normal(2, length, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    inputs = x, delta, a, normal(2, length, 3, seed=3), normal(2, length, 3, seed=4)
    assert_matches_reference(selective_scan, naive_selective_scan, *inputs)
    with torch.no_grad():  # the states are not kept
        close(selective_scan(*inputs), naive_selective_scan(*inputs))


@pytest.mark.parametrize("parts", [[1] * 5, [9, 1, 20]], ids=str)
def test_the_selective_scan_continues_from_a_state(parts, monkeypatch):
    monkeypatch.setitem(MAX_CHUNK_ELEMENTS, "cpu", 7 * 2 * 5 * 3)
    length = sum(parts)
    x, delta, a = normal(2, length, 5), normal(2, length, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    b, c = normal(2, length, 3, seed=3), normal(2, length, 3, seed=4)

    def stepwise(x, delta, a, b, c):
        def step(x, delta, b, c, state):
            return selective_scan_step(x, delta, a, b, c, state=state)

        return in_parts(step, (x, delta, b, c), parts, dim=1)[0]

    assert_matches_reference(stepwise, naive_selective_scan, x, delta, a, b, c)
    with torch.no_grad():  # the states are not kept
        close(stepwise(x, delta, a, b, c), naive_selective_scan(x, delta, a, b, c))


@pytest.fixture
def mamba_ssm(monkeypatch):
    """A fake mamba_ssm kernel: the reference scan in its layout, (B, E, L) and (B, S, L) for vectors, all of one dtype."""

    def kernel(u, delta, a, b, c):
        assert u.shape == delta.shape == (len(u), len(a), u.shape[2])
        assert b.shape == c.shape == (len(u), a.shape[1], u.shape[2])
        assert {t.dtype for t in (u, delta, b, c)} == {a.dtype}
        return naive_selective_scan(u.mT, delta.mT, a, b.mT, c.mT).mT

    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", SimpleNamespace(selective_scan_fn=kernel))
    fused_scan.cache_clear()
    yield kernel
    fused_scan.cache_clear()


def test_the_kernel_of_mamba_ssm_is_used_on_a_gpu_for_supported_states(mamba_ssm):
    assert fused_scan("cuda", torch.float32, 16) is mamba_ssm
    assert fused_scan("cuda", torch.float32, 256) is mamba_ssm
    assert fused_scan("cuda", torch.float32, 257) is None
    assert fused_scan("cuda", torch.float64, 16) is None
    assert fused_scan("cpu", torch.float32, 16) is None


def test_without_mamba_ssm_no_kernel_is_used(mamba_ssm, monkeypatch):
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", None)  # as if it is not installed
    assert fused_scan("cuda", torch.float32, 16) is None


def test_the_kernel_of_mamba_ssm_gets_its_own_layout(mamba_ssm, monkeypatch):
    calls = []
    monkeypatch.setattr("cat.mixers.mamba.op.fused_scan", lambda *arguments: calls.append(arguments) or mamba_ssm)
    x, delta, a = normal(2, 7, 5), normal(2, 7, 5, seed=1).exp(), -normal(5, 3, seed=2).exp()
    b, c = normal(2, 7, 3, seed=3), normal(2, 7, 3, seed=4)
    assert_matches_reference(selective_scan, naive_selective_scan, x, delta, a, b, c)
    assert calls == [("cpu", torch.float64, 3)]

    rough = [t.bfloat16() for t in (x, delta, b, c)]
    exact = [t.double() for t in rough]
    close(selective_scan(*rough[:2], a, *rough[2:]), naive_selective_scan(*exact[:2], a, *exact[2:]))


def test_a_state_without_decay_is_a_sum():
    x, ones = normal(2, 37, 5), torch.ones(2, 37, 1).double()
    close(selective_scan(x, torch.ones_like(x), torch.zeros(5, 1).double(), ones, ones), x.cumsum(1))


def test_mamba_starts_with_the_rates_and_steps_of_its_paper():
    mixer = build({"mixer": "mamba", "width": 1000}, 13)
    torch.testing.assert_close(-mixer.log_rate.exp(), -torch.arange(1.0, 17.0).double().expand(2000, 16))
    assert (mixer.skip == 1).all()
    steps = F.softplus(mixer.dt_proj.bias)
    assert [steps.min().item(), steps.max().item()] == pytest.approx([0.001, 0.1], abs=0.0005)
    assert steps.mean().item() == pytest.approx(0.0505, abs=0.003)


def test_mamba_has_its_configured_sizes():
    mixer = build({"mixer": "mamba", "expand": 3, "state": 5, "conv_size": 7}, 13)
    assert mixer.log_rate.shape == (3 * WIDTH, 5)
    assert mixer.convolution.weight.shape == (3 * WIDTH, 1, 7)


def test_a_state_has_the_precision_of_the_weights():
    ones = torch.ones(1, 8191, 1, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        sums = selective_scan(ones, ones, torch.zeros(1, 1), ones, ones)
    assert sums[0, -1].item() == pytest.approx(8191, rel=0.01)  # in bfloat16, 4096 + 16 is 4096


def test_mamba_has_a_gate_a_skip_connection_and_a_convolution():
    mixer = build(BATTERY["mamba"], 13)
    x = hidden(13)
    u, gate = (x @ mixer.input.weight.T).chunk(2, dim=-1)
    kernel = mixer.convolution.weight[:, 0].flip(1)  # PyTorch's conv1d is a correlation: its last value is lag 0
    u = F.silu(naive_filter_heads(u.mT[..., None], kernel)[..., 0].mT + mixer.convolution.bias)
    step, b, c = (u @ mixer.selection.weight.T).split([2, 16, 16], dim=-1)
    delta = F.softplus(step @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    y = naive_selective_scan(u, delta, -mixer.log_rate.exp(), b, c) + mixer.skip * u
    close(mixer(x), (y * F.silu(gate)) @ mixer.output.weight.T)


# Hyena.


def test_hyena_is_a_gated_long_convolution_after_a_short_one():
    mixer, x = build(BATTERY["hyena"], 13), hidden(29)
    convolved = naive_filter_channels((x @ mixer.projection.weight.T)[:, None], mixer.short.kernel)[:, 0]
    q, k, v = convolved.split(WIDTH, dim=-1)
    long = naive_filter_channels((k * v)[:, None], mixer.long.response(29))[:, 0]
    close(mixer(x), (q * long) @ mixer.output.weight.T)


def test_hyena_starts_with_a_short_identity_kernel_and_a_long_random_kernel_per_channel():
    mixer = build({**BATTERY["hyena"], "conv_size": 4}, 13)
    assert mixer.short.kernel.shape == (1, 3 * WIDTH, 4)
    assert ((mixer.short.kernel - torch.eye(4)[0]).abs() < 0.3).all()
    assert mixer.long.response(29).shape == (1, WIDTH, 29)
    assert not mixer.long.direct.any()


# Parameters.

CAT = {"mixer": "attention", "width": 64, "heads": 1, "position": "none", "qk_norm": True, "conv_q": 4, "conv_k": 4}
FAST_WEIGHTS = {"width": 64, "heads": 1}
EQUAL_SIZE = {
    "transformer": {**CAT, "conv_q": None, "conv_k": None},
    "qkv": {**CAT, "conv_v": 4},
    "full": {**CAT, "conv_q": "full", "conv_k": "full"},
    "channel": {**CAT, "sharing": "channel", "filter_bias": True},
    "mixing": {**CAT, "heads": 2, "sharing": "mixing"},
    "network": {**CAT, "conv_q": "network", "conv_k": "network", "filter_size": 16},
    "decay": {**CAT, "conv_q": "decay", "conv_k": "decay", "filter_size": 4},
    "state": {**CAT, "conv_q": "state", "conv_k": "state", "filter_size": 4},
    "state per channel": {**CAT, "conv_q": "state", "conv_k": "state", "filter_size": 4, "sharing": "channel"},
    "landmark": {**CAT, "mixer": "landmark", "conv_summary": 16, "block": 16, "top": 4},
    "linear": {**CAT, "mixer": "linear", "conv_q": None, "conv_k": None, "qk_norm": False},
    "lincat": {**CAT, "mixer": "linear", "qk_norm": False},
    "based": {**CAT, "mixer": "based", "window": 8, "conv_q": None, "conv_k": None, "qk_norm": False},
    "performer": {**CAT, "mixer": "performer", "features": 64, "conv_q": None, "conv_k": None, "qk_norm": False},
    "delta": {**FAST_WEIGHTS, "mixer": "delta", "conv_q": 4, "conv_k": 4, "conv_v": 4, "sharing": "channel"},
    "gated delta": {**FAST_WEIGHTS, "mixer": "delta", "conv_q": 4, "conv_k": 4, "conv_v": 4, "sharing": "channel", "gate": True},
    "gla": {**FAST_WEIGHTS, "mixer": "gla", "gate_rank": 16},
    "mamba": {"mixer": "mamba", "width": 64, "expand": 1},
    "hyena": {"mixer": "hyena", "width": 64, "conv_size": 4, "filter_size": 32},
}
"""One layer of width 64 at a training length of 128."""
LARGER_SIZE = {
    "mamba": {"mixer": "mamba", "width": 64},  # three linear maps of 2 D channels, 6 D^2 weights; attention has 4 D^2
    "full per channel": {**CAT, "conv_q": "full", "conv_k": "full", "sharing": "channel"},  # 2 L D kernel values
    "learned": {**CAT, "position": "learned"},  # L D position weights
}


def count_parameters(parameters: dict[str, object]) -> int:
    """Parameters of a whole model with a vocabulary of 64 keys, 64 values, BOS and a blank."""
    model = SequenceModel(configure(**parameters), vocabulary=130, length=128)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", EQUAL_SIZE)
def test_a_baseline_has_about_as_many_parameters_as_cat(name):
    assert count_parameters(EQUAL_SIZE[name]) == pytest.approx(count_parameters(CAT), rel=0.1)


@pytest.mark.parametrize("name", LARGER_SIZE)
def test_these_have_more_parameters_and_are_no_equal_baselines(name):
    assert count_parameters(LARGER_SIZE[name]) > 1.2 * count_parameters(CAT)


def test_every_mixer_has_a_baseline_of_the_size_of_cat():
    assert {parameters["mixer"] for parameters in EQUAL_SIZE.values()} == set(mixer_names())


# Refused configurations.


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({**BATTERY["linear"], "position": "alibi"}, "position = alibi needs a softmax"),
        ({**LANDMARK, "position": "alibi"}, "position = alibi would choose landmarks by distance"),
        ({"mixer": "landmark", **QKV, "block": 5}, "top"),
        ({"mixer": "landmark", **QKV, "top": 5}, "block"),
        ({**BATTERY["mamba"], "heads": 3}, "heads: unknown key"),
        ({**BATTERY["linear"], "heads": 4}, "heads = 4 does not divide width = 18"),
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
        ({**BATTERY["linear"], "conv_v": 33}, "conv_v = 33 is longer than the training length of 32"),
        ({**BATTERY["mamba"], "conv_size": 33}, "conv_size = 33 is longer than the training length of 32"),
    ],
)
def test_a_kernel_or_block_longer_than_its_sequences_is_refused(parameters, message):
    config = configure(**parameters)
    config.check_length(64)
    with pytest.raises(ValueError, match=message):
        SequenceModel(config, vocabulary=11, length=32)


@mixers_and_convolutions
def test_shapes_are_computed_on_the_meta_device(name):
    model = build_model(configure(**BATTERY[name]), vocabulary=16, length=64, seed=0).to("meta")
    logits = model(torch.zeros(2, 64, dtype=torch.long, device="meta"))
    logits.sum().backward()
    assert logits.shape == (2, 64, 16)


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
    projected = torch.randn(2, 97, mixer.projection.out_features, generator=torch.Generator().manual_seed(0)).double()
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
