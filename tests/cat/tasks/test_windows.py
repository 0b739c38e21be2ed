"""Training windows of text: cut when their turn comes from tokens that are kept once, in a file that is mapped into memory."""

import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cat.config import OptimizerConfig, TrainingConfig
from cat.evaluation.scores import Split, TextSplit
from cat.mixers.attention.config import AttentionConfig
from cat.tasks.registry import Text, Windows, generator
from cat.training.ensemble import fit_ensemble
from cat.training.fit import build_model, fit
from pipeline.stages.generate import generate
from pipeline.storage import runs
from pipeline.storage.files import read_json, sha256, write_json
from pipeline.storage.paths import DATA
from pipeline.storage.task_data import read_split, read_training

CPU = torch.device("cpu")


def windows(dtype=np.uint8, size=211, count=23, length=7):
    random = np.random.default_rng(0)
    top = min(np.iinfo(dtype).max, 70_000)
    return Windows(random.integers(0, top, size, dtype=dtype), random.integers(0, size - length, count), length)


def split_of(windows):
    return Split.of(*map(torch.tensor, windows.rows()))


def text_split_of(windows):
    return TextSplit(torch.tensor(windows.tokens), torch.tensor(windows.starts), windows.length)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A task whose data are in the working folder."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 3001, dtype=np.uint8).tobytes())
    task = Text(kind="text", source="prose.txt", length=13, multiples=(1,), train_examples=29, valid_examples=3, test_examples=5)
    generate("prose", task, 0)
    return task


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 7])
def test_a_window_is_the_same_however_it_is_cut(dtype, length):
    kept = windows(dtype, length=length)
    index = torch.tensor([5, 0, 22, 5])
    for one, other in zip(text_split_of(kept).rows(index), split_of(kept).rows(index), strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
        assert torch.equal(one, other)


def test_the_last_window_ends_with_the_last_token():
    kept = windows()._replace(starts=np.array([211 - 8]))
    assert text_split_of(kept).rows(torch.tensor([0])).answers[0].tolist() == kept.tokens[-7:].tolist()


def test_training_on_windows_is_training_on_examples_to_the_bit():
    kept, valid = windows(), split_of(windows(count=5))
    schedule = TrainingConfig(steps=5, batch=4, learning_rates=(0.01,))
    protocol = OptimizerConfig(
        weight_decay=0.1, grad_clip=1, warmup=0.2, eval_every=3, early_stop_accuracy=1, early_stop_patience=1
    )

    def trained(together, train):
        config = AttentionConfig(mixer="attention", width=8, layers=1, heads=2, position="none", conv_k=3)
        models = [build_model(config, vocabulary=256, length=7, seed=seed) for seed in (0, 1)]
        about = {"protocol": protocol, "schedule": schedule, "stop_early": False}
        if together:
            return fit_ensemble(models, train, valid, learning_rates=[0.01] * 2, seeds=[0, 1], **about)
        return [fit(models[0], train, valid, learning_rate=0.01, seed=0, **about)]

    for together in (False, True):
        one, other = (trained(together, train) for train in (text_split_of(kept), split_of(kept)))
        assert [run.history for run in one] == [run.history for run in other]


def test_the_windows_of_a_task_are_its_training_examples(text):
    again = text.examples("train", text.length, text.train, generator(0, "prose", "train"))
    read = read_training("prose")
    for one, other in zip(read.rows(), again, strict=True):
        np.testing.assert_array_equal(one, other)
    for row, index in zip(runs.training_split("prose", CPU).rows(torch.tensor([11, 3])).inputs, (11, 3), strict=True):
        assert row.tolist() == again.inputs[index].tolist()


def test_the_tokens_are_kept_once_and_mapped(text):
    meta = read_json(DATA / "prose" / "meta.json")
    assert meta["tokens"] == sha256(DATA / "prose" / "tokens.npy")
    read = read_training("prose")
    assert isinstance(read.tokens, np.memmap)
    assert (read.tokens.dtype, len(read.tokens), read.starts.shape) == (np.uint8, 2400, (29,))
    with np.load(DATA / "prose" / "train.npz") as arrays:
        assert set(arrays) == {"starts", "length"}
    assert read_split("prose", "valid").inputs.shape == (3, 13)


def test_a_file_larger_than_the_memory_in_use_is_not_read_into_it(text):
    path, size = DATA / "prose" / "tokens.npy", 1 << 27
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(size,))  # of which nothing is on the disk
    tokens[-14:] = np.arange(14)
    tokens.flush()
    del tokens
    np.savez(DATA / "prose" / "train.npz", starts=np.array([0, size - 14]), length=13)
    write_json(DATA / "prose" / "meta.json", {**read_json(DATA / "prose" / "meta.json"), "tokens": sha256(path)})
    before = psutil.Process().memory_info().rss
    train = runs.training_split("prose", CPU)
    assert train.rows(torch.tensor([1])).answers.tolist() == [list(range(1, 14))]
    assert psutil.Process().memory_info().rss - before < size // 8


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


def objects(path):
    np.save(path, np.array([None], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        *(("tokens.npy", damage, "is not the tokens of a training split, or damaged") for damage in (cut, flip, objects)),
        ("tokens.npy", Path.unlink, "is missing; run `dvc repro`"),
        ("train.npz", cut, "is not a split of a task's data, or damaged"),
        ("train.npz", lambda path: np.savez(path, starts=np.zeros(3, int)), "is not a split of a task's data, or damaged"),
    ],
)
def test_damaged_data_are_named_in_one_line(text, file, damage, words):
    damage(DATA / "prose" / file)
    with pytest.raises(ValueError, match=words) as refused:
        runs.training_split("prose", CPU)
    assert str(refused.value).startswith(f"data/prose/{file}: ")
    assert "\n" not in str(refused.value)


def test_other_tasks_keep_their_examples(text):
    shutil.copy(DATA / "prose" / "valid.npz", DATA / "prose" / "train.npz")
    assert isinstance(runs.training_split("prose", CPU), Split)


@pytest.mark.parametrize(("kept", "there"), [("uint8", "uint8"), ("uint16", "int32"), ("uint32", "int64"), ("int16", "int16")])
def test_on_another_device_rows_of_tokens_can_be_taken(kept, there):
    """On a GPU PyTorch takes no rows of what is unsigned and wider than a byte."""
    tokens = torch.arange(5).to(getattr(torch, kept))
    assert runs._indexable(tokens, torch.device("meta")).dtype == getattr(torch, there)
    assert runs._indexable(tokens, CPU) is tokens
