"""Steps with a cache against the forward pass of the whole sequence, and sampling."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from cat.evaluation.generation import choose, generate
from cat.mixers.attention.config import AttentionConfig
from cat.mixers.base import Cache, Mixer
from cat.mixers.qkv import QKVMixer
from cat.model import SequenceModel
from cat.ops.attention import attend_last, naive_attend
from cat.ops.position import gather_positions
from tests.helpers.mixers import EXAMPLES, HEADS, ONE_PER_MIXER, QKV, WIDTH, build, configure, hidden
from tests.helpers.reference import close, naive_continuation, normal

VOCABULARY, LENGTH = 61, 13
ATTENTION, LINEAR = {"mixer": "attention", **QKV}, {"mixer": "linear", **QKV}
FILTERS = {
    "mixing": {
        "conv_q": 4,
        "conv_k": 3,
        "conv_v": 2,
        "sharing": "mixing",
        "filter_bias": True,
        "filter_norm": True,
        "position": "rotary",
    },
    "dilated": {
        "conv_q": 3,
        "conv_k": 4,
        "conv_v": 2,
        "dilation": 4,
        "sharing": "channel",
        "position": "alibi",
        "temperature": True,
    },
    "full": {
        "conv_q": "full",
        "conv_k": "full",
        "conv_v": "full",
        "filter_bias": True,
        "qk_norm": True,
        "position": "sinusoidal",
    },
    "generated": {
        "conv_q": "network",
        "conv_k": "state",
        "conv_v": "decay",
        "filter_size": 3,
        "sharing": "mixing",
        "position": "learned",
    },
    "channels": {
        "conv_q": "decay",
        "conv_k": "network",
        "conv_v": "state",
        "filter_size": 3,
        "sharing": "channel",
        "filter_init": "random",
    },
    "sums": {"conv_q": 3, "conv_k": "state", "conv_v": "decay", "filter_size": 3, "filter_norm": True, "position": "rotary"},
}
BLOCKS = {"mixer": "landmark", **QKV, "block": 4, "top": 1}
MODELS = {
    **{name: EXAMPLES[name] for name in ONE_PER_MIXER},
    "landmark_summary": {**BLOCKS, "conv_k": 3, "conv_summary": "state", "filter_size": 3, "qk_norm": True, "position": "rotary"},
    "landmark_dilated": {
        **BLOCKS,
        "conv_q": 2,
        "conv_v": 2,
        "conv_summary": 3,
        "dilation": 2,
        "sharing": "mixing",
        "filter_bias": True,
    },
    **{f"cat_{name}": {**ATTENTION, **filters} for name, filters in FILTERS.items()},
    **{f"lincat_{name}": {**LINEAR, **filters} for name, filters in FILTERS.items() if filters.get("position") != "alibi"},
}

CAT = [name for name in MODELS if name.startswith(("cat_", "lincat_"))]


def model_of(parameters: dict[str, object]) -> SequenceModel:
    """Two layers in float64, with weights large enough that attention is not uniform."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = configure(**parameters, mlp=2).model_copy(update={"layers": 2})
        model = SequenceModel(config, vocabulary=VOCABULARY, length=LENGTH).double()
        for parameter in model.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
    return model.requires_grad_(requires_grad=False)


def tokens(length: int) -> Tensor:
    """Two sequences of different tokens. Between two equal landmarks, rounding would decide."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(VOCABULARY, generator=generator)[:length] for _ in range(2)])


def stepwise(model: SequenceModel, sequence: Tensor, parts: list[int]) -> Tensor:
    """The logits after each part of the sequence, with a cache."""
    logits, caches = [], ()
    for part in sequence.split(parts, dim=1):
        last, caches = model.step(part, caches)
        logits.append(last)
    return torch.stack(logits, dim=1)


def assert_steps_equal_forward(model: SequenceModel, sequence: Tensor, parts: list[int]) -> None:
    expected = model(sequence)[:, [end - 1 for end in accumulate(parts)]]
    torch.testing.assert_close(stepwise(model, sequence, parts), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_and_prefixes_equal_the_forward_pass(name):
    model, sequence = model_of(MODELS[name]), tokens(LENGTH)
    assert_steps_equal_forward(model, sequence, [1, 1, 4, 1, 1, 3, 1, 1])
    torch.testing.assert_close(model(sequence[:, :-1]), model(sequence)[:, :-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].get("position") != "learned"])
def test_cached_steps_equal_the_forward_pass_beyond_the_training_length(name):
    assert_steps_equal_forward(model_of(MODELS[name]), tokens(2 * LENGTH + 4), [LENGTH - 2, 1, 1, 1, 1, LENGTH, 1, 1])


@pytest.mark.parametrize("name", ["cat_mixing", "lincat_channels", *ONE_PER_MIXER])
def test_cached_steps_equal_the_forward_pass_with_projection_look_up(name):
    model = model_of(MODELS[name])
    sequence = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    assert model.embedding_table(sequence[:, :35])[1] is not None
    assert_steps_equal_forward(model, sequence, [35, 1, 4])


@pytest.mark.parametrize("name", ["attention", "attention_q", "attention_all", "attention_mixing"])
def test_attention_caches_keys_values_and_the_inputs_of_its_filters(name):
    mixer = build(EXAMPLES[name], LENGTH)
    x, cache = mixer.project(hidden(LENGTH + 3)), Cache()
    receptive_fields = {name: (f.kernel.shape[-1] - 1) * f.dilation for name, f in mixer.filters.items()}
    for length, token in enumerate(x.split(1, dim=1), start=1):
        out, cache = mixer.step(token, cache)
        inputs = {projection: min(length, size) for projection, size in receptive_fields.items()}
        assert {name: state.shape[2] for name, state in cache.state.items()} == {"keys": length, "values": length, **inputs}
        assert cache.length == length
    close(out, mixer.mix(x)[:, -1:])


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({**LINEAR, "position": "rotary"}, {"keys": (3, 1, 6), "products": (3, 6, 6)}),
        ({"mixer": "performer", **QKV, "features": 7}, {"log_max": (3, 1, 1), "products": (3, 7, 7)}),
        ({"mixer": "delta", **QKV, "conv_q": None, "conv_v": None}, {"state": (3, 6, 6)}),
        ({"mixer": "gla", **QKV, "gate_rank": 2, "key_width": "full"}, {"state": (3, 6, 6)}),
        ({"mixer": "mamba", "conv_size": 3, "state": 5}, {"state": (36, 5), "inputs": (2, 36)}),
    ],
    ids=lambda given: given.get("mixer", ""),
)
def test_the_state_of_a_recurrence_does_not_grow(config, sizes):
    filters = {} if config["mixer"] == "mamba" else {"conv_k": 3}
    mixer, inputs = build({**config, **filters}, LENGTH), {"k": (3, 2, 6)} if filters else {}
    for parts in ([5], [1] * 5, [50], [4, 46]):
        cache = Cache()
        for part in mixer.project(hidden(sum(parts))).split(parts, dim=1):
            _, cache = mixer.step(part, cache)
        assert {name: tuple(state.shape[1:]) for name, state in cache.state.items()} == {**sizes, **inputs}


@pytest.mark.parametrize("name", MODELS)
def test_last_computes_the_last_output_and_the_same_cache(name):
    mixer = build(MODELS[name], LENGTH)
    x, cache = mixer.project(hidden(LENGTH)), Cache()
    for part in x.split([7, 4, 2], dim=1):
        last, last_cache = mixer.step(part, cache, last=True)
        out, cache = mixer.step(part, cache)
        close(last, out[:, -1:])
        close(tuple(last_cache.state.values()), tuple(cache.state.values()))


@pytest.mark.parametrize("name", MODELS)
def test_cached_steps_under_autocast_are_close_to_float32(name):
    model, sequence = model_of(MODELS[name]).float(), tokens(LENGTH)
    exact = stepwise(model, sequence, [6, 1, 1, 5])
    with torch.autocast("cpu", torch.bfloat16):
        rough = stepwise(model, sequence, [6, 1, 1, 5])
    assert (rough - exact).norm() < 0.2 * exact.norm()


def test_a_step_does_not_change_its_cache():
    for name in ("attention_all", "linear_all", "mamba"):
        model, sequence = model_of(EXAMPLES[name]), tokens(LENGTH)
        _, caches = model.step(sequence[:, :9])
        first, _ = model.step(sequence[:, 9:12], caches)
        model.step(sequence[:, 12:], caches)
        close(model.step(sequence[:, 9:12], caches)[0], first)


def test_a_mixer_without_a_cache_of_its_own_caches_projections():
    class Means(Mixer):
        def project(self, x):
            return 2 * x

        def mix(self, projected, positions=None):
            count = torch.arange(1, projected.shape[1] + 1)[:, None]
            return gather_positions(projected.cumsum(1) / count, positions)

    mixer, x, cache = Means(), hidden(9), Cache()
    outputs = []
    for part in x.split([1, 5, 3], dim=1):
        last, _ = mixer.step(mixer.project(part), cache, last=True)
        out, cache = mixer.step(mixer.project(part), cache)
        close(last, out[:, -1:])
        outputs.append(out)
    close(torch.cat(outputs, dim=1), mixer(x))
    close(cache.state["projected"], 2 * x)


def test_a_mixer_with_heads_needs_no_step_of_its_own():
    class Averages(QKVMixer):
        def attend(self, q, k, v, *, positions=None):
            count = torch.arange(1, v.shape[2] + 1)[:, None]
            return gather_positions(v.cumsum(2) / count, positions)

    mixer = Averages(AttentionConfig(heads=HEADS, conv_v=3), width=WIDTH, length=LENGTH).double()
    x, cache, outputs = mixer.project(hidden(9)), Cache(), []
    for part in x.split([1, 5, 3], dim=1):
        out, cache = mixer.step(part, cache)
        outputs.append(out)
    close(torch.cat(outputs, dim=1), mixer.mix(x))


@pytest.mark.parametrize("count", [1, 3, 13])
@pytest.mark.parametrize("options", [{}, {"slopes": torch.tensor([0.5, 0.3, 0.1])}, {"window": 4}], ids=["", "alibi", "window"])
def test_attention_of_the_last_tokens_equals_the_reference(count, options):
    q, k, v = (normal(2, 3, 13, 5, seed=seed) for seed in range(3))
    expected = naive_attend(q, k, v, scale=0.7, **options)[:, :, -count:]
    close(attend_last(q[:, :, -count:], k, v, scale=0.7, **options), expected)


def test_learned_positions_refuse_longer_sequences():
    model, sequence = model_of({**ATTENTION, "position": "learned"}), tokens(LENGTH + 1)
    _, caches = model.step(sequence[:, :-1])
    for call in (
        lambda: model.step(sequence[:, -1:], caches),
        lambda: model.step(sequence),
        lambda: generate(model, sequence[:, :9], LENGTH - 7),
    ):
        with pytest.raises(ValueError, match=f"learned positions reach {LENGTH} tokens"):
            call()
    assert len(list(generate(model, sequence[:, :9], LENGTH - 8))) == LENGTH - 8


# Sampling.


@pytest.mark.parametrize("name", [*CAT, *ONE_PER_MIXER])
def test_greedy_sampling_equals_the_reference(name):
    model, prompt = model_of(MODELS[name]), tokens(5)
    continuation = torch.stack(list(generate(model, prompt, LENGTH - 5)), dim=1)
    assert continuation.tolist() == naive_continuation(model, prompt, LENGTH - 5).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_prompts_of_unequal_length_continue_as_if_alone(name, side):
    model, prompts, count = model_of(MODELS[name]), tokens(8), 5
    lengths = (3, 8)
    column = torch.arange(8)
    mask = torch.stack([column < length if side == "right" else column >= 8 - length for length in lengths])
    continuation = torch.stack(list(generate(model, prompts, count, attention_mask=mask)), dim=1)
    for row, own in enumerate(mask):
        assert continuation[row].tolist() == naive_continuation(model, prompts[row : row + 1, own], count)[0].tolist()


def test_learned_positions_count_the_tokens_of_a_prompt_without_its_padding():
    model, prompts = model_of({**ATTENTION, "position": "learned"}), tokens(LENGTH + 4)
    mask = torch.arange(LENGTH + 4).expand(2, -1) >= 8
    continuation = list(generate(model, prompts, LENGTH - 8, attention_mask=mask))
    assert torch.stack(continuation, dim=1).tolist() == naive_continuation(model, prompts[:, 8:], LENGTH - 8).tolist()
    for call in (
        lambda: generate(model, prompts, 6, attention_mask=mask),
        lambda: model.step(prompts, attention_mask=mask | (torch.arange(LENGTH + 4) >= 2)),
    ):
        with pytest.raises(ValueError, match=f"learned positions reach {LENGTH} tokens"):
            call()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", [*ONE_PER_MIXER, "cat_mixing", "cat_generated"])
def test_beam_search_with_reordered_caches_equals_recomputation(name, padded):
    model, prompts, beams = model_of(MODELS[name]), tokens(6), 3
    mask = torch.tensor([[0] * 3 + [1] * 3, [1] * 6]) if padded else None
    logits, caches = model.step(prompts, attention_mask=mask)
    parents = torch.arange(2).repeat_interleave(beams)
    caches = [cache.reorder(parents) for cache in caches]
    best = logits.log_softmax(-1).topk(beams)
    scores, sequences = best.values.flatten(), torch.cat([prompts[parents], best.indices.view(-1, 1)], dim=1)
    for _ in range(4):
        logits, caches = model.step(sequences[:, -1:], caches)
        candidates = (scores[:, None] + logits.log_softmax(-1)).unflatten(0, (2, beams)).flatten(1)
        best = candidates.topk(beams)
        parents = (torch.arange(2)[:, None] * beams + best.indices // VOCABULARY).flatten()
        sequences = torch.cat([sequences[parents], (best.indices % VOCABULARY).view(-1, 1)], dim=1)
        scores, caches = best.values.flatten(), [cache.reorder(parents) for cache in caches]
    for n, sequence in enumerate(sequences):
        own = sequence[None, 3 if padded and n < beams else 0 :]
        expected = model(own)[0, -6:-1].log_softmax(-1).gather(1, own[0, -5:, None]).sum()
        close(scores[n], expected)
    assert len({tuple(sequence.tolist()) for sequence in sequences}) == 2 * beams


def test_tokens_are_drawn_from_the_softmax_and_reproducible():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, -30.0]).double()

    def frequencies(**options):
        generator = torch.Generator().manual_seed(3)
        drawn = choose(logits.expand(40_000, -1), generator=generator, **options)
        assert torch.equal(drawn, choose(logits.expand(40_000, -1), generator=generator.manual_seed(3), **options))
        return drawn.bincount(minlength=5) / 40_000

    for temperature in (1.0, 0.5, 3.0):
        expected = (logits / temperature).softmax(-1)
        torch.testing.assert_close(frequencies(temperature=temperature).double(), expected, rtol=0, atol=0.012)
    top = logits.masked_fill(torch.tensor([True, False, True, False, True]), float("-inf")).softmax(-1)
    torch.testing.assert_close(frequencies(temperature=1.0, top_k=2).double(), top, rtol=0, atol=0.012)
    for deterministic in ({"temperature": 0.0}, {"temperature": 1e-310}, {"temperature": 2.0, "top_k": 1}):
        assert frequencies(**deterministic).tolist() == [0, 1, 0, 0, 0]


def test_the_global_random_state_is_unchanged():
    model, before = model_of(EXAMPLES["attention_k"]), torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first, again, other = (
        torch.stack(list(generate(model, tokens(4), 9, temperature=2.0, top_k=7, generator=generator.manual_seed(seed))))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("prompt", "count", "options", "message"),
    [
        (3, 0, {}, "0 tokens after a prompt of 3"),
        (0, 3, {}, "3 tokens after a prompt of 0"),
        (3, 3, {"temperature": -0.5}, "temperature = -0.5"),
        (3, 3, {"temperature": float("nan")}, "temperature = nan"),
        (3, 3, {"top_k": 0}, "top_k = 0"),
    ],
)
def test_invalid_arguments_are_refused_before_the_first_token(prompt, count, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model_of(ATTENTION), tokens(prompt), count, **options)


def test_logits_that_are_not_finite_are_refused():
    model = model_of(ATTENTION)
    model.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        next(generate(model, tokens(3), 3))
