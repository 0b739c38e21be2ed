"""A study on a Ray cluster: what a local run makes, to the byte, though a machine is lost; what cannot be done said in words."""

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
from ruamel.yaml import YAML

from pipeline.cli import main
from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.config.study import Resources
from pipeline.scheduling import ray_cluster, scheduler
from pipeline.storage.paths import DATA
from tests.helpers.study import ROOT, edit
from tests.pipeline.scheduling.test_scheduler import planned, study  # noqa: F401  fixtures

# Ray reads these when it is imported; nothing of the user's home is used or made.
os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
import ray
from ray.cluster_utils import Cluster

MACHINE = {"num_cpus": 1, "num_gpus": 0, "memory": 4 << 30, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def machines():
    """A cluster of one machine; its address is what a command names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # the jobs of these tests are in them
        machines = Cluster(initialize_head=True, head_node_args={**MACHINE, "include_dashboard": False})
        yield machines
        machines.shutdown()


@pytest.fixture
def doomed(machines):
    """A second machine, to be lost."""
    machine = machines.add_node(**MACHINE)
    yield machine
    if machine in machines.list_all_nodes():
        machines.remove_node(machine, allow_graceful=False)


@pytest.fixture
def joined(machines, study):  # noqa: F811
    with ray_cluster.join(machines.address, load_study()) as joined:
        yield joined


def test_a_study_of_which_a_machine_is_lost_ends_as_a_local_one(study, machines, doomed, tmp_path, monkeypatch):  # noqa: F811
    only_until_evaluation()
    shutil.copytree(study, tmp_path / "local")
    killer = threading.Thread(target=kill_once_at_work, args=(machines, doomed, tmp_path / "at work"))
    killer.start()
    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "_run", partial(never_ends_on, doomed.node_id, tmp_path / "at work"))
        scheduler.run(ray=machines.address)
    killer.join()
    assert (tmp_path / "at work").exists()
    assert doomed not in machines.list_all_nodes()
    remote = {p: p.read_bytes() for p in files()}
    monkeypatch.chdir(tmp_path / "local")
    scheduler.run(jobs=2)
    assert {p: p.read_bytes() for p in files()} == remote


def files():
    folders = ("data", "heldout", "plan", "runs", "results", "scores")
    return [Path("dvc.lock"), *(p for folder in folders for p in Path(folder).rglob("*") if p.is_file())]


def only_until_evaluation():
    """What comes after it knows nothing of where the cells were trained."""
    stages = YAML(typ="safe").load(Path("dvc.yaml"))
    stages["stages"] = {name: stage for name, stage in stages["stages"].items() if name not in ("judge", "render", "publish")}
    with Path("dvc.yaml").open("w") as file:
        YAML().dump({"stages": stages["stages"]}, file)


def never_ends_on(machine, at_work, cell_and_jobs, device, report):
    """Trains, but on the machine stays in the middle of a run, after its first look at the validation split."""

    def tell(message):
        report(message)
        if ray.get_runtime_context().get_node_id() == machine:
            at_work.touch()
            time.sleep(600)

    return scheduler._run(cell_and_jobs, device, tell)  # on the machine, it is what it was


def kill_once_at_work(machines, machine, at_work):
    deadline = time.monotonic() + 300
    while not at_work.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    machines.remove_node(machine, allow_graceful=False)


def test_a_job_that_raises_or_is_killed_fails_alone_and_one_that_is_lost_is_begun_again(joined, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_cluster, "RETRIES", 1)
    told = {}
    work = joined.work(
        partial(unlucky, tmp_path),
        ["fine", "raises", "killed", "lost once"],
        tasks=["copying"] * 4,
        report=lambda index, message: told.setdefault(index, []).append(message),
    )
    outcomes = dict(work)
    assert (outcomes[0], outcomes[3]) == ("FINE", "LOST ONCE")
    assert isinstance(outcomes[1].error, ZeroDivisionError)
    assert 'raise ZeroDivisionError("no such luck")' in outcomes[1].trace
    assert str(outcomes[2].error).startswith("its process or machine was lost 2 times: ")
    tried = (tmp_path / "tried").read_text().split("\n")
    assert {name: tried.count(name) for name in ("fine", "raises", "killed", "lost once")} == {
        "fine": 1,
        "raises": 1,
        "killed": 2,
        "lost once": 2,
    }
    assert [sum(steps for steps, _ in told[index]) for index in (0, 3)] == [7, 7]
    assert told[0][-1][1] == "row"


def unlucky(folder, job, device, report):
    with (folder / "tried").open("a") as file:
        file.write(f"{job}\n")
    for _ in range(3):
        report((2, "row"))
    report((1, None))
    if job == "raises":
        raise ZeroDivisionError("no such luck")
    if job == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if job == "lost once" and (folder / "tried").read_text().count(job) == 1:
        time.sleep(2 * ray_cluster.QUIET)  # for the report to be seen
        os.kill(os.getpid(), signal.SIGKILL)
    return job.upper()


def test_what_is_in_work_ends_when_nobody_waits_for_it_and_leaves_nothing(joined, tmp_path):
    names = ["first", "second"]
    with closing(joined.work(partial(waits, tmp_path), names, tasks=["copying"] * 2, report=lambda *_: None)) as work:
        assert next(work) == (0, None)
        (place,) = wait_for(lambda: list(tmp_path.glob("second")))
        folder = Path(place.read_text())
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


def test_a_cell_that_fails_is_reported_while_the_others_are_recorded(study, machines, monkeypatch):  # noqa: F811
    monkeypatch.setattr(scheduler, "_run", breaks_on_k)
    with pytest.raises(scheduler.FailedCellsError, match=r"^train_streams@copying-k: no such luck \(see logs/copying/k.error"):
        scheduler.run(ray=machines.address)
    assert "ZeroDivisionError: no such luck" in Path("logs/copying/k.error.txt").read_text()
    assert [s.cell.variant for s in scheduler.stale_cells()] == ["k"]


def test_a_study_that_no_machine_is_left_for_ends_in_words_with_what_is_done_recorded(study, machines, monkeypatch):  # noqa: F811
    train = scheduler.train

    def loses_all(*arguments):
        for cell, failure in train(*arguments):
            yield cell, failure
            monkeypatch.setattr(ray_cluster, "_room", lambda asked: 0)

    monkeypatch.setattr(scheduler, "train", loses_all)
    monkeypatch.setattr(scheduler, "_run", stays_on_k)
    monkeypatch.setattr(ray_cluster, "PATIENCE", 1)
    with pytest.raises(ValueError, match=r"^no machine of the Ray cluster has 1 CPU, 0 GPU and 1 GB of memory any more$"):
        scheduler.run(ray=machines.address)
    assert [s.cell.variant for s in scheduler.stale_cells()] == ["k"]


def stays_on_k(cell_and_jobs, device, report):
    if cell_and_jobs[0].variant == "k":
        time.sleep(600)
    return scheduler._run(cell_and_jobs, device, report)  # on the machine, it is what it was


def breaks_on_k(cell_and_jobs, device, report):
    if cell_and_jobs[0].variant == "k":
        raise ZeroDivisionError("no such luck")
    return scheduler._run(cell_and_jobs, device, report)


def test_no_more_than_asked_for_is_sent(joined, machines, doomed):
    assert (joined.size, ray_cluster._room(Resources())) == (1, 2)
    assert ray_cluster._room(Resources(cpus=0.1, memory_gb=1)) == 8
    assert ray_cluster._room(Resources(cpus=0.3, memory_gb=0.1)) == 6
    assert ray_cluster._room(Resources(cpus=2)) == ray_cluster._room(Resources(gpus=0.5)) == 0
    for jobs, sent in ((1, 1), (None, 4)):
        calls = ray_cluster._Sent(ray_cluster.Cluster(load_study(), jobs), len, [None] * 9, ["copying"] * 9)
        calls.look()
        calls.fill()
        assert len(calls.working) == sent
        calls.cancel()


def test_a_job_has_its_task_s_data_but_no_test_split_and_one_thread(study, machines):  # noqa: F811
    call = ray_cluster._Call(looks_around, None, "copying", torch.device("cpu"), torch.__version__)
    threads = torch.get_num_threads()
    try:
        _, (folder, found, count) = ray_cluster._job(call, ray_cluster._files("copying"), None, 0)
    finally:
        torch.set_num_threads(threads)
    assert sorted(found) == ["meta.json", "train.npz", "valid.npz"]
    assert {name: (DATA / "copying" / name).read_bytes() for name in found} == found
    assert count == 1
    assert folder != Path.cwd() == study
    assert not folder.exists()


def looks_around(job, device, report):
    torch.set_num_threads(torch.get_num_threads())
    return Path.cwd(), {p.name: p.read_bytes() for p in (DATA / "copying").iterdir()}, torch.get_num_threads()


def test_another_torch_is_refused():
    call = ray_cluster._Call(looks_around, None, "copying", torch.device("cpu"), "1.0.0+cu118")
    _, failure = ray_cluster._job(call, {}, None, 0)
    assert str(failure.error) == f"torch is {torch.__version__} on {socket.gethostname()}, not 1.0.0+cu118 as here"
    same = call._replace(function=nothing, torch=torch.__version__.partition("+")[0] + "+other")
    assert ray_cluster._job(same, {}, None, 0) == ((0, None), None)


def nothing(job, device, report):
    pass


def test_reports_are_rare_and_the_last_one_comes_with_the_outcome(monkeypatch):
    put = []
    box = SimpleNamespace(put=SimpleNamespace(remote=lambda *message: put.append(message)))
    call = ray_cluster._Call(reports_often, None, "copying", torch.device("cpu"), torch.__version__)
    assert ray_cluster._job(call, {}, box, 3) == ((1000, "row 999"), "done")
    assert put == [(3, (1, "row 0"))]
    monkeypatch.setattr(ray_cluster, "QUIET", -1)
    ray_cluster._job(call, {}, box, 3)
    assert put[-1] == (3, (1000, "row 999"))


def reports_often(job, device, report):
    for i in range(1000):
        report((1, f"row {i}" if i != 500 else None))
    return "done"


def test_a_cell_trained_on_different_machines_names_them_all():
    def trained(device):
        return scheduler.Trained(None, [], 0, "", 0, None, None, {}, {}, device, 0.0)

    cells = [trained(name) for name in ("CPU (AVX512)", "CPU (AVX2)", "CPU (AVX512)")]
    assert [run.device for run in scheduler.name_devices(cells)] == ["CPU (AVX2) and CPU (AVX512)"] * 3
    assert scheduler.name_devices(cells[:1]) == cells[:1]


@pytest.mark.parametrize(
    ("resources", "line"),
    [
        ({"cpus": 9999}, "no machine of the Ray cluster has 9999 CPU, 0 GPU and 1 GB of memory for a job on task 'copying'"),
        ({"tasks": {"copying": {"gpus": 0.5}}}, "no machine of the Ray cluster has 1 CPU, 0.5 GPU and 1 GB of memory for a job"),
    ],
)
def test_what_no_machine_has_is_refused(study, machines, resources, line):  # noqa: F811
    edit(resources=resources, device="auto")
    with pytest.raises(ValueError, match=f"^{line}"):
        scheduler.run(ray=machines.address)
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("device", "gpus", "line"),
    [
        ("cpu", 0.5, "cpu: resources ask for 1 CPU, 0.5 GPU and 1 GB of memory on task 'copying'; use auto"),
        ("cuda", 0, "cuda: resources ask for 1 CPU, 0 GPU and 1 GB of memory on task 'copying'; use auto"),
        ("cuda:1", 1, "cuda:1: Ray chooses among GPUs; use auto or cuda"),
    ],
)
def test_devices_that_contradict_the_resources_are_refused(study, device, gpus, line):  # noqa: F811
    edit(resources={"gpus": gpus}, device=device)
    with pytest.raises(ParamsError) as refused, ray_cluster.join("auto", load_study()):
        pass
    assert refused.value.lines == [f"params.yaml: device = {line}"]


def test_a_task_may_ask_for_something_else(study):  # noqa: F811
    edit(resources={"cpus": 2, "tasks": {"copying": {"gpus": 0.25}}})
    assert load_study().resources.on("copying") == Resources(cpus=2, gpus=0.25, memory_gb=1)
    assert load_study().resources.on("ar") == Resources(cpus=2, gpus=0, memory_gb=1)
    edit(resources={"tasks": {"copyin": {}}})
    with pytest.raises(ParamsError, match=r"resources.tasks.copyin: is not among tasks; did you mean 'copying'\?"):
        load_study()


def test_what_resources_say_makes_no_cell_stale(study):  # noqa: F811
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


def test_a_cluster_that_is_not_there_is_one_line(study, monkeypatch):  # noqa: F811
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        none = f"run: no Ray cluster at {address}: [Errno {errno.ECONNREFUSED}] {os.strerror(errno.ECONNREFUSED)}"
        assert refused("--ray", address) == none
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert refused("--ray") == none
    monkeypatch.delenv("RAY_ADDRESS")
    assert refused("--ray", "ray://host:1") == "run: --ray ray://host:1: is not host:port or auto or local"
    monkeypatch.setattr(ray, "init", finds_none)
    assert refused("--ray") == "run: no Ray cluster at auto: Could not find any running Ray instance."
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refused("--ray", "auto") == "run: Ray is not installed: pip install 'cat-study[ray]'"


def finds_none(address, **options):
    raise ConnectionError("Could not find any running Ray instance.\nMore of it.")


def test_the_address_may_be_left_out(monkeypatch):
    calls = []
    monkeypatch.setattr(scheduler, "run", lambda **options: calls.append(options))
    for arguments in ([], ["--ray"], ["--ray", "--jobs", "3"], ["--ray", "head:6379", "--jobs", "3"]):
        assert CliRunner().invoke(main, ["run", *arguments]).exit_code == 0
    assert calls == [
        {"jobs": None, "ray": None},
        {"jobs": None, "ray": "auto"},
        {"jobs": 3, "ray": "auto"},
        {"jobs": 3, "ray": "head:6379"},
    ]
