"""Two folders log to a server at once: its runs are in PostgreSQL, and it serves the artifacts."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pipeline.config.load import load_study
from pipeline.storage.runs import load_model
from pipeline.tracking.records import report_record, task_records
from pipeline.tracking.store import load_run
from tests.helpers.study import shared_study, stage

pytestmark = pytest.mark.xdist_group("tracking")
PROGRAMS = os.pathsep.join([os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])


def missing():
    """Say why this machine cannot run the test; empty if it can."""
    if not all(shutil.which(name, path=PROGRAMS) for name in ("initdb", "pg_ctl")):
        return "PostgreSQL is not installed"
    if find_spec("psycopg") is None:
        return "psycopg is not installed"
    return "" if os.geteuid() or user() else "PostgreSQL does not run as root, and there is no user postgres or nobody"


def user():
    """Another user for PostgreSQL, which refuses to run as root; None for the present one."""
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()} if os.geteuid() == 0 else set()
    return next((name for name in ("postgres", "nobody") if name in names), None)


@pytest.fixture
def database():
    """The address of an empty database, in a folder that the other user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        if user():
            shutil.chown(folder, user())

        def run(name, *arguments):
            command = [shutil.which(name, path=PROGRAMS), *arguments]
            done = subprocess.run(command, user=user(), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            assert done.returncode == 0, done.stdout

        data, log = f"{folder}/data", f"{folder}/log"
        run("initdb", "--pgdata", data, "--auth", "trust", "--username", "study", "--no-sync")
        run("pg_ctl", "start", "--wait", "--pgdata", data, "--log", log, "--options", f"-F -c listen_addresses= -k {folder}")
        try:
            yield f"postgresql+psycopg://study@/postgres?host={folder}"
        finally:
            run("pg_ctl", "stop", "--pgdata", data, "--mode", "immediate")


@pytest.fixture
def server(database, tmp_path):
    """The address of `mlflow server`, as docs/guide.md starts it."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = str(free.getsockname()[1])
    places = ["--backend-store-uri", database, "--artifacts-destination", str(tmp_path / "artifacts")]
    reached = ["--host", "127.0.0.1", "--port", port, "--allowed-hosts", f"127.0.0.1:{port}", "--workers", "2"]
    command = [sys.executable, "-m", "mlflow", "server", *places, *reached]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.mark.long
@pytest.mark.skipif(bool(missing()), reason=missing())
def test_two_folders_log_to_a_server_at_once(server, tmp_path_factory, tmp_path, monkeypatch):
    """The second has other scores. A result that both logged at once has two runs until the next `track`."""
    from mlflow.tracking import MlflowClient

    finished = shared_study(tmp_path_factory, tasks=["copying"])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.delenv("DVC_EXP_NAME", raising=False)
    folders = [shutil.copytree(finished, tmp_path / name) for name in ("first", "second")]
    table = folders[1] / "results" / "copying.csv"
    table.write_text(table.read_text().replace(",qk,", ",QK,").replace(",k,", ",qk,").replace(",QK,", ",k,"))
    command = [sys.executable, "-m", "pipeline", "track"]
    processes = [subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) for folder in folders]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors

    client = MlflowClient(server)
    ids = [client.get_experiment_by_name(name).experiment_id for name in ("study", "copying")]
    for folder in folders:
        monkeypatch.chdir(folder)
        stage("track")
        study = load_study()
        keys = {record.key for record in (report_record(study), *task_records(study))}
        runs = client.search_runs(ids, "tags.current = 'yes'")
        assert keys <= {run.data.tags["cat.key"] for run in runs if run.info.status == "FINISHED"}
    assert len({run.data.tags["cat.key"] for run in runs}) == len(runs)

    run = next(run for run in runs if run.data.tags.get("variant") == "qk" and run.data.tags["seed"] == "1")
    assert run.info.artifact_uri.startswith("mlflow-artifacts:")
    weights = load_model("runs/copying/qk/seed_1.safetensors").state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_run(run.info.run_id).state_dict().items())
