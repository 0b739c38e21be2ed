"""A study on a Ray cluster gives the bytes of a local run, even if a machine is lost; errors are one line."""

import errno
import os
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.config.study import Resources
from pipeline.scheduling import ray_cluster, scheduler
from pipeline.storage.paths import DATA
from tests.helpers.study import ROOT, edit
from tests.pipeline.scheduling.test_scheduler import planned, study, without_evaluation  # noqa: F401  fixtures

# Ray reads these when it is imported; they keep it from using the user's home folder.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
import ray
from ray.cluster_utils import Cluster

pytestmark = pytest.mark.xdist_group("ray")  # one process starts the cluster
MACHINE = {"num_cpus": 1, "num_gpus": 0, "memory": 4 << 30, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def machines():
    """A cluster of one machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the jobs are functions of the tests
        machines = Cluster(initialize_head=True, head_node_args={**MACHINE, "include_dashboard": False})
        yield machines
        machines.shutdown()


@pytest.fixture
def doomed(machines):
    """A second machine that the test may kill."""
    machine = machines.add_node(**MACHINE)
    yield machine
    if machine in machines.list_all_nodes():
        machines.remove_node(machine, allow_graceful=False)


@pytest.fixture
def joined(machines, study):  # noqa: F811
    with ray_cluster.join(machines.address, load_study()) as joined:
        yield joined


def test_a_study_that_loses_a_machine_gives_the_bytes_of_a_local_one(
    without_evaluation,  # noqa: F811
    machines,
    doomed,
    tmp_path,
    monkeypatch,
):
    shutil.copytree(without_evaluation, tmp_path / "local")
    killer = threading.Thread(target=kill_once_running, args=(machines, doomed, tmp_path / "running"))
    killer.start()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_run", partial(hangs_on, doomed.node_id, tmp_path / "running"))
        scheduler.run(ray=machines.address)
    killer.join()
    assert (tmp_path / "running").exists()
    assert doomed not in machines.list_all_nodes()
    remote = {p: p.read_bytes() for p in files()}
    monkeypatch.chdir(tmp_path / "local")
    scheduler.run(jobs=2)
    assert {p: p.read_bytes() for p in files()} == remote


def files():
    folders = ("data", "heldout", "plan", "runs")  # later stages do not depend on where the cells were trained
    return [Path("dvc.lock"), *(p for folder in folders for p in Path(folder).rglob("*") if p.is_file())]


def hangs_on(machine, running, cell_and_jobs, device, report):
    """Train, but on `machine` hang after the first validation of a run."""

    def report_and_hang(message):
        report(message)
        if ray.get_runtime_context().get_node_id() == machine:
            running.touch()
            time.sleep(600)

    return scheduler._run(cell_and_jobs, device, report_and_hang)  # not patched in the process of the job


def kill_once_running(machines, machine, running):
    deadline = time.monotonic() + 300
    while not running.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    machines.remove_node(machine, allow_graceful=False)


def test_a_job_that_raises_fails_and_a_job_that_is_lost_is_restarted(joined, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "RETRIES", 1)
    reports = {}
    outcomes = joined.run_jobs(
        partial(may_fail, tmp_path),
        ["fine", "raises", "killed", "lost once"],
        tasks=["copying"] * 4,
        report=lambda index, message: reports.setdefault(index, []).append(message),
    )
    outcomes = dict(outcomes)
    assert (outcomes[0], outcomes[3]) == ("FINE", "LOST ONCE")
    assert isinstance(outcomes[1].error, ZeroDivisionError)
    assert 'raise ZeroDivisionError("no such luck")' in outcomes[1].trace
    assert "was lost 2 times" in str(outcomes[2].error)
    started = (tmp_path / "started").read_text().split("\n")
    assert {name: started.count(name) for name in ("fine", "raises", "killed", "lost once")} == {
        "fine": 1,
        "raises": 1,
        "killed": 2,
        "lost once": 2,
    }
    assert [sum(steps for steps, _ in reports[index]) for index in (0, 3)] == [7, 7]
    assert reports[0][-1][1] == {"run": "record"}


def may_fail(folder, job, device, report):
    with (folder / "started").open("a") as file:
        file.write(f"{job}\n")
    for _ in range(3):
        report((2, {"run": "record"}))
    report((1, {}))
    if job == "raises":
        raise ZeroDivisionError("no such luck")
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "lost once" and (folder / "started").read_text().count(job) == 1:
        time.sleep(2 * ray_cluster.POLL_SECONDS)  # so that the report arrives
        os.kill(os.getpid(), signal.SIGKILL)
    return job.upper()


def test_closing_the_iterator_cancels_running_jobs_and_removes_their_folders(joined, tmp_path):
    names = ["first", "second"]
    outcomes = joined.run_jobs(partial(waits, tmp_path), names, tasks=["copying"] * 2, report=lambda *_: None)
    with closing(outcomes):
        assert next(outcomes) == (0, None)
        (note,) = wait_for(lambda: list(tmp_path.glob("second")))
        folder = Path(note.read_text())
        assert folder.exists()
    wait_for(lambda: not folder.exists())
    assert (tmp_path / "ended").exists()


def waits(notes, job, device, report):
    if job == "first":
        return
    try:
        (notes / "part").write_text(str(Path.cwd()))
        (notes / "part").rename(notes / job)
        while True:
            time.sleep(0.05)
    except KeyboardInterrupt:
        (notes / "ended").touch()
        raise


def wait_for(condition):
    deadline = time.monotonic() + 300
    while not (answer := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return answer


def test_a_failed_cell_is_reported_and_the_others_are_recorded(study, machines, monkeypatch):  # noqa: F811
    monkeypatch.setattr(scheduler, "_run", fails_on_k)
    with pytest.raises(
        scheduler.FailedCellsError, match=r"^train_qkv_subsets@copying-k: no such luck \(see logs/copying/k.error"
    ):
        scheduler.run(ray=machines.address)
    assert "ZeroDivisionError: no such luck" in Path("logs/copying/k.error.txt").read_text()
    assert [s.cell.variant for s in scheduler.stale_cells()] == ["k"]


def test_a_study_without_machines_ends_with_trained_cells_recorded(study, machines, monkeypatch):  # noqa: F811
    train = scheduler.train

    def loses_all(*arguments):
        for cell, failure in train(*arguments):
            yield cell, failure
            monkeypatch.setattr(ray_cluster, "_capacity", lambda resources: 0)

    monkeypatch.setattr(scheduler, "train", loses_all)
    monkeypatch.setattr(scheduler, "_run", hangs_on_k)
    monkeypatch.setattr(ray_cluster, "MACHINE_TIMEOUT", 1)
    with pytest.raises(ValueError, match=r"^no machine of the Ray cluster has .* any more$"):
        scheduler.run(ray=machines.address)
    assert [s.cell.variant for s in scheduler.stale_cells()] == ["k"]


def hangs_on_k(cell_and_jobs, device, report):
    if cell_and_jobs[0].variant == "k":
        time.sleep(600)
    return scheduler._run(cell_and_jobs, device, report)  # not patched in the process of the job


def fails_on_k(cell_and_jobs, device, report):
    if cell_and_jobs[0].variant == "k":
        raise ZeroDivisionError("no such luck")
    return scheduler._run(cell_and_jobs, device, report)


def test_at_most_twice_the_capacity_is_submitted(joined, machines, doomed):
    capacity = ray_cluster._capacity
    assert (joined.size, capacity(Resources())) == (1, 2)
    assert capacity(Resources(cpus=0.1, memory_gb=1)) == 8
    assert capacity(Resources(cpus=0.3, memory_gb=0.1)) == 6
    assert capacity(Resources(cpus=2)) == capacity(Resources(gpus=0.5)) == 0
    for jobs, submitted in ((1, 1), (None, 4)):
        queue = ray_cluster._JobQueue(ray_cluster.Cluster(load_study(), jobs), len, [None] * 9, ["copying"] * 9)
        queue.poll()
        queue.submit()
        assert len(queue.submitted) == submitted
        queue.cancel()


def test_a_job_has_the_data_of_its_task_without_test_splits_and_one_thread(study, machines):  # noqa: F811
    call = ray_cluster._Call(list_data, None, "copying", torch.device("cpu"), torch.__version__)
    threads = torch.get_num_threads()
    try:
        _, (folder, files, thread_count) = ray_cluster._job(call, ray_cluster._files("copying"), None, 0)
    finally:
        torch.set_num_threads(threads)
    assert sorted(files) == ["meta.json", "train.npz", "valid.npz"]
    assert {name: (DATA / "copying" / name).read_bytes() for name in files} == files
    assert thread_count == 1
    assert folder != Path.cwd() == study
    assert not folder.exists()


def list_data(job, device, report):
    torch.set_num_threads(torch.get_num_threads())
    return Path.cwd(), {p.name: p.read_bytes() for p in (DATA / "copying").iterdir()}, torch.get_num_threads()


def test_another_version_of_torch_is_refused():
    call = ray_cluster._Call(list_data, None, "copying", torch.device("cpu"), "1.0.0+cu118")
    _, failure = ray_cluster._job(call, {}, None, 0)
    assert str(failure.error).startswith(f"torch is {torch.__version__} on {socket.gethostname()}, but 1.0.0+cu118")
    same = call._replace(function=nothing, torch=torch.__version__.partition("+")[0] + "+other")
    assert ray_cluster._job(same, {}, None, 0) == ((0, {}), None)


def nothing(job, device, report):
    pass


def test_reports_are_rare_and_the_last_one_comes_with_the_outcome(monkeypatch):
    put = []
    mailbox = SimpleNamespace(put=SimpleNamespace(remote=lambda *message: put.append(message)))
    call = ray_cluster._Call(reports_often, None, "copying", torch.device("cpu"), torch.__version__)
    assert ray_cluster._job(call, {}, mailbox, 3) == ((1000, {"even": "record 998", "odd": "record 999"}), "done")
    assert [(index, steps) for index, (steps, _) in put] == [(3, 1)]
    monkeypatch.setattr(ray_cluster, "POLL_SECONDS", -1)
    ray_cluster._job(call, {}, mailbox, 3)
    assert put[-1] == (3, (1000, {"even": "record 998", "odd": "record 999"}))


def reports_often(job, device, report):
    for i in range(1000):
        report((1, {("even", "odd")[i % 2]: f"record {i}"} if i != 500 else {}))
    return "done"


def test_a_cell_trained_on_different_machines_names_all_devices():
    def trained(device):
        return scheduler.Trained(None, [], 0, "", 0, None, None, {}, {}, device, 0.0)

    cells = [trained(name) for name in ("CPU (AVX512)", "CPU (AVX2)", "CPU (AVX512)")]
    assert [run.device for run in scheduler.name_devices(cells)] == ["CPU (AVX2) and CPU (AVX512)"] * 3
    assert scheduler.name_devices(cells[:1]) == cells[:1]


@pytest.mark.parametrize(
    ("resources", "missing"),
    [
        ({"cpus": 9999}, "9999 CPU, 0 GPU and 1 GB of memory for a job on task 'copying'"),
        ({"tasks": {"copying": {"gpus": 0.5}}}, "1 CPU, 0.5 GPU and 1 GB of memory for a job"),
    ],
)
def test_resources_that_no_machine_has_are_refused(study, machines, resources, missing):  # noqa: F811
    edit(resources=resources, device="auto")
    with pytest.raises(ValueError, match=f"^no machine of the Ray cluster has {missing}"):
        scheduler.run(ray=machines.address)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("device", "gpus", "line"),
    [
        ("cpu", 0.5, "cpu: resources of task 'copying' are 1 CPU, 0.5 GPU and 1 GB of memory; use auto"),
        ("cuda", 0, "cuda: resources of task 'copying' are 1 CPU, 0 GPU and 1 GB of memory; use auto"),
        ("cuda:1", 1, "cuda:1: Ray chooses the GPU; use auto or cuda"),
    ],
)
def test_devices_that_contradict_the_resources_are_refused(study, device, gpus, line):  # noqa: F811
    edit(resources={"gpus": gpus}, device=device)
    with pytest.raises(ParamsError) as refused, ray_cluster.join("auto", load_study()):
        pass
    assert refused.value.lines == [f"params.yaml: device = {line}"]


def test_a_task_may_have_its_own_resources(study):  # noqa: F811
    edit(resources={"cpus": 2, "tasks": {"copying": {"gpus": 0.25}}})
    assert load_study().resources.on("copying") == Resources(cpus=2, gpus=0.25, memory_gb=1)
    assert load_study().resources.on("ar") == Resources(cpus=2, gpus=0, memory_gb=1)
    edit(resources={"tasks": {"copyin": {}}})
    with pytest.raises(ParamsError, match=r"resources.tasks.copyin: .*did you mean 'copying'\?"):
        load_study()


def test_resources_make_no_cell_stale(study):  # noqa: F811
    declared = [cell.declared for cell in scheduler.stale_cells()]
    edit(resources={"cpus": 2, "tasks": {"copying": {"memory_gb": 3}}})
    assert [cell.declared for cell in scheduler.stale_cells()] == declared


def refused(*arguments):
    start = time.monotonic()
    result = CliRunner().invoke(main, ["run", *arguments])
    assert time.monotonic() - start < 30
    assert result.exit_code == 2
    (line,) = result.output.splitlines()
    return line


def test_an_unreachable_cluster_is_reported_in_one_line(study, monkeypatch):  # noqa: F811
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nothing listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        expected = f"run: no Ray cluster at {address}: [Errno {errno.ECONNREFUSED}] {os.strerror(errno.ECONNREFUSED)}"
        assert refused("--ray", address) == expected
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert refused("--ray") == expected
    monkeypatch.delenv("RAY_ADDRESS")
    assert refused("--ray", "ray://host:1") == "run: --ray ray://host:1: is not host:port, auto or local"
    monkeypatch.setattr(ray, "init", finds_none)
    assert refused("--ray") == "run: no Ray cluster at auto: Could not find any running Ray instance."
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused("--ray", "auto") == "run: Ray is not installed: pip install 'cat-study[ray]'"


def finds_none(address, **options):
    raise ConnectionError("Could not find any running Ray instance.\nMore of it.")


def test_the_address_is_optional(monkeypatch):
    calls = []
    monkeypatch.setattr(scheduler, "run", lambda **options: calls.append(options))
    for arguments in ([], ["--ray"], ["--ray", "--jobs", "3"], ["--ray", "head:6379", "--jobs", "3"]):
        assert CliRunner().invoke(main, ["run", *arguments]).exit_code == 0
    assert calls == [
        {"jobs": None, "ray": None, "only": ()},
        {"jobs": None, "ray": "auto", "only": ()},
        {"jobs": 3, "ray": "auto", "only": ()},
        {"jobs": 3, "ray": "head:6379", "only": ()},
    ]
