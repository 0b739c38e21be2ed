"""Parallel training gives the bytes of `dvc repro`, isolates failures and records only cells that are up to date."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from ruamel.yaml import YAML

from cat.training.fit import validation_record
from pipeline.cli import main
from pipeline.config.grid import cells
from pipeline.config.load import load_study
from pipeline.runtime import workers
from pipeline.runtime.devices import made_on
from pipeline.runtime.processes import available
from pipeline.scheduling import scheduler
from pipeline.scheduling.dvc_internals import exclusive_run, reproduce
from pipeline.scheduling.progress import Progress
from pipeline.storage.files import read_json
from tests.helpers.study import ROOT, edit, keep_ablation, stage, tiny_study

pytestmark = pytest.mark.xdist_group("scheduler")  # one process makes the studies of the fixtures
CPU = torch.device("cpu")


def dvc(*arguments):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A tiny study under DVC with plan and data, not trained."""
    folder = tmp_path_factory.mktemp("planned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tiny_study(folder, tasks=["copying"])
        keep_ablation("qkv_subsets", tasks=["copying"], variants=["none", "k"])
        for package in ("cat", "pipeline"):
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        for name in (".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, folder)
        subprocess.run(["git", "init", "--quiet"], check=True)
        dvc("init", "--quiet")
        dvc("repro", "plan", "generate")
    return folder


@pytest.fixture(scope="module")
def trained(planned, tmp_path_factory):
    """The planned study after `scheduler.run`."""
    folder = shutil.copytree(planned, tmp_path_factory.mktemp("trained") / "study")
    with pytest.MonkeyPatch.context() as patch:
        work_in(folder, patch)
        scheduler.run(jobs=2)
    return folder


@pytest.fixture
def study(planned, tmp_path, monkeypatch):
    """A copy of the planned study as working folder; its stages run with this Python."""
    return work_in(shutil.copytree(planned, tmp_path / "study"), monkeypatch)


@pytest.fixture
def without_evaluation(study):
    """The copy without the stages after training, of which each takes seconds."""
    stages = YAML(typ="safe").load(Path("dvc.yaml"))["stages"]
    kept = {name: stage for name, stage in stages.items() if name in ("plan", "generate") or name.startswith("train_")}
    with Path("dvc.yaml").open("w") as file:
        YAML().dump({"stages": kept}, file)
    return study


@pytest.fixture
def trained_study(trained, tmp_path, monkeypatch):
    """A copy of the trained study as working folder."""
    return work_in(shutil.copytree(trained, tmp_path / "study"), monkeypatch)


def work_in(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    return folder


def test_parallel_and_serial_give_the_same_lock_and_results(study, trained, monkeypatch):
    dvc("repro")
    serial = {p: p.read_bytes() for p in [Path("dvc.lock"), *Path("results").rglob("*.csv"), *Path("runs").rglob("*.*")]}
    assert len([p for p in serial if p.suffix == ".safetensors"]) == sum(len(t.seeds) for t in load_study().training.values())
    monkeypatch.chdir(trained)
    assert {p: p.read_bytes() for p in serial} == serial
    assert dvc("status") == "Data and pipelines are up to date.\n"


def test_if_nothing_is_to_train_no_process_is_prepared(monkeypatch):
    monkeypatch.setattr(scheduler, "_method", None)
    assert list(scheduler.train([], [CPU])) == []


def test_changed_test_splits_do_not_retrain(trained_study):
    assert ran() == []
    edit(**{"tasks.copying.data.test_examples": 31, "tasks.copying.data.multiples": [1, 2, 3]})
    assert sorted(ran()) == ["evaluate@copying", "generate@copying", "judge", "plan", "publish", "render"]


def previewed(*options):
    """Stage -> reason, as `run --dry-run` shows them."""
    before = {path: path.read_bytes() for path in Path().glob("*.*") if path.is_file()}
    text = CliRunner().invoke(main, ["run", "--dry-run", *options], catch_exceptions=False).stdout
    assert {path: path.read_bytes() for path in before} == before
    return dict(re.split(" {2,}", line)[:2] for line in text.partition("\n\n")[0].splitlines()[2:] if line[0] != " ")


def test_a_dry_run_names_the_stages_that_then_run_and_why(trained_study):
    assert previewed() == {}
    edit(**{"variants.k.conv_k": 4})
    shutil.rmtree("runs/copying/none")  # DVC restores it
    names = ["plan", "train_qkv_subsets@copying-k", "evaluate@copying", "judge", "render", "publish"]
    shown = previewed()
    assert [*shown] == names
    assert shown["train_qkv_subsets@copying-k"] == "model.conv_k 3 -> 4"
    assert shown["evaluate@copying"] == "after train_qkv_subsets@copying-k"
    assert [*previewed("--only", "copying", "k")] == names[:2]
    assert previewed("--only", "copying", "none") == {"plan": "params.yaml"}
    assert ran() == names
    edit(**{"variants.k.conv_k": 3})
    assert not previewed().keys() & {*names[1:3]}, "DVC's cache has the models and their scores"


def test_only_the_named_cells_are_trained_and_kept(study):
    Path("runs/copying/old").mkdir(parents=True)  # of an older study: moved away before DVC hashes its folder
    CliRunner().invoke(main, ["run", "--only", "copying", "k"], catch_exceptions=False)
    assert [path.name for path in Path("runs/copying").iterdir()] == ["k"]
    assert previewed("--only", "copying", "k") == {}
    assert "train_qkv_subsets@copying-none" in previewed()
    refused = CliRunner().invoke(main, ["run", "--only", "copying", "nonesuch"])
    assert (refused.exit_code, "nonesuch" in refused.stderr) == (2, True)


def ran():
    """Run `dvc repro` and return the stages that it ran."""
    return re.findall(r"^Running stage '(.+)':$", dvc("repro"), flags=re.MULTILINE)


def test_the_report_and_the_store_are_rebuilt_if_lost_or_outdated(trained_study):
    stamp, lock, report = (Path(name).read_bytes() for name in ("mlartifacts/stamp", "dvc.lock", "reports/report.md"))
    Path("mlflow.db").unlink()
    shutil.rmtree("mlartifacts")
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text + "# A comment.\n")
    assert ran() == ["plan", "publish"]
    assert Path("mlflow.db").exists()
    assert Path("mlartifacts/stamp").read_bytes() != stamp
    assert Path("reports/report.md").read_bytes() != report
    Path("params.yaml").write_text(text)
    assert ran() == ["plan", "publish"]
    assert (Path("mlartifacts/stamp").read_bytes(), Path("dvc.lock").read_bytes()) == (stamp, lock)


@pytest.mark.long
@pytest.mark.skipif(find_spec("dvc_s3") is None or find_spec("moto") is None, reason="dvc-s3 or moto is not installed")
def test_a_clone_restores_the_study_from_s3_and_trains_nothing(trained_study, tmp_path, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/study", method="PUT")).close()
    try:
        dvc("remote", "add", "--default", "team", "s3://study/cache")
        dvc("remote", "modify", "team", "endpointurl", f"http://{host}:{port}")
        dvc("push")
        subprocess.run(["git", "add", "--all"], check=True)
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "Study"], check=True)
        subprocess.run(["git", "clone", "--quiet", trained_study, tmp_path / "clone"], check=True)
        trained_files = {path: path.read_bytes() for path in Path("runs").rglob("*.*")}
        monkeypatch.chdir(tmp_path / "clone")
        dvc("pull")
    finally:
        server.stop()
    assert trained_files
    assert {path: path.read_bytes() for path in Path("runs").rglob("*.*")} == trained_files
    assert ran() == ["publish"], "the store of MLflow is rebuilt from the files"
    assert subprocess.run(["git", "status", "--porcelain"], capture_output=True, check=True).stdout == b""


def test_a_folder_without_stages_is_refused(study):
    Path("dvc.yaml").unlink()
    with pytest.raises(ValueError, match=r"^dvc\.yaml: has no stages"):
        scheduler.run(jobs=2)


def test_a_pipeline_in_a_subfolder_is_ignored(without_evaluation):
    Path("other").mkdir()
    Path("other/dvc.yaml").write_text("stages: {plan: {cmd: python -c 1/0}, more: {cmd: python -c 1/0}}\n")
    scheduler.run(jobs=2)
    assert ran() == []


def test_only_stale_cells_are_trained_and_cached_cells_are_restored(without_evaluation):
    study = load_study()
    names = [f"train_{cell.ablation}@{cell.task}-{cell.variant}" for cell in cells(study)]
    assert [s.stage for s in scheduler.stale_cells()] == names
    scheduler.run(jobs=2)
    assert scheduler.stale_cells() == []
    edit(**{"variants.k.conv_k": 2})
    stage("plan")
    (changed,) = scheduler.stale_cells()
    assert changed.cell[:2] == ("copying", "k")
    edit(**{"variants.k.conv_k": 3})
    stage("plan")
    shutil.rmtree("runs/copying/k")
    assert scheduler.stale_cells() == []  # in DVC's cache
    scheduler.run(jobs=2)
    assert Path("runs/copying/k/summary.json").exists()


def test_a_cell_trained_by_torchrun_can_be_committed_to_dvc(study):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pipeline", "train", "copying", "k"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert read_json(Path("runs/copying/k/summary.json"))["device"] == f"2 x {made_on(CPU)}"
    dvc("commit", "--force", "train_qkv_subsets@copying-k")
    assert "up to date" in dvc("status", "train_qkv_subsets@copying-k")
    assert [stale.cell.variant for stale in scheduler.stale_cells()] == ["none"]


def test_a_failed_cell_is_reported_and_the_others_are_recorded(study, monkeypatch):
    monkeypatch.setattr(scheduler, "_run", fails_on_k)
    with pytest.raises(scheduler.FailedCellsError, match=r"@copying-k: no such luck \(see logs/copying/k.error.txt\)"):
        scheduler.run(jobs=2)
    assert "ZeroDivisionError: no such luck" in Path("logs/copying/k.error.txt").read_text()
    assert not Path("runs/copying/k").exists()
    monkeypatch.undo()
    os.chdir(study)
    assert [failure for _, failure in scheduler.train(scheduler.stale_cells(), [CPU])] == [None]
    assert not Path("logs/copying/k.error.txt").exists()
    shutil.rmtree("runs/copying/k")
    assert [s.cell.variant for s in scheduler.stale_cells()] == ["k"]


def fails_on_k(cell_and_jobs, device, report):
    if cell_and_jobs[0].variant == "k":
        raise ZeroDivisionError("no such luck")
    return scheduler._run(cell_and_jobs, device, report)  # in a worker process it is not patched


def test_a_cell_whose_parameters_change_during_training_is_not_recorded(without_evaluation, monkeypatch):
    train = scheduler.train

    def edits(*arguments):
        yield from train(*arguments)
        edit(**{"variants.k.conv_k": 2})

    monkeypatch.setattr(scheduler, "train", edits)
    scheduler.run(jobs=2)
    assert read_json(Path("runs/copying/k/summary.json"))["model"]["config"]["mixers"][0]["conv_k"] == 2


def test_trained_cells_are_recorded_when_the_study_is_interrupted(study, monkeypatch):
    train = scheduler.train

    def interrupted(*arguments):
        for cell, failure in train(*arguments):
            yield cell, failure
            raise workers.Stopped

    monkeypatch.setattr(scheduler, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scheduler.run(jobs=1)
    assert [s.cell.variant for s in scheduler.stale_cells()] == ["k"]
    assert not Path("results").exists()


@pytest.mark.parametrize(("ending", "code", "last"), [(workers.Stopped, 130, "interrupted"), (ValueError("lost"), 2, "lost")])
def test_failed_cells_are_reported_when_the_study_is_interrupted(study, monkeypatch, ending, code, last):
    def interrupted(stale, *_):
        yield stale[1], "no such luck (see logs/copying/k.error.txt)"
        raise ending

    monkeypatch.setattr(scheduler, "train", interrupted)
    result = CliRunner().invoke(main, ["run", "--jobs", "1"])
    failed = ["failed:", "train_qkv_subsets@copying-k: no such luck (see logs/copying/k.error.txt)"]
    assert result.exit_code == code
    assert result.stderr.splitlines()[-3:] == [*failed, f"run: {last}"]


def test_recording_does_not_train(study):
    (none, k) = scheduler.stale_cells()
    assert [failure for _, failure in scheduler.train([none, k], [CPU])] == [None, None]
    before = Path("runs/copying/k/summary.json").read_bytes()
    edit(**{"variants.k.conv_k": 2})
    stage("plan")
    given = {cell.stage: cell.declared for cell in (none, k)}
    reproduce(given, given)
    assert Path("runs/copying/k/summary.json").read_bytes() == before
    assert [s.cell.variant for s in scheduler.stale_cells()] == ["k"]


def test_trained_cells_are_recorded_from_time_to_time(without_evaluation, monkeypatch):
    recorded = []
    monkeypatch.setattr(scheduler, "RECORD_INTERVAL", 0)
    monkeypatch.setattr(scheduler, "RECORD_RATIO", 0)
    monkeypatch.setattr(scheduler, "reproduce", lambda *a: recorded.append(list(a[0] or ())) or reproduce(*a))
    scheduler.run(jobs=2)
    assert recorded[0] == ["plan", "generate"]
    assert sorted(recorded[1:3]) == [["train_qkv_subsets@copying-k"], ["train_qkv_subsets@copying-none"]]
    assert recorded[3:] == [[]]
    assert ran() == []


def test_recording_takes_a_small_part_of_the_time(study, monkeypatch):
    recorded = []
    monkeypatch.setattr(scheduler, "RECORD_INTERVAL", 0)
    monkeypatch.setattr(scheduler, "reproduce", lambda *a: recorded.append(list(a[0] or ())) or time.sleep(0.1))
    monkeypatch.setattr(scheduler, "train", lambda *_: ((cell, None) for cell in scheduler.stale_cells()))
    scheduler.run(jobs=2)
    assert recorded == [["plan", "generate"], ["train_qkv_subsets@copying-none"], []]


def test_a_cell_is_not_trained_with_other_settings_than_those_in_its_plan(study, monkeypatch, capsys):
    """DVC would record the result for the settings in the plan, and restore it when they return."""
    edit(**{"variants.k.conv_k": 2})  # while `dvc repro` or `run` trains other cells
    message = "params.yaml: has other settings for 'k' on 'copying' than when this run began. Fix: run the command again"
    with pytest.raises(ValueError, match=message):
        scheduler.stale_cells()
    monkeypatch.setenv("DVC_STAGE", "train_qkv_subsets@copying-k")
    monkeypatch.setattr("pipeline.cli._end_with_dvc", lambda: None)
    with pytest.raises(SystemExit):
        stage("train", "copying", "k")
    assert capsys.readouterr().err == f"train: {message}\n"
    assert not Path("runs").exists()
    stage("plan")
    stage("train", "copying", "k")


def test_two_runs_at_once_are_refused(study):
    with exclusive_run(), pytest.raises(ValueError, match="another `python -m pipeline run` is running in this folder"):
        scheduler.run()


def test_if_a_job_raises_or_is_killed_the_others_continue():
    reports = []
    outcomes = dict(
        workers.run_jobs(fails_on_2_and_4, range(1, 10), devices=[CPU, CPU], method="fork", report=lambda *a: reports.append(a))
    )
    assert isinstance(outcomes.pop(1).error, ValueError)
    assert "signal SIGKILL" in str(outcomes.pop(3).error)
    assert outcomes == {job: (job + 1) ** 2 for job in (0, 2, 4, 5, 6, 7, 8)}
    assert sorted(reports) == [(i, i + 1) for i in range(9)]


def fails_on_2_and_4(number, device, report):
    report(number)
    time.sleep(0.05)  # so that the end of a process is noticed while jobs are left
    if number == 2:
        raise ValueError("two is even")
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2


def test_processes_end_with_the_one_that_started_them(tmp_path):
    script = (
        "import torch; from pipeline.runtime import workers; from tests.pipeline.scheduling.test_scheduler import waits\n"
        "devices = [torch.device('cpu')] * 2\n"
        f"for _ in workers.run_jobs(waits, [{str(tmp_path)!r}] * 2, devices=devices, method='fork', report=print): pass"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    assert len(pids) == 2
    while any(alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)


def waits(folder, device, report):
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(120)


def alive(pid):
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_processes_are_distributed_over_the_gpus():
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert scheduler.assign(gpus, 5) == [gpus[0], gpus[1], gpus[0], gpus[1], gpus[0]]
    assert scheduler.assign(gpus, None) == gpus
    assert scheduler.assign([CPU], None) == [CPU] * available()


def test_progress_shows_running_and_finished_cells(study):
    (none, k) = (stage.cell for stage in scheduler.stale_cells())
    output = io.StringIO()
    with Progress([none, k], 2, Console(file=output, width=100)) as progress:
        progress.advance(none, 2, {none.jobs[0]: validation_record(2, [2.5], [1.0], 3.5, 0.25, None)})
        table = io.StringIO()
        Console(file=table, width=100).print(progress.table())
        assert re.search(r"copying none +2 of 10 +2.500 +0.250 +0:00 *\n0 of 2 cells, 10% of the steps", table.getvalue())
        assert "copying k" not in table.getvalue()
        progress.end(
            none, 1.25, [validation_record(2, [loss], [1.0], 3.5, accuracy, None) for loss, accuracy in ((2.0, 0.5), (1.0, 1.0))]
        )
        progress.end(none, 9.0, [])  # reported only once
        progress.fail(k)
        progress.fail(k)
    assert output.getvalue().splitlines() == [
        "2 cells to train, 2 runs at a time",
        "[1/2] copying none: trained in 1.2 s, loss 1.500, accuracy 0.750",
        "[2/2] copying k: failed",
    ]


def test_a_log_has_a_line_per_minute_and_per_finished_run(study, monkeypatch):
    monkeypatch.setattr("pipeline.scheduling.progress.LOG_SECONDS", 0.05)
    (none, k) = (stage.cell for stage in scheduler.stale_cells())
    output, record = io.StringIO(), validation_record(2, [2.5], [1.0], 3.5, 0.25, None)
    with Progress([none, k], 2, Console(file=output, width=20)) as progress:
        progress.advance(none, 2, {none.jobs[0]: record})
        deadline = time.monotonic() + 20
        while "0 of 2 cells" not in output.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
        progress.end_run(none, scheduler.Trained(none.jobs[0], [record], 2, "steps", 0, None, None, {}, {}, "", 0.0))
    (minute,) = {line.split("steps, ")[0] for line in output.getvalue().splitlines() if line.startswith("0 of 2 cells")}
    assert minute == "0 of 2 cells, 10% of the "
    assert "; in training: copying none 2 of 10 steps (loss 2.500)\n" in output.getvalue()
    rate, seed = none.jobs[0]
    assert f"copying none, learning rate {rate:g}, seed {seed}: 2 steps, accuracy 0.250, ended by steps\n" in output.getvalue()


def test_workers_start_without_sockets(monkeypatch):
    def refuse():
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("multiprocessing.forkserver.ensure_running", refuse)
    assert scheduler._method() == "spawn"
    outcomes = workers.run_jobs(_doubled, [1, 2], devices=[CPU], method="spawn", report=lambda *message: None)
    assert dict(outcomes) == {0: 2, 1: 4}


def _doubled(number, device, report):
    return 2 * number
