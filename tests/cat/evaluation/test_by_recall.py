"""Sums of scores, and losses on answers that the context already contains."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

import cat.evaluation.scores
from cat.evaluation.by_recall import loss_by_recall
from cat.evaluation.scores import SequenceTotals, Split, sequence_totals, token_scores
from cat.mixers.registry import model_config
from cat.model import SequenceModel
from cat.tasks import ngrams
from cat.tasks.ngrams import occurs, occurs_earlier, pack
from cat.tasks.registry import IGNORE, generator
from cat.tasks.text import Text
from pipeline.stages.generate import generate
from pipeline.storage.paths import HELDOUT

VOCABULARY = 11


def model(length, **changes):
    torch.manual_seed(0)
    keys = {"mixer": "attention", "width": 8, "layers": 2, "heads": 2, "position": "none", "conv_k": 3, **changes}
    config = model_config(**keys)
    return SequenceModel(config, vocabulary=VOCABULARY, length=length).double().eval()


def windows(count, length, seed=1):
    return torch.randint(VOCABULARY, (count, length + 1), generator=torch.Generator().manual_seed(seed))


def test_sequence_totals_are_sums_of_token_scores(monkeypatch):
    monkeypatch.setitem(cat.evaluation.scores.TOKENS_AT_ONCE, "cpu", 3 * 13)
    inputs = windows(7, 13)
    targets = inputs[:, 1:].masked_fill(torch.rand(7, 13, generator=torch.Generator().manual_seed(2)) < 0.6, IGNORE)
    split = Split.of(inputs[:, :-1], targets)
    chunks = list(token_scores(model(13), split))
    assert [len(chunk.loss) for chunk in chunks] == [3, 3, 1]
    assert all(torch.equal(a, b) for a, b in zip(SequenceTotals.of(chunks), sequence_totals(model(13), split), strict=True))
    loss, correct, is_target = map(torch.cat, zip(*chunks, strict=True))
    logits = model(13)(inputs[:, :-1]).detach()
    for i, (answers, positions) in enumerate(zip(split.answers, split.positions, strict=True)):
        for a, (answer, position) in enumerate(zip(answers, positions, strict=True)):
            assert is_target[i, a] == (answer != IGNORE)
            assert correct[i, a] == (logits[i, position].argmax() == answer)
            expected = F.cross_entropy(logits[i, position].float(), answer) if answer != IGNORE else torch.tensor(0.0)
            torch.testing.assert_close(loss[i, a].float(), expected)


def test_losses_per_class_are_means_and_nan_without_answers():
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
    empty = loss_by_recall(loss, ~rare | True, rare & False)._asdict()
    assert [name for name, value in empty.items() if math.isnan(value)] == ["loss_recalled_rare", "loss_others"]


def test_groups_are_successive_sequences_of_equal_number():
    totals = SequenceTotals(*(torch.arange(6.0) + start for start in (0, 10, 20)))
    assert [column.tolist() for column in totals.grouped(2)] == [[3, 12], [33, 42], [63, 72]]


def naive_recalled(window, train, scored, n):
    """Per answer, by definition: whether its (n + 1)-gram occurred earlier in the window, and never in `train`."""
    recalled, rare = [], []
    for position in range(len(window) - scored, len(window)):
        ngram = window[position - n : position + 1]
        recalled.append(any(window[i : i + n + 1] == ngram for i in range(position - n)))
        rare.append(recalled[-1] and all(train[i : i + n + 1] != ngram for i in range(len(train) - n)))
    return recalled, rare


@pytest.mark.parametrize(("n", "tokens"), [(1, "bytes"), (2, "bytes"), (3, "bytes"), (1, "words"), (1, "bpe")])
def test_recalled_answers_follow_the_definition(n, tokens, tmp_path, monkeypatch):
    rng = np.random.default_rng(n)
    monkeypatch.setattr(ngrams, "CHUNK_TOKENS", 50)
    monkeypatch.chdir(tmp_path)
    letters = " ".join(rng.choice(list("abcd"), 900)) + "\n" + " ".join(rng.choice(list("abxx"), 120)) + "\n"
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
        test_examples=7,
        ngram=n,
    )
    generate("text", task, 0)
    seen = set()
    with np.load(HELDOUT / "text" / "recalled.npz") as found:
        train = task_tokens(task, "train")
        for length in task.lengths:
            inputs, targets = task.examples("test", length, 7, generator(0, "text", "test"))
            expected = []
            for window, scored in zip(np.concatenate([inputs, targets[:, -1:]], axis=1).tolist(), targets >= 0, strict=True):
                expected += zip(*naive_recalled(window, train, int(scored.sum()), n), strict=True)
            assert [*zip(found[f"recalled_{length}"].ravel(), found[f"rare_{length}"].ravel(), strict=True)] == expected
            assert found[f"recalled_{length}"].shape == (7, 9)
            seen |= set(expected)
    assert seen == {(False, False), (True, False), (True, True)}


def task_tokens(task, split):
    """All tokens of a split of the source, in order."""
    from cat.tasks.encoded import tokens_of

    return tokens_of(Text(**{**task.model_dump(), "length": 4, "multiples": (0.5, 1), "ngram": None}), split).tolist()


def test_packed_ngrams_are_equal_only_if_the_ngrams_are():
    largest = np.array([[255] * 8, [255] * 7 + [254], [0] * 8, [0] * 7 + [1]], dtype=np.uint8)
    assert pack(largest, 8, 256)[:, 0].tolist() == [2**64 - 1, 2**64 - 2, 0, 1]
    with pytest.raises(ValueError, match="ngram = 4"):
        ngrams.check_packing(10_000, 5)
    ngrams.check_packing(256, 8)


def test_a_first_occurrence_did_not_occur_before():
    packed = np.array([[3, 1, 3, 3, 2], [5, 5, 1, 0, 1]], dtype=np.uint64)
    assert occurs_earlier(packed).tolist() == [[False, False, True, True, False], [False, True, False, False, True]]
    assert occurs_earlier(packed[:, :1]).tolist() == [[False], [False]]
    assert occurs(packed, np.array([1, 3], dtype=np.uint8), 1, 6).tolist() == [
        [True, True, True, True, False],
        [False, False, True, False, True],
    ]
    assert not occurs(packed, np.array([], dtype=np.uint8), 1, 6).any()


def test_an_ngram_is_found_anywhere_in_a_long_text(monkeypatch):
    monkeypatch.setattr(ngrams, "CHUNK_TOKENS", 4)
    text = np.random.default_rng(0).permutation(23).astype(np.uint8)
    assert occurs(pack(text[None], 3, 23), text, 3, 23).all()
    assert not occurs(pack(text[None, ::-1], 3, 23), text, 3, 23).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ngram": 7}, "ngram = 7.* 6 tokens"),
        ({"ngram": 8, "length": 24}, "ngram = 8.* 64"),
        ({"ngram": 4, "tokens": "words", "vocabulary_size": 10_000}, "ngram = 4.* 64"),
    ],
)
def test_ngrams_that_do_not_fit_are_refused(changes, message):
    sizes = {"length": 12, "multiples": (1,), "train_examples": 7, "valid_examples": 5, "test_examples": 9}
    with pytest.raises(ValidationError, match=message):
        Text(**{"kind": "text", "source": "python-docs", **sizes, **changes})
