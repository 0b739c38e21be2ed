"""`kill -9` of any process at any moment of `dvc repro`: the next one finishes, and all is as if nothing had happened."""

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

STAGES = {"generate": ["generate"], "train": ["train_streams"], "evaluate": ["evaluate"], "render": ["render"], "publish": []}
"""What is killed -> targets of `dvc repro`."""
OUTPUTS = ("plan", "data", "heldout", "runs", "results", "scores", "verdicts", "reports")
MOMENTS = 10


def dvc(*arguments):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
    environment.pop("PYTHONPATH", None)
    environment["PYTHONHASHSEED"] = "0"  # by which DVC puts stages in order, and writes them into dvc.lock as they end
    with Path("said").open("a") as said:
        return subprocess.Popen([sys.executable, "-m", "dvc", *arguments], env=environment, stdout=said, stderr=said)


def finish(*arguments):
    process = dvc(*arguments)
    assert process.wait(600) == 0, Path("said").read_text()


def mend():
    """What is left to do: DVC writes two files in place, and where it is killed in that moment it cannot read them."""
    for path, load in ((Path(".dvc/tmp/rwlock"), json.loads), (Path("dvc.lock"), YAML(typ="safe").load)):
        try:
            content = load(path.read_text())
            whole = path.suffix != ".lock" or set(content) == {"schema", "stages"}
        except (FileNotFoundError, ValueError, TypeError, YAMLError):
            whole = False
        if not whole:
            path.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def stood(tmp_path_factory):
    """The study before and after each of the stages: name -> (folder, folder, seconds that lie between)."""
    folder = tmp_path_factory.mktemp("stood")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        (folder / "start").mkdir()
        patch.chdir(folder / "start")
        small_study(Path())
        edit(threads=2, **{"tasks.copying.train.steps": 150})
        for package in ("cat", "pipeline"):
            shutil.copytree(ROOT / package, package, ignore=shutil.ignore_patterns("__pycache__"))
        checkpoints = Path("pipeline/runtime/checkpoints.py")
        checkpoints.write_text(checkpoints.read_text().replace("EVERY = 60.0", "EVERY = 0.05"))
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
            found[name] = before, folder / name, time.monotonic() - start
            before = Path.cwd()
    return found


def outcome():
    """What DVC has recorded, the outputs, and what MLflow has."""
    tracked = set()
    if Path("mlflow.db").exists():
        with sqlite3.connect("mlflow.db") as store:
            query = "select value from tags join runs using (run_uuid) where key = 'cat.key' and lifecycle_stage = 'active'"
            rows = [row for (row,) in store.execute(query)]
            tracked = set(rows)
            assert len(tracked) == len(rows)
    return Path("dvc.lock").read_text(), {name: digests(Path(name)) for name in OUTPUTS if Path(name).exists()}, tracked


def killed(first, chance, seconds):
    """Whether one of the processes of a `dvc repro` could be killed after so many seconds; the others have ended as well."""
    deadline = time.monotonic() + seconds
    while first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    try:
        tree = [psutil.Process(first.pid), *psutil.Process(first.pid).children(recursive=True)]
        victim = chance.choice(tree)
        command = " ".join(victim.cmdline())
        victim.kill()
    except psutil.NoSuchProcess:
        first.wait(600)
        return False
    Path("said").write_text(f"{Path('said').read_text()}killed: {command}\n")
    first.wait(600)
    _, left = psutil.wait_procs(tree[1:], timeout=30)
    assert not left
    return True


@pytest.mark.long
@pytest.mark.parametrize("moment", range(MOMENTS))
@pytest.mark.parametrize("name", STAGES)
def test_what_is_killed_is_done_again(stood, tmp_path, monkeypatch, name, moment):
    before, after, seconds = stood[name]
    chance = random.Random(f"{name} {moment}")
    for attempt in itertools.count():  # one that has ended before it could be killed tells how long they take today
        shutil.copytree(before, tmp_path / str(attempt))
        monkeypatch.chdir(tmp_path / str(attempt))
        start = time.monotonic()
        if killed(dvc("repro", *STAGES[name]), chance, chance.uniform(0.2, 1) * seconds):
            break
        seconds = min(seconds, time.monotonic() - start) * 0.9
    mend()
    finish("repro", *STAGES[name])
    here = outcome()
    monkeypatch.chdir(after)
    assert here == outcome()


@pytest.mark.long
def test_a_copy_of_dvc_that_is_spoilt_is_found_and_made_again(stood, tmp_path, monkeypatch):
    """DVC trusts its copies while they are write-protected, and checks them otherwise."""
    _, trained, _ = stood["train"]
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
    finish("repro", "train_streams")
    assert weights.stat().st_size == 1000
    weights.unlink()
    subprocess.run(["chmod", "-R", "u+w", ".dvc/cache"], check=True)
    finish("repro", "train_streams")
    assert outcome() == before
