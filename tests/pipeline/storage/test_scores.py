"""scores/: what is written comes back, in the same bytes every time and in few of them."""

import numpy as np
import pytest

from pipeline.storage.scores import SequenceScores, read_scores, write_scores

N = 7


def scores(text):
    rng = np.random.default_rng(0)
    weights = {4: rng.integers(1, 300, N), 8: rng.integers(1, 9, N)}
    return {
        (variant, seed, length): SequenceScores(
            rng.random(N) * 9 if text else rng.integers(0, weights[length] + 1),
            weights[length],
            None if text else np.exp(rng.normal(-3, 4, N)),
        )
        for variant, seed, length in [("k", 0, 4), ("k", 101, 4), ("k", 0, 8), ("learned", 0, 4)]
    }


@pytest.mark.parametrize("text", [False, True])
def test_scores_come_back(tmp_path, text):
    written = scores(text)
    write_scores(tmp_path / "a.npz", written, text=text)
    write_scores(tmp_path / "b.npz", written, text=text)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read = read_scores(tmp_path / "a.npz")
    assert read.keys() == ({"bits_per_byte"} if text else {"accuracy", "loss"})
    for key, row in written.items():
        if text:
            sums, weights = read["bits_per_byte"][key]
            assert sums == pytest.approx(row.primary * row.weights, rel=2**-10)
        else:
            correct, weights = read["accuracy"][key]
            assert correct.tolist() == row.primary.tolist()
            losses, _ = read["loss"][key]
            assert losses / weights == pytest.approx(row.loss, rel=2**-5, abs=4e-6)
        assert weights.tolist() == row.weights.tolist()


def test_an_autoregressive_task_has_no_loss(tmp_path):
    write_scores(tmp_path / "a.npz", {key: row._replace(loss=None) for key, row in scores(False).items()}, text=False)
    assert read_scores(tmp_path / "a.npz").keys() == {"accuracy"}


def test_a_study_whose_seeds_all_diverged_has_empty_scores(tmp_path):
    write_scores(tmp_path / "a.npz", {}, text=False)
    assert read_scores(tmp_path / "a.npz") == {}
