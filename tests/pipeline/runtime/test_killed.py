"""After `kill -9` of any process at any moment of `dvc repro`, the next `dvc repro` gives the same result."""

import hashlib
import itertools
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML, YAMLError

from tests.helpers.study import ROOT
from tests.pipeline.runtime.test_checkpoints import digests, edit, small_study

STAGES = {"generate": ["generate"], "train": ["train_qkv_subsets"], "evaluate": ["evaluate"], "render": ["render"], "publish": []}
"""Stage to kill -> targets of `dvc repro`."""
OUTPUTS = ("plan", "data", "heldout", "runs", "results", "scores", "verdicts", "reports")
MOMENTS = 10


def dvc(*arguments):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    environment.pop("PYTHONPATH", None)
    environment["PYTHONHASHSEED"] = "0"  # DVC orders stages by hash and writes them to dvc.lock in the order in which they end
    with Path("output").open("a") as output:
        return subprocess.Popen([sys.executable, "-m", "dvc", *arguments], env=environment, stdout=output, stderr=output)


def finish(*arguments):
    process = dvc(*arguments)
    assert process.wait(600) == 0, Path("output").read_text()


def remove_damaged_files():
    """Remove the two files that DVC writes in place, if a kill damaged them: DVC could not read them."""
    for path, load in ((Path(".dvc/tmp/rwlock"), json.loads), (Path("dvc.lock"), YAML(typ="safe").load)):
        try:
            content = load(path.read_text())
            complete = path.suffix != ".lock" or set(content) == {"schema", "stages"}
        except (FileNotFoundError, ValueError, TypeError, YAMLError):
            complete = False
        if not complete:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """The study before and after each stage: stage -> (folder before, folder after, seconds of the stage)."""
    folder = tmp_path_factory.mktemp("snapshots")
    snapshots = {}
    with pytest.MonkeyPatch.context() as patch:
        (folder / "start").mkdir()
        patch.chdir(folder / "start")
        small_study(Path())
        edit(parallel_runs=2, **{"tasks.copying.training.steps": 150})
        for package in ("cat", "pipeline"):
            shutil.copytree(ROOT / package, package, ignore=shutil.ignore_patterns("__pycache__"))
        checkpoints = Path("pipeline/runtime/checkpoints.py")
        code = checkpoints.read_text()
        assert "INTERVAL_SECONDS = 60.0" in code
        checkpoints.write_text(code.replace("INTERVAL_SECONDS = 60.0", "INTERVAL_SECONDS = 0.05"))
        for name in (".gitignore", ".dvcignore"):
            shutil.copy(ROOT / name, name)
        subprocess.run(["git", "init", "--quiet"], check=True)
        finish("init", "--quiet")
        before = Path.cwd()
        for name, targets in STAGES.items():
            shutil.copytree(before, folder / name)
            patch.chdir(folder / name)
            start = time.monotonic()
            finish("repro", *targets)
            snapshots[name] = before, folder / name, time.monotonic() - start
            before = Path.cwd()
    return snapshots


def outcome():
    """Return dvc.lock, the digests of the outputs and the keys of the MLflow runs."""
    keys = set()
    if Path("mlflow.db").exists():
        with sqlite3.connect("mlflow.db") as store:
            query = "select value from tags join runs using (run_uuid) where key = 'cat.key' and lifecycle_stage = 'active'"
            rows = [row for (row,) in store.execute(query)]
            keys = set(rows)
            assert len(keys) == len(rows)
    return Path("dvc.lock").read_text(), {name: digests(Path(name)) for name in OUTPUTS if Path(name).exists()}, keys


def kill_random_process(first, random_state, seconds):
    """Kill a random process of a `dvc repro` after `seconds`; return False if it ended before. All other processes end too."""
    deadline = time.monotonic() + seconds
    while first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        tree = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        victim = random_state.choice(tree)
        command = " ".join(victim.cmdline())
        victim.kill()
    except psutil.NoSuchProcess:
        first.wait(600)
        return False
    with Path("output").open("a") as output:
        output.write(f"killed: {command}\n")
    first.wait(600)
    _, alive = psutil.wait_procs(tree[1:], timeout=30)
    assert not alive
    return True


@pytest.mark.long
@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", STAGES)
def test_a_killed_stage_is_run_again(snapshots, tmp_path, monkeypatch, name, moment):
    before, after, seconds = snapshots[name]
    random_state = random.Random(f"{name} {moment}")
    for attempt in itertools.count():  # if the stage ends before the kill, its duration corrects `seconds`
        shutil.copytree(before, tmp_path / str(attempt))
        monkeypatch.chdir(tmp_path / str(attempt))
        start = time.monotonic()
        if kill_random_process(dvc("repro", *STAGES[name]), random_state, random_state.uniform(0.2, 1) * seconds):
            break
        seconds = min(seconds, time.monotonic() - start) * 0.9
    remove_damaged_files()
    finish("repro", *STAGES[name])
    actual = outcome()
    monkeypatch.chdir(after)
    assert actual == outcome()


@pytest.mark.long
def test_a_damaged_file_in_dvcs_cache_is_found_and_made_again(snapshots, tmp_path, monkeypatch):
    """DVC trusts write-protected files in its cache and checks all others."""
    _, trained, _ = snapshots["train"]
    shutil.copytree(trained, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    weights = Path("runs/copying/k/seed_0.safetensors")
    name = hashlib.md5(weights.read_bytes()).hexdigest()
    before = outcome()
    copy = Path(f".dvc/cache/files/md5/{name[:2]}/{name[2:]}")
    copy.chmod(0o644)
    os.truncate(copy, 1000)
    copy.chmod(0o444)
    weights.unlink()
    finish("repro", "train_qkv_subsets")
    assert weights.stat().st_size == 1000
    weights.unlink()
    subprocess.run(["chmod", "-R", "u+w", ".dvc/cache"], check=True)
    finish("repro", "train_qkv_subsets")
    assert outcome() == before
