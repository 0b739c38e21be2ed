"""Training windows of text: cut on demand from one memory-mapped file of tokens."""

import shutil
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from cat.config import TrainingConfig
from cat.evaluation.scores import Split, TextSplit
from cat.mixers.registry import model_config
from cat.tasks.registry import Windows, generator
from cat.tasks.text import Text
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
    """A task with its data in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_bytes(np.random.default_rng(0).integers(97, 123, 3001, dtype=np.uint8).tobytes())
    task = Text(kind="text", source="prose.txt", length=13, multiples=(1,), train_examples=29, valid_examples=3, test_examples=5)
    generate("prose", task, 0)
    return task


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("length", [1, 7])
def test_windows_cut_on_demand_equal_stored_examples(dtype, length):
    data = windows(dtype, length=length)
    index = torch.tensor([5, 0, 22, 5])
    for cut, stored in zip(text_split_of(data).rows(index), split_of(data).rows(index), strict=True):
        assert (cut.dtype, cut.stride()) == (stored.dtype, stored.stride())
        assert torch.equal(cut, stored)


def test_the_last_window_ends_with_the_last_token():
    data = windows()._replace(starts=np.array([211 - 8]))
    assert text_split_of(data).rows(torch.tensor([0])).answers[0].tolist() == data.tokens[-7:].tolist()


def test_training_on_windows_equals_training_on_examples_to_the_bit():
    data, valid = windows(), split_of(windows(count=5))
    training = TrainingConfig(
        steps=5, batch=4, weight_decay=0.1, grad_clip=1, warmup=0.2, eval_every=3, early_stop_accuracy=1, early_stop_patience=1
    )

    def train_on(train, *, ensemble):
        config = model_config(mixer="attention", width=8, layers=1, heads=2, conv_k=3)
        models = [build_model(config, vocabulary=256, length=7, seed=seed) for seed in (0, 1)]
        settings = {"config": training, "stop_early": False}
        if ensemble:
            return fit_ensemble(models, train, valid, learning_rates=[0.01] * 2, seeds=[0, 1], **settings)
        return [fit(models[0], train, valid, learning_rate=0.01, seed=0, **settings)]

    for ensemble in (False, True):
        cut, stored = (train_on(train, ensemble=ensemble) for train in (text_split_of(data), split_of(data)))
        assert [run.history for run in cut] == [run.history for run in stored]


def test_the_windows_of_a_task_equal_its_training_examples(text):
    examples = text.examples("train", text.length, text.train_examples, generator(0, "prose", "train"))
    (stored,) = read_training("prose")
    for actual, expected in zip(stored.rows(), examples, strict=True):
        np.testing.assert_array_equal(actual, expected)
    for row, index in zip(runs.training_split("prose", CPU).rows(torch.tensor([11, 3])).inputs, (11, 3), strict=True):
        assert row.tolist() == examples.inputs[index].tolist()


def test_windows_of_several_lengths_share_the_tokens(text):
    task = Text(**(text.model_dump() | {"length": (5, 13)}))
    generate("prose", task, 0)
    assert {path.name for path in (DATA / "prose").iterdir()} == {
        "tokens.npy", "train_5.npz", "train_13.npz", "valid.npz", "meta.json",
    }  # fmt: skip
    short, long = runs.training_split("prose", CPU).splits
    assert ((short.length, short.size), (long.length, long.size)) == ((5, 15), (13, 14))
    assert short.tokens is long.tokens
    stored = task.examples("train", 5, 15, generator(0, "prose", "train_5"))
    assert torch.equal(short.rows(torch.arange(15)).inputs, torch.tensor(stored.inputs).long())


def test_the_tokens_are_stored_once_and_memory_mapped(text):
    meta = read_json(DATA / "prose" / "meta.json")
    assert meta["tokens"] == sha256(DATA / "prose" / "tokens.npy")
    (stored,) = read_training("prose")
    assert isinstance(stored.tokens, np.memmap)
    assert (stored.tokens.dtype, len(stored.tokens), stored.starts.shape) == (np.uint8, 2400, (29,))
    with np.load(DATA / "prose" / "train.npz") as arrays:
        assert set(arrays) == {"starts", "length"}
    assert read_split("prose", "valid").inputs.shape == (3, 13)


def test_a_large_file_is_not_read_into_memory(text):
    path, size = DATA / "prose" / "tokens.npy", 1 << 27
    tokens = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(size,))  # a sparse file
    tokens[-14:] = np.arange(14)
    tokens.flush()
    del tokens
    np.savez(DATA / "prose" / "train.npz", starts=np.array([0, size - 14]), length=13)
    write_json(DATA / "prose" / "meta.json", {**read_json(DATA / "prose" / "meta.json"), "tokens": sha256(path)})
    before = psutil.Process().memory_info().rss
    train = runs.training_split("prose", CPU)
    assert train.rows(torch.tensor([1])).answers.tolist() == [list(range(1, 14))]
    assert psutil.Process().memory_info().rss - before < size // 8


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 255
    path.write_bytes(content)


def store_objects(path):
    np.save(path, np.array([None], dtype=object), allow_pickle=True)


@pytest.mark.parametrize(
    ("file", "damage", "problem"),
    [
        *(
            ("tokens.npy", damage, "is not the tokens of a training split, or damaged")
            for damage in (truncate, flip, store_objects)
        ),
        ("tokens.npy", Path.unlink, "is missing"),
        ("train.npz", truncate, "is not a split of a task's data, or damaged"),
        ("train.npz", lambda path: np.savez(path, starts=np.zeros(3, int)), "is not a split of a task's data, or damaged"),
    ],
)
def test_damaged_data_are_one_line_with_the_file(text, file, damage, problem):
    damage(DATA / "prose" / file)
    with pytest.raises(ValueError, match=problem) as error:
        runs.training_split("prose", CPU)
    assert str(error.value).startswith(f"data/prose/{file}: ")
    assert "\n" not in str(error.value)


def test_other_tasks_store_their_examples(text):
    shutil.copy(DATA / "prose" / "valid.npz", DATA / "prose" / "train.npz")
    assert isinstance(runs.training_split("prose", CPU), Split)


@pytest.mark.parametrize(
    ("stored", "on_device"), [("uint8", "uint8"), ("uint16", "int32"), ("uint32", "int64"), ("int16", "int16")]
)
def test_tokens_have_an_indexable_type_on_other_devices(stored, on_device):
    """On a GPU, PyTorch cannot index unsigned types wider than a byte."""
    tokens = torch.arange(5).to(getattr(torch, stored))
    assert runs._indexable(tokens, torch.device("meta")).dtype == getattr(torch, on_device)
    assert runs._indexable(tokens, CPU) is tokens
