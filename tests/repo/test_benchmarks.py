"""The benchmarks at tiny sizes: every row runs, its two sides agree, and the results are written. No test asserts a speed."""

import dataclasses
import json
import os
import pickle
import re
import secrets
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ruamel.yaml import YAML

from benchmarks import cells as trivial
from benchmarks import measure, startup, suite, training
from benchmarks.__main__ import main
from benchmarks.attention import biased, landmark
from benchmarks.convolution import long_convolution, qkv_convolutions, short_convolution
from benchmarks.data import all_at_once, data, mqar, one_by_one
from benchmarks.generation import generation
from benchmarks.masks import masks
from benchmarks.measure import COST, POWER, SECONDS, SPEEDUP, Benchmark, Case, Comparison, Place, compared, make_figure
from benchmarks.recurrence import recurrent_steps, scan
from benchmarks.training import replicas, step, text
from pipeline.config.grid import cells
from pipeline.config.load import load_study
from tests.helpers.study import ROOT

CPU = Place("cpu", 1)
TINY = {
    "step_32": step(32, target=20, batch=2),
    "text_8": text(8, target=0.9, tokens=16),
    "qkv_convolutions_64": qkv_convolutions(64, tokens=128, sizes=((8, 2),)),
    "short_convolution": short_convolution(batch=1, length=64, naive_length=8, channels=3),
    "long_convolution": long_convolution(direct=512, shortest=16, longest=64, channels=2),
    "biased": biased(length=80, window=9),
    "landmark": landmark(shortest=64, longest=128),
    "scan": scan(length=40),
    "recurrent_steps": recurrent_steps(batch=2, names=["linear attention"]),
    "generation": generation(length=16, width=8),
    "masks": masks(batch=2, length=8, width=8),
    "data": data(32, count=3),
    "replicas": replicas(),
}


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """The suite at tiny sizes: two repeats of one call per side, and no process per side."""

    class InThisProcess(measure.OwnProcess):
        def __init__(self, setup, place):
            self.work = setup(place.device)

        def __call__(self):
            return self.work()

        def __exit__(self, *error):
            pass

        def seconds(self, calls):
            return measure.seconds(self.work, calls, "cpu")

    monkeypatch.setattr(measure, "OwnProcess", InThisProcess)
    monkeypatch.setattr(suite, "SUITE", TINY)
    monkeypatch.setattr(suite, "RESULTS", tmp_path)
    monkeypatch.setattr(measure, "REPEATS", 2)
    monkeypatch.setattr(measure, "MIN_SECONDS", 0)
    monkeypatch.setattr(measure, "peak", lambda setup, place: 1_000_000 if pickle.dumps(setup) else 0)
    return tmp_path


def run(*arguments):
    result = CliRunner().invoke(main, ["--device", "cpu", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def only(folder, suffix):
    (path,) = folder.glob(f"*{suffix}")
    return path


def test_every_row_has_a_tiny_version_or_its_own_test():
    kinds = {re.sub(r"_\d+$", "", name) for name in suite.SUITE}
    assert kinds == {re.sub(r"_\d+$", "", name) for name in TINY} | {"startup"}
    assert [name for name in suite.SUITE if name.startswith("qkv")] == [f"qkv_convolutions_{n}" for n in (128, 512, 1024, 4096)]


def test_every_row_is_measured_and_written(tiny):
    shown = run()
    results = json.loads(only(tiny, ".json").read_text())
    assert re.fullmatch(r"CPU \(.+\)", results["device"])
    assert only(tiny, ".json").stem == re.sub(r"\W+", "_", results["device"].lower()).strip("_")
    assert list(results["rows"]) == list(TINY)
    for name, row in results["rows"].items():
        assert set(row) == {"what", "target", "threads", "torch", "repeats", "met", "not_run", "figures"}
        assert (row["threads"], row["torch"], row["repeats"]) == (1, torch.__version__, 5)
        if name == "replicas":
            assert (row["met"], row["not_run"], row["figures"]) == (None, "needs a GPU", [])
            continue
        verdicts = {figure["met"] for figure in row["figures"]} - {None}
        assert row["figures"]
        assert row["met"] is (False not in verdicts)
        for figure in row["figures"]:
            assert set(figure) == {field.name for field in dataclasses.fields(measure.Figure)}
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert (figure["met"] is None) == (figure["target"] is None)
            for side in (figure["ours"], figure["other"]):
                assert 0 < side["fastest"] <= side["seconds"] <= side["slowest"]
                assert side["bytes"] == 1_000_000
        cases = [figure["case"] for figure in row["figures"]]
        assert len({(case, figure["other"]["name"]) for case, figure in zip(cases, row["figures"], strict=True)}) == len(cases)
        assert all(f"| {case} " in shown for case in cases), shown
    assert "| not run: needs a GPU" in shown
    assert only(tiny, ".md").read_text() == shown


def test_other_rows_keep_their_results(tiny):
    run("data", "replicas")
    path = only(tiny, ".json")
    results = json.loads(path.read_text())
    assert list(results["rows"]) == ["data", "replicas"]
    results["rows"]["data"]["what"] = "old"
    results["rows"]["gone"] = results["rows"]["data"]
    path.write_text(json.dumps(results))
    shown = run("step_32", "--threads", "2")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["step_32", "data", "replicas"]
    assert [row["threads"] for row in rows.values()] == [2, 1, 1]
    assert rows["data"]["what"] == "old"
    assert f"2 threads, torch {torch.__version__};" in shown
    assert f"1 thread, torch {torch.__version__};" in shown
    run("data")
    assert json.loads(path.read_text())["rows"]["data"]["what"] == TINY["data"].what


def test_rows_are_listed_and_unknown_ones_refused(tiny, monkeypatch):
    assert [line.split()[0] for line in run("--list").splitlines()[2:]] == list(TINY)
    assert list(tiny.iterdir()) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for arguments, fault in ((["nothing"], "no row is called nothing"), (["--device", "cuda"], "this machine has no GPU")):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2
        assert fault in result.output


@pytest.mark.parametrize(
    ("unit", "value", "met", "missed"),
    [(SPEEDUP, 0.25, 0.25, 0.3), (COST, 4, 4, 3.9), (POWER, 2, 2, 1.9), (SECONDS, 8, 8, 7.9)],
)
def test_a_target_is_met_or_not(unit, value, met, missed):
    for target, verdict in ((met, True), (missed, False), (None, None)):
        comparison = Comparison(name="q", sides=("a", "b"), unit=unit, target=target)
        figure = make_figure(comparison, [8.0, 8.0], [2.0, 2.0], memory=(1, 2))
        assert (figure.value, figure.met) == (pytest.approx(value), verdict)


def test_a_figure_is_the_median_of_its_repeats_and_shows_their_range():
    comparison = Comparison(name="q", sides=("a", "b"), count=(300, "tokens"))
    figure = make_figure(comparison, [1.0, 3.0, 2.0], [10.0, 60.0, 80.0], memory=(1, 2))
    assert (figure.low, figure.value, figure.high) == (10, 20, 40)
    assert dataclasses.astuple(figure.ours) == ("a", 2, 1, 3, 1)
    assert dataclasses.astuple(figure.other) == ("b", 60, 10, 80, 2)
    assert figure.rate == "150 tokens"


def test_two_sides_take_turns_and_a_fast_one_is_called_more_often(monkeypatch):
    now, calls = 0.0, []

    def work(name, cost):
        nonlocal now
        now += cost
        calls.append(name)
        return torch.ones(1)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    monkeypatch.setattr(measure, "MIN_SECONDS", 1.0)
    monkeypatch.setattr(measure, "REPEATS", 2)
    ours, other = (partial(work, name, cost) for name, cost in (("a", 0.25), ("b", 4.0)))
    times = measure.in_turn(ours, other, agree=measure.same_numbers, device="cpu")
    assert times == ([0.25, 0.25], [4.0, 4.0])
    assert "".join(calls) == "ab" * 3 + "aaaab" * 2


def constant(value, device):
    return partial(list, value)


def test_sides_that_disagree_are_not_measured(tiny):
    def case(ours, other):
        return Case(name="c", sides=("a", "b"), ours=partial(constant, ours), other=partial(constant, other))

    one, two = torch.ones(2), torch.tensor([1.0, 1.002])
    assert measure.compare(case([one], [one * 1.0005]), CPU).unit == "times as fast"
    with pytest.raises(AssertionError):
        measure.compare(case([one], [two]), CPU)
    with pytest.raises(AssertionError):
        measure.same_shapes([one], [torch.ones(3)])
    benchmark = Benchmark(what="w", target="t", figures=compared(lambda device: [case([one], [two])]))
    with pytest.raises(AssertionError):
        suite.run(benchmark, CPU)


def allocate(size, device):
    """Hold one megabyte; the work needs `size` megabytes for a moment."""
    kept = torch.zeros(1 << 18)
    return lambda: kept.sum() + torch.ones(size << 18).sum()


def count_calls(device):
    """Each call returns the calls so far and the process."""
    calls = []

    def work():
        calls.append(None)
        time.sleep(0.01)
        return len(calls), os.getpid()

    return work


def test_a_side_with_a_process_of_its_own_is_timed_there():
    with measure.OwnProcess(count_calls, CPU) as work:
        first, process = work()
        assert process != os.getpid()
        assert 0.01 <= measure.seconds(work, 3, "cpu") < 0.1
        assert work() == (first + 4, process)


def test_memory_is_the_peak_of_a_call():
    assert 63 < measure.peak(partial(allocate, 64), CPU) / (1 << 20) < 72


@pytest.mark.parametrize("way", [all_at_once, one_by_one])
def test_both_ways_of_generating_recall_agree_with_the_oracle(way):
    task = mqar(32)
    assert task.vocabulary == 32
    examples = way(32, 20, "cpu")()
    np.testing.assert_array_equal(examples.targets, task.oracle(examples))
    assert ((examples.targets >= 0).sum(1) == 4).all()


def test_the_measured_setting_is_zoology_s():
    task = mqar(8192)
    assert (task.vocabulary, task.length, task.pairs, task.query_gap) == (8192, 64, 4, "power")


# Start-up times of DVC and Python.


def test_the_study_for_measuring_dvc_is_valid_and_has_the_wanted_number_of_cells(tmp_path):
    raw = startup.enlarged(YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml"), 100, CPU)
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(raw, file)
    study = load_study(tmp_path / "params.yaml")
    assert 100 <= len(cells(study)) < 110
    assert startup.CELL in [(cell.task, cell.variant) for cell in cells(study) if cell.ablation == "qkv_subsets"]
    assert study.parallel_runs == 1


def test_a_command_is_measured_in_its_own_process(tmp_path):
    run = startup.python(tmp_path, "-c", "x = bytearray(200 << 20); x[::4096] = b'1' * len(x[::4096]); print('done')")
    assert 200 <= run.bytes / (1 << 20) < 300
    assert run.seconds > 0
    assert run.output.strip() == "done"
    assert Path(startup.python(tmp_path, "-c", "import os; print(os.getcwd())").output.strip()) == tmp_path
    with pytest.raises(RuntimeError, match="it failed"):
        startup.python(tmp_path, "-c", "raise SystemExit('it failed')")


def test_startup_is_the_time_of_a_command_without_training(monkeypatch):
    commands = []

    def python(folder, *arguments):
        commands.append((folder.name, arguments))
        cold = 100 if arguments not in [earlier for _, earlier in commands[:-1]] else 0
        return startup.Run(cold + (5.0 if folder.name == "study" else 2.0), 3_000_000, "")

    def study(folder, *rest):
        (folder / "logs" / "ar").mkdir(parents=True)
        (folder / "logs" / "ar" / "k.json").write_text('{"seconds": 1.5}')
        return folder

    def empty(folder):
        return folder

    monkeypatch.setattr(startup, "python", python)
    monkeypatch.setattr(startup, "finished_study", study)
    monkeypatch.setattr(startup, "empty_study", empty)
    monkeypatch.setattr(startup, "REPEATS", 2)
    row = suite.run(startup.startup(cells=100), CPU)
    assert [(f["value"], f["high"], f["other"]["slowest"], f["target"], f["met"]) for f in row["figures"]] == [
        (3.5, 3.5, 2.0, 3, False),
        (3.5, 3.5, 2.0, None, None),
        (5.0, 5.0, 2.0, 5, True),
        (5.0, 5.0, 2.0, 3, False),
        (5.0, 5.0, 2.0, None, None),
    ]
    assert commands[0] == ("study", ("-m", "dvc", "repro", "--force", "--single-item", "train_qkv_subsets@ar-k"))
    assert commands[-2] == ("study", ("-m", "pipeline", "run"))
    assert len(commands) == 5 * 3 * 2
    assert [folder for folder, _ in commands] == ["study", "empty"] * 15


def test_a_study_with_stages_to_run_is_not_measured():
    rest = startup.Run(1.0, 1, "Stage 'plan' didn't change, skipping\n")
    assert startup.at_rest(rest) is rest
    with pytest.raises(RuntimeError, match="render ran"):
        startup.at_rest(startup.Run(1.0, 1, rest.output + "\nRunning stage 'render':"))


def test_an_ensemble_step_equals_the_steps_one_by_one():
    """Two steps: the second uses the weights of the first."""
    ways = [way(3, 4, "cpu") for way in (training.ensemble_step, training.one_by_one)]
    for _ in range(2):
        torch.testing.assert_close(*(way() for way in ways))


# The cost of a cell besides its training.


@pytest.mark.parametrize("count", [1, 40])
def test_the_trivial_study_has_the_wanted_number_of_cells(tmp_path, count):
    raw = trivial.trivial(YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml"), count)
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(raw, file)
    study = load_study(tmp_path / "params.yaml")
    assert len({cell.variant for cell in cells(study)}) == len(cells(study)) == count
    assert {cell.task for cell in cells(study)} == {trivial.TASK}


@pytest.mark.long
def test_every_part_of_a_trivial_study_is_measured(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # otherwise Ray writes one to the home folder
    figures = trivial.in_project(2)
    assert set(figures) == {*trivial.PARTS, "bytes"}
    assert all(value > 0 for value in figures.values())


def test_many_cells_are_extrapolated_by_a_power_law_or_a_line():
    assert trivial.extrapolate([10, 100, 500], [7.0, 1e2, 2.5e3]) == pytest.approx((2, 1e6))
    assert trivial.extrapolate([100, 500], [12.0, 20.0])[1] == pytest.approx(210)
    sizes = {str(size): dict.fromkeys([*trivial.PARTS, "bytes"], size * 0.02) for size in (10, 100)}
    shown = trivial.table({"device": "CPU", "torch": "2.6", "seeds": 3, "sizes": sizes})
    (line,) = [line for line in shown.splitlines() if "Ray" in line]
    assert re.split(r" *\| *", line)[2:-1] == ["0.2", "2", "1.00", "3.33 min"]


@pytest.mark.parametrize(("seconds", "shown"), [(1.5, "1.5 s"), (119, "119 s"), (180, "3 min"), (7200, "2 h")])
def test_a_duration_is_short(seconds, shown):
    assert trivial.duration(seconds) == shown
