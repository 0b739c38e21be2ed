"""What a language model does along its context: its loss by position, and on answers that stand in the context already."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

import cat.evaluation.scores
from cat.evaluation.by_position import TOKENS, bins, loss_by_position, loss_by_recall, sample
from cat.evaluation.scores import SequenceTotals, Split, sequence_totals, token_scores
from cat.mixers.registry import AnyModel
from cat.model import SequenceModel
from cat.tasks.ngrams import occurs, pack, stood_before
from cat.tasks.registry import IGNORE, Text, generator, ngrams
from pipeline.stages.generate import generate
from pipeline.storage.paths import HELDOUT

VOCABULARY = 11


def model(length, **changes):
    torch.manual_seed(0)
    line = {"mixer": "attention", "width": 8, "layers": 2, "heads": 2, "position": "none", "k": 3, **changes}
    config = TypeAdapter(AnyModel).validate_python(line)
    return SequenceModel(config, vocabulary=VOCABULARY, length=length).double().eval()


def windows(rows, length, seed=1):
    return torch.randint(VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(seed))


def test_a_tally_is_the_sums_of_the_outcomes(monkeypatch):
    monkeypatch.setitem(cat.evaluation.scores.TOKENS_AT_ONCE, "cpu", 3 * 13)
    inputs = windows(7, 13)
    targets = inputs[:, 1:].masked_fill(torch.rand(7, 13, generator=torch.Generator().manual_seed(2)) < 0.6, IGNORE)
    split = Split.of(inputs[:, :-1], targets)
    parts = list(token_scores(model(13), split))
    assert [len(part.loss) for part in parts] == [3, 3, 1]
    assert all(torch.equal(a, b) for a, b in zip(SequenceTotals.of(parts), sequence_totals(model(13), split), strict=True))
    loss, right, asked = map(torch.cat, zip(*parts, strict=True))
    logits = model(13)(inputs[:, :-1]).detach()
    for i, (row, places) in enumerate(zip(split.answers, split.positions, strict=True)):
        for a, (answer, at) in enumerate(zip(row, places, strict=True)):
            assert asked[i, a] == (answer != IGNORE)
            assert right[i, a] == (logits[i, at].argmax() == answer)
            expected = F.cross_entropy(logits[i, at].float(), answer) if answer != IGNORE else torch.tensor(0.0)
            torch.testing.assert_close(loss[i, a].float(), expected)


@pytest.mark.parametrize(("trained", "length"), [(6, 6), (6, 17), (7, 23), (4, 5), (5, 10)])
def test_every_token_is_predicted_after_what_it_may_read(trained, length):
    read, tokens = model(trained), windows(3, length)
    full, sliding = loss_by_position(read, tokens)
    assert full.shape == sliding.shape == (3, length)
    begins = {p: p - trained for p in range(1, length + 1)}
    step = trained // 2
    for p in range(1, length + 1):  # the window that it is predicted in ends where the last of a step does
        end = p if p <= trained else min(trained + step * math.ceil((p - trained) / step), length)
        begins[p] = 0 if p <= trained else end - trained
        assert p <= trained or trained - step < p - begins[p] <= trained
        for found, begin in ((full, 0), (sliding, begins[p])):
            logits = read(tokens[:, begin:p])[:, -1].detach()
            torch.testing.assert_close(
                found[:, p - 1], F.cross_entropy(logits, tokens[:, p], reduction="none"), atol=1e-6, rtol=0
            )
    assert torch.equal(full[:, :trained], sliding[:, :trained])
    assert length == trained or not torch.allclose(full, sliding, atol=1e-3)


def test_learned_positions_are_read_in_full_as_far_as_they_reach():
    full, sliding = loss_by_position(model(6, position="learned"), windows(3, 17))
    assert full.shape == (3, 6)
    assert sliding.shape == (3, 17)


@pytest.mark.parametrize(("trained", "length"), [(4, 4), (8, 16), (10, 23), (5, 10), (7, 7), (6, 13)])
def test_bins_are_quarters_of_the_training_length_and_one_ends_at_it(trained, length):
    ends = bins(trained, length)
    assert ends == sorted(set(ends))
    assert ends[-1] == length
    assert trained in ends
    assert {b - a for a, b in zip([0, *ends], ends[:-1], strict=False)} <= {trained // 4, trained // 4 + 1}
    assert 0 < ends[-1] - ([0, *ends][-2]) <= trained // 4 + 1


def test_windows_of_a_sample_are_spread_and_bounded():
    assert sample(5, 8).tolist() == [0, 1, 2, 3, 4]
    assert sample(3, 10 * TOKENS).tolist() == [0]
    chosen = sample(256, 1024)
    assert len(chosen) * 1024 <= TOKENS
    assert len(set(chosen)) == len(chosen)
    assert chosen[-1] >= 256 - 256 // len(chosen)


def test_losses_of_classes_are_their_means_and_those_of_none_are_nan():
    loss = np.array([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    recalled = np.array([[True, False, True], [False, False, True]])
    rare = np.array([[False, False, True], [False, False, False]])
    assert loss_by_recall(loss, recalled, rare)._asdict() == {
        "recalled_share": 0.5,
        "recalled_rare_share": pytest.approx(1 / 6),
        "loss_recalled": pytest.approx(37 / 3),
        "loss_recalled_rare": 4.0,
        "loss_others": pytest.approx(26 / 3),
    }
    found = loss_by_recall(loss, ~rare | True, rare & False)._asdict()
    assert [name for name, value in found.items() if math.isnan(value)] == ["loss_recalled_rare", "loss_others"]


def naive(window, train, scored, n):
    """By the definition, an answer at a time: whether the n tokens before it stood before with it, and never in `train`."""
    recalled, rare = [], []
    for at in range(len(window) - scored, len(window)):
        run = window[at - n : at + 1]
        recalled.append(any(window[i : i + n + 1] == run for i in range(at - n)))
        rare.append(recalled[-1] and all(train[i : i + n + 1] != run for i in range(len(train) - n)))
    return recalled, rare


@pytest.mark.parametrize(("n", "tokens"), [(1, "bytes"), (2, "bytes"), (3, "bytes"), (1, "words"), (1, "bpe")])
def test_answers_are_recalled_where_the_definition_says_so(n, tokens, tmp_path, monkeypatch):
    rng = np.random.default_rng(n)
    monkeypatch.setattr(ngrams, "TRAINING_AT_ONCE", 50)
    monkeypatch.chdir(tmp_path)
    letters = " ".join(rng.choice(list("abcd"), 450)) + "\n" + " ".join(rng.choice(list("abxx"), 60)) + "\n"
    (tmp_path / "x.txt").write_text(letters)
    size = {"bpe": {"vocabulary_size": 262}}.get(tokens, {})
    task = Text(
        kind="text",
        source=str(tmp_path / "x.txt"),
        tokens=tokens,
        **size,
        length=12,
        multiples=(0.5, 1, 1.5),
        train_examples=5,
        valid_examples=5,
        test_examples=19,
        ngram=n,
    )
    generate("text", task, 0)
    seen = set()
    with np.load(HELDOUT / "text" / "recalled.npz") as found, np.load(HELDOUT / "text" / "spans.npz") as spans:
        train = task_tokens(task, "train")
        for length in task.lengths:
            inputs, targets = task.examples("test", length, 19, generator(0, "text", "test"))
            for i, window in enumerate(np.concatenate([inputs, targets[:, -1:]], axis=1).tolist()):
                recalled, rare = naive(window, train, 3, n)
                assert found[f"recalled_{length}"][i].tolist() == recalled
                assert found[f"rare_{length}"][i].tolist() == rare
                seen |= set(zip(recalled, rare, strict=True))
        assert spans["bytes"].shape == spans["unknown"].shape == (19, 18)
        extents = task.extents()
        for of_all, last in ((spans["bytes"], extents.bytes), (spans["unknown"], extents.unknown)):
            np.testing.assert_array_equal(of_all[:, -3:].sum(1), last)
    assert seen == {(False, False), (True, False), (True, True)}


def task_tokens(task, split):
    """By windows of two tokens, one after the other."""
    text = Text(**{**task.model_dump(), "length": 4, "multiples": (0.5, 1), "ngram": None})
    from cat.tasks.text import _tokens

    return _tokens(text, split).tolist()


def test_runs_have_the_same_number_only_where_they_are_the_same():
    largest = np.array([[255] * 8, [255] * 7 + [254], [0] * 8, [0] * 7 + [1]], dtype=np.uint8)
    assert pack(largest, 8, 256)[:, 0].tolist() == [2**64 - 1, 2**64 - 2, 0, 1]
    with pytest.raises(ValueError, match="ngram = 4 with 10,000 different tokens: 5 of them in a row do not fit in 64 bits"):
        ngrams.check_packing(10_000, 5)
    ngrams.check_packing(256, 8)


def test_what_stands_first_in_a_row_did_not_stand_before():
    packed = np.array([[3, 1, 3, 3, 2], [5, 5, 1, 0, 1]], dtype=np.uint64)
    assert stood_before(packed).tolist() == [[False, False, True, True, False], [False, True, False, False, True]]
    assert stood_before(packed[:, :1]).tolist() == [[False], [False]]
    assert occurs(packed, np.array([1, 3], dtype=np.uint8), 1, 6).tolist() == [
        [True, True, True, True, False],
        [False, False, True, False, True],
    ]
    assert not occurs(packed, np.array([], dtype=np.uint8), 1, 6).any()


def test_a_run_is_found_wherever_it_stands_in_a_long_text(monkeypatch):
    monkeypatch.setattr(ngrams, "TRAINING_AT_ONCE", 4)
    text = np.random.default_rng(0).permutation(23).astype(np.uint8)
    assert occurs(pack(text[None], 3, 23), text, 3, 23).all()
    assert not occurs(pack(text[None, ::-1], 3, 23), text, 3, 23).any()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"ngram": 7}, "ngram = 7 is more than the 6 tokens before the answers of a test window"),
        ({"ngram": 8, "length": 24}, "ngram = 8 with 256 different tokens: 9 of them in a row do not fit in 64 bits"),
        (
            {"ngram": 4, "tokens": "words", "vocabulary_size": 10_000},
            "ngram = 4 with 10,000 different tokens: 5 of them in a row",
        ),
    ],
)
def test_runs_that_do_not_fit_are_refused(changes, line):
    sizes = {"length": 12, "multiples": (1,), "train": 7, "valid": 5, "test": 9}
    with pytest.raises(ValidationError, match=line):
        Text(**{"kind": "text", "source": "python-docs", **sizes, **changes})
