"""`python -m pipeline profile`: every part of a step has a name, and the parts add up to the step."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import DeviceType

from pipeline.commands.profile import time_of_parts
from tests.helpers.study import ROOT, edit, stage


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The working folder: the smoke study with the data of two tasks."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "presets" / "smoke.yaml", "params.yaml")
    stage("generate", "ar")
    stage("generate", "nar")


def profiled(capsys, *arguments):
    """The first line, and both tables as lists of cells."""
    stage("profile", *arguments, "--steps", "3")
    head, _, parts, operators = capsys.readouterr().out.strip().split("\n\n")
    return head, *([re.split(r"  +", line.strip()) for line in table.splitlines()[2:]] for table in (parts, operators))


@pytest.mark.parametrize(
    ("task", "variant", "blocks"),
    [
        ("ar", "k", ["block 1: mixer"]),
        ("nar", "qk_l2", ["block 1: mixer", "block 1: mlp", "block 2: mixer", "block 2: mlp"]),
        ("ar", "mamba", ["block 1: mixer"]),
    ],
)
def test_every_part_has_a_name_and_the_parts_add_up_to_the_step(study, capsys, task, variant, blocks):
    _, parts, operators = profiled(capsys, task, variant)
    forward = ["embedding", *blocks, "head and loss", "forward: other"]
    assert [row[0] for row in parts] == ["data", *forward, "backward", "clip and optimizer", "between", "total"]
    *times, step = [float(row[1]) for row in parts]
    *shares, whole = [float(row[2].rstrip("%")) for row in parts]
    assert sum(times) == pytest.approx(step, abs=0.01)
    assert sum(shares) == pytest.approx(whole, abs=1) == pytest.approx(100)
    assert all(time > 0 for row, time in zip(parts, times, strict=False) if row[0] not in ("forward: other", "between"))
    assert min(times) >= 0
    names = [row[0] for row in operators]
    assert len(set(names)) == len(names) > 5
    assert any(name.startswith("aten::") for name in names)
    assert not set(names) & {row[0] for row in parts}


def test_time_outside_all_parts_is_other_or_between_and_the_loss_belongs_to_the_head():
    def event(name, start, end, *, named=True, device=DeviceType.CPU):
        return SimpleNamespace(
            name=name, is_user_annotation=named, device_type=device, time_range=SimpleNamespace(start=1e3 * start, end=1e3 * end)
        )

    first_step = [
        event("step", 0, 100),
        event("data", 1, 11),
        event("forward", 11, 51),
        event("embedding", 12, 17),
        event("aten::embedding", 13, 16, named=False),
        event("embedding", 12, 99, device=DeviceType.CUDA),
        event("block 1: mixer", 17, 20),
        event("block 1: mixer", 21, 24),
        event("head and loss", 31, 41),
        event("backward", 51, 81),
        event("clip and optimizer", 82, 97),
    ]
    second_step = [
        SimpleNamespace(**{**vars(e), "time_range": SimpleNamespace(start=9e5 + e.time_range.start, end=9e5 + e.time_range.end)})
        for e in first_step
    ]
    parts = time_of_parts(
        SimpleNamespace(events=lambda: first_step + second_step), ["embedding", "block 1: mixer", "head and loss"], steps=2
    )
    assert list(parts.items()) == [
        (name, pytest.approx(ms))
        for name, ms in {
            "data": 10,
            "embedding": 5,
            "block 1: mixer": 6,
            "head and loss": 20,
            "forward: other": 9,
            "backward": 30,
            "clip and optimizer": 15,
            "between": 5,
        }.items()
    ]


def test_a_step_is_described_with_its_speed(study, capsys):
    head, _, _ = profiled(capsys, "ar", "k")
    found = re.fullmatch(
        r"ar k, CPU \(.+\), float32, 16 sequences of 20 tokens: ([\d.]+) ms per step \(median of 3, minimum ([\d.]+)\),"
        r" ([\d,]+) tokens per second",
        head,
    )
    assert found, head
    median, minimum, speed = (float(number.replace(",", "")) for number in found.groups())
    assert 0 < minimum <= median
    assert speed == pytest.approx(16 * 20 / (median / 1e3), rel=0.01)


def test_the_longest_of_several_training_lengths_is_profiled(study, capsys):
    edit(**{"tasks.ar.data.length": [10, 23]})
    stage("generate", "ar")
    assert "16 sequences of 23 tokens" in profiled(capsys, "ar", "k")[0]


def test_a_profile_writes_no_files(study, capsys):
    before = sorted(str(path) for path in Path().rglob("*"))
    profiled(capsys, "ar", "k")
    assert sorted(str(path) for path in Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("copying", "k"), "profile: data/copying: is missing"),
        (("ar", "construction"), "profile: construction is not trained"),
        (("ar", "kk"), "params.yaml: variants.kk: is missing"),
        (("ar", "qk_l2"), "params.yaml: ablations: none trains 'qk_l2' on 'ar'; name both in one"),
        (("ar", "k", "--device", "cuda"), "params.yaml: device = cuda: "),
    ],
)
def test_errors_are_one_line(study, capsys, monkeypatch, arguments, line):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        stage("profile", *arguments)
    assert stopped.value.code == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(line)
