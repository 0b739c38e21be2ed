"""What is read token by token, with a memory of the tokens before, is what the whole sequence has; and what comes of choices."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from cat.evaluation.generation import choose, generate
from cat.mixers.base import Cache, Mixer
from cat.model import SequenceModel
from cat.ops.attention import attend_last, naive_attend
from cat.ops.position import gather_positions
from tests.cat.mixers.test_mixers import BATTERY, STREAMS, build, configure, hidden
from tests.helpers.reference import close, naive_continuation, normal

VOCABULARY, LENGTH = 61, 13
ATTENTION, LINEAR = {"mixer": "attention", **STREAMS}, {"mixer": "linear", **STREAMS}
FILTERS = {
    "mixing": {"q": 4, "k": 3, "v": 2, "sharing": "mixing", "filter_bias": True, "filter_norm": True, "position": "rotary"},
    "dilated": {"q": 3, "k": 4, "v": 2, "dilation": 4, "sharing": "channel", "position": "alibi", "temperature": True},
    "full": {"q": "full", "k": "full", "v": "full", "filter_bias": True, "qk_norm": True, "position": "sinusoidal"},
    "generated": {"q": "network", "k": "state", "v": "decay", "filter_size": 3, "sharing": "mixing", "position": "learned"},
    "channels": {"q": "decay", "k": "network", "v": "state", "filter_size": 3, "sharing": "channel", "filter_init": "random"},
    "sums": {"q": 3, "k": "state", "v": "decay", "filter_size": 3, "filter_norm": True, "position": "rotary"},
}
BLOCKS = {"mixer": "landmark", **STREAMS, "block": 4, "top": 1}
MODELS = {
    **BATTERY,
    "landmark_summary": {**BLOCKS, "k": 3, "summary": "state", "filter_size": 3, "qk_norm": True, "position": "rotary"},
    "landmark_dilated": {**BLOCKS, "q": 2, "v": 2, "summary": 3, "dilation": 2, "sharing": "mixing", "filter_bias": True},
    **{f"cat_{name}": {**ATTENTION, **filters} for name, filters in FILTERS.items()},
    **{f"lincat_{name}": {**LINEAR, **filters} for name, filters in FILTERS.items() if filters.get("position") != "alibi"},
}

OWN = [name for name in MODELS if name.startswith(("cat_", "lincat_"))]


def model_of(parameters: dict[str, object]) -> SequenceModel:
    """Two layers in float64, with weights large enough for attention to choose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = configure(**parameters, mlp=2).model_copy(update={"layers": 2})
        model = SequenceModel(config, vocabulary=VOCABULARY, length=LENGTH).double()
        for parameter in model.parameters():
            parameter.data += 0.5 * torch.randn_like(parameter)
    return model.requires_grad_(requires_grad=False)


def tokens(length: int) -> Tensor:
    """Two sequences in which none is there twice: of two equal landmarks, rounding would choose."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(VOCABULARY, generator=generator)[:length] for _ in range(2)])


def stepwise(model: SequenceModel, read: Tensor, parts: list[int]) -> Tensor:
    """The logits after each of the parts in which a sequence is read."""
    logits, memories = [], ()
    for part in read.split(parts, dim=1):
        last, memories = model.step(part, memories)
        logits.append(last)
    return torch.stack(logits, dim=1)


def whole(model: SequenceModel, read: Tensor, ends: list[int]) -> Tensor:
    """The logits at these ends of its parts, all read at once."""
    return model(read)[:, [end - 1 for end in ends]]


@pytest.mark.parametrize("parts", [[1] * LENGTH, [6, 1, 1, 3, 1, 1]], ids=["one", "several"])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_in_parts_has_the_logits_of_the_whole(name, parts):
    model, read = model_of(MODELS[name]), tokens(LENGTH)
    expected = whole(model, read, list(accumulate(parts)))
    torch.testing.assert_close(stepwise(model, read, parts), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].get("position") != "learned"])
def test_it_goes_on_beyond_the_training_length(name):
    model, read = model_of(MODELS[name]), tokens(2 * LENGTH + 4)
    parts = [LENGTH - 2, 1, 1, 1, 1, LENGTH, 1, 1]
    expected = whole(model, read, list(accumulate(parts)))
    torch.testing.assert_close(stepwise(model, read, parts), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["cat_mixing", "lincat_channels", "mamba", "gla"])
def test_what_is_read_is_looked_up_where_tokens_are_many(name):
    model = model_of(MODELS[name])
    read = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    assert model.project_embeddings(read[:, :35]) is not None
    parts = [35, 1, 4]
    torch.testing.assert_close(stepwise(model, read, parts), whole(model, read, list(accumulate(parts))), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_the_logits_of_a_sequence_are_those_of_a_longer_one_that_begins_with_it(name):
    model, read = model_of(MODELS[name]), tokens(LENGTH)
    torch.testing.assert_close(model(read[:, :-1]), model(read)[:, :-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["attention", "attention_q", "attention_all", "attention_mixing", "cat_dilated"])
def test_attention_keeps_a_key_and_a_value_a_token_and_what_its_filters_see_next(name):
    mixer = build(MODELS[name], LENGTH)
    x, memory = mixer.project(hidden(LENGTH + 3)), Cache()
    reach = {stream: (taps.taps.shape[-1] - 1) * taps.dilation for stream, taps in mixer.filters.items()}
    for length, row in enumerate(x.split(1, dim=1), start=1):
        out, memory = mixer.read(row, memory)
        rows = {stream: min(length, most) for stream, most in reach.items()}
        assert {name: kept.shape[2] for name, kept in memory.kept.items()} == {"keys": length, "values": length, **rows}
        assert memory.length == length
    close(out, mixer.combine(x)[:, -1:])


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({**LINEAR, "position": "rotary"}, {"keys": (3, 1, 6), "products": (3, 6, 6)}),
        ({"mixer": "performer", **STREAMS, "features": 7}, {"highest": (3, 1, 1), "products": (3, 7, 7)}),
        ({"mixer": "delta", **STREAMS, "gate": True}, {"state": (3, 6, 6)}),
        ({"mixer": "gla", **STREAMS, "gate_rank": 2, "output_gate": True}, {"state": (3, 6, 6)}),
        ({"mixer": "mamba", "conv": 3, "state": 5}, {"state": (36, 5), "rows": (2, 36)}),
    ],
    ids=lambda given: given.get("mixer", ""),
)
def test_a_recurrence_keeps_a_state_however_long_the_sequence(config, sizes):
    filters = {} if config["mixer"] == "mamba" else {"k": 3}
    mixer, rows = build({**config, **filters}, LENGTH), dict.fromkeys(filters, (3, 2, 6))
    for parts in ([5], [1] * 5, [50], [4, 46]):
        memory = Cache()
        for part in mixer.project(hidden(sum(parts))).split(parts, dim=1):
            _, memory = mixer.read(part, memory)
        assert {name: tuple(kept.shape[1:]) for name, kept in memory.state.items()} == {**sizes, **rows}


@pytest.mark.parametrize("name", MODELS)
def test_the_last_output_alone_is_the_last_of_all(name):
    mixer = build(MODELS[name], LENGTH)
    x, memory = mixer.project(hidden(LENGTH)), Cache()
    for part in x.split([7, 4, 2], dim=1):
        last, kept = mixer.read(part, memory, last=True)
        out, memory = mixer.read(part, memory)
        close(last, out[:, -1:])
        close(tuple(kept.kept.values()), tuple(memory.kept.values()))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_in_parts_under_autocast_is_roughly_what_it_is_in_float32(name):
    model, read = model_of(MODELS[name]).float(), tokens(LENGTH)
    exact = stepwise(model, read, [6, 1, 1, 5])
    with torch.autocast("cpu", torch.bfloat16):
        rough = stepwise(model, read, [6, 1, 1, 5])
    assert (rough - exact).norm() < 0.2 * exact.norm()


def test_a_memory_stays_what_it_was_when_it_is_gone_on_from_twice():
    for name in ("attention_all", "linear_all", "mamba"):
        model, read = model_of(MODELS[name]), tokens(LENGTH)
        _, memories = model.step(read[:, :9])
        first, _ = model.step(read[:, 9:12], memories)
        model.step(read[:, 12:], memories)
        close(model.step(read[:, 9:12], memories)[0], first)


def test_a_mixer_that_says_nothing_of_what_it_keeps_keeps_projections():
    class Means(Mixer):
        def project(self, x):
            return 2 * x

        def combine(self, projected, at=None):
            count = torch.arange(1, projected.shape[1] + 1)[:, None]
            return gather_positions(projected.cumsum(1) / count, at)

    mixer, x, memory = Means(), hidden(9), Cache()
    outputs = []
    for part in x.split([1, 5, 3], dim=1):
        last, _ = mixer.step(mixer.project(part), memory, last=True)
        out, memory = mixer.step(mixer.project(part), memory)
        close(last, out[:, -1:])
        outputs.append(out)
    close(torch.cat(outputs, dim=1), mixer(x))
    close(memory.state["projected"], 2 * x)


@pytest.mark.parametrize("rows", [1, 3, 13])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_of_the_last_tokens_is_the_last_rows_of_the_definition(rows, alibi):
    q, k, v = (normal(2, 3, 13, 5, seed=seed) for seed in range(3))
    expected = naive_attend(q, k, v, scale=0.7, alibi=alibi)[:, :, -rows:]
    close(attend_last(q[:, :, -rows:], k, v, scale=0.7, alibi=alibi), expected)


def test_learned_positions_refuse_to_go_past_their_end():
    model, read = model_of(MODELS["attention_v"]), tokens(LENGTH + 1)
    words = f"learned positions reach {LENGTH} tokens, not {LENGTH + 1}"
    _, memories = model.step(read[:, :-1])
    for call in (
        lambda: model.step(read[:, -1:], memories),
        lambda: model.step(read),
        lambda: generate(model, read[:, :9], LENGTH - 7),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert len(list(generate(model, read[:, :9], LENGTH - 8))) == LENGTH - 8


# Choices.


@pytest.mark.parametrize("name", [*OWN, "attention", "based_all", "performer_q", "delta_all", "landmark_all", "hyena", "mamba"])
def test_greedy_choices_are_those_of_the_model_s_own_continuation(name):
    model, prompt = model_of(MODELS[name]), tokens(5)
    found = torch.stack(list(generate(model, prompt, LENGTH - 5)), dim=1)
    assert found.tolist() == naive_continuation(model, prompt, LENGTH - 5).tolist()


def test_choices_are_drawn_from_the_softmax_and_the_same_for_the_same_seed():
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5, -30.0]).double()

    def shares(**options):
        generator = torch.Generator().manual_seed(3)
        drawn = choose(logits.expand(40_000, -1), generator=generator, **options)
        assert torch.equal(drawn, choose(logits.expand(40_000, -1), generator=generator.manual_seed(3), **options))
        return drawn.bincount(minlength=5) / 40_000

    for temperature in (1.0, 0.5, 3.0):
        expected = (logits / temperature).softmax(-1)
        torch.testing.assert_close(shares(temperature=temperature).double(), expected, rtol=0, atol=0.012)
    top = logits.masked_fill(torch.tensor([True, False, True, False, True]), float("-inf")).softmax(-1)
    torch.testing.assert_close(shares(temperature=1.0, top_k=2).double(), top, rtol=0, atol=0.012)
    for certain in ({"temperature": 0.0}, {"temperature": 1e-310}, {"temperature": 2.0, "top_k": 1}):
        assert shares(**certain).tolist() == [0, 1, 0, 0, 0]


def test_the_global_random_state_is_not_touched():
    model, before = model_of(MODELS["attention_k"]), torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    first, again, other = (
        torch.stack(list(generate(model, tokens(4), 9, temperature=2.0, top_k=7, generator=generator.manual_seed(seed))))
        for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("prompt", "count", "options", "words"),
    [
        (3, 0, {}, "0 tokens after a prompt of 3"),
        (0, 3, {}, "3 tokens after a prompt of 0"),
        (3, 3, {"temperature": -0.5}, "temperature = -0.5 must be a number from 0 on"),
        (3, 3, {"temperature": float("nan")}, "temperature = nan must"),
        (3, 3, {"top_k": 0}, "top_k = 0 leaves nothing"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_the_first_token(prompt, count, options, words):
    with pytest.raises(ValueError, match=words):
        generate(model_of(MODELS["attention"]), tokens(prompt), count, **options)


def test_a_model_that_diverged_is_told_of():
    model = model_of(MODELS["attention"])
    model.head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="no finite numbers"):
        next(generate(model, tokens(3), 3))
