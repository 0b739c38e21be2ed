"""Shared passages, found by fingerprints: compared with a search byte by byte."""

import numpy as np
import pytest

from cat.tasks import passages
from cat.tasks.corpus import read
from cat.tasks.passages import PASSAGE, drop_shared_paragraphs, follows_passage
from cat.tasks.registry import IGNORE, generator
from cat.tasks.text import Text


def array(text):
    return np.frombuffer(text, dtype=np.uint8)


def paragraphs(seed, count=40, size=None):
    rng = np.random.default_rng(seed)
    return [
        bytes(rng.choice([*b"abc\n "], size or rng.integers(5, 90)).astype(np.uint8)).replace(b"\n", b"n") for _ in range(count)
    ]


@pytest.fixture
def texts(monkeypatch):
    """A text with passages of another one: its own paragraphs, those that the other has too, and both whole texts."""
    monkeypatch.setattr(passages, "CHUNK_TOKENS", 97)
    own, other, exact = paragraphs(1), paragraphs(0), paragraphs(2, 1, PASSAGE)[0]
    shared = [b"before " + paragraphs(0, 1, 60)[0] + b" after", *other[10:14], exact]
    almost = [exact[1:] + b"z", b"z" + exact[:-1]]
    text = b"\n\n".join([*own[:20], *shared, *own[20:], almost[0], own[0], almost[1]])
    return [*own, *almost], shared, text, b"\n\n".join([*other, exact, paragraphs(0, 1, 60)[0]])


def test_a_byte_follows_a_passage_if_the_bytes_before_it_stand_in_the_other_text(texts):
    *_, text, known = texts
    found = follows_passage(array(text), array(known)).tolist()
    assert found == [i >= PASSAGE and text[i - PASSAGE : i] in known for i in range(len(text))]
    assert 0.03 < np.mean(found) < 0.5
    assert not follows_passage(array(text[: PASSAGE - 1]), array(known)).any()
    assert not follows_passage(array(text), array(b"")).any()


def test_exactly_the_paragraphs_that_overlap_a_shared_passage_are_dropped(texts):
    own, shared, text, known = texts
    kept = bytes(drop_shared_paragraphs(array(text), array(known)))
    assert not follows_passage(array(kept), array(known)).any()
    assert set(kept.split(b"\n\n")) == set(own), "a run of one byte less is kept"
    assert not set(shared) & set(own)


def test_a_passage_that_appears_when_paragraphs_are_dropped_is_found():
    """The ends of two paragraphs, brought together, are a passage of the other text."""
    left, middle, right = paragraphs(3, 3, 60)
    known = b"\n\n".join([middle, left[-40:] + b"\n\n" + right[:40]])
    text = b"\n\n".join([left, middle, right])
    assert bytes(drop_shared_paragraphs(array(text), array(known))) == b""


def test_the_overlap_of_a_task_is_the_share_of_its_scored_bytes(tmp_path):
    own, path = b"".join(paragraphs(4, 60, 80)), tmp_path / "one.txt"
    path.write_bytes(own[:4500] + own[100:400] + own[4500:4700])
    sizes = {"length": 100, "multiples": (0.5, 1, 2), "train_examples": 7, "valid_examples": 5, "test_examples": 3}
    task = Text(kind="text", source=str(path), **sizes)
    inputs, targets = task.examples("test", 200, 3, generator(0, "text", "test"))
    train = bytes(read(str(path), None, "train"))
    follows = [bytes(row[end - PASSAGE : end]) in train for row in inputs.astype(np.uint8) for end in range(101, 201)]
    assert (targets[:, 100:] != IGNORE).all()
    assert task.overlap() == np.mean(follows)
    assert 0.3 < np.mean(follows) < 0.9
