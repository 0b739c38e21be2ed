"""What `validate` and `run --dry-run` say about an edit: which cells, which keys, which files of code."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.config.grid import cells
from pipeline.config.load import load_study
from pipeline.stages.changes import md5, plan_of, retrained_line, train_stage
from pipeline.stages.plan import stage_files
from pipeline.storage import runs
from pipeline.storage.training_log import log_path
from tests.helpers.study import ROOT, edit, read_params, write_params

MAMBA = "plan/train/ar/mamba.json"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The smoke study with all stages recorded as run: plan/, dvc.lock, logs/ of one second per cell."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "presets/smoke.yaml", "params.yaml")
    for name, text in stage_files(load_study()).items():
        path = Path("plan", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for cell in cells(load_study()):
        runs.folder(cell.task, cell.variant).mkdir(parents=True)
        log_path(cell.task, cell.variant).parent.mkdir(parents=True, exist_ok=True)
        log_path(cell.task, cell.variant).write_text('{"seconds": 1.0}')
    lock()


def lock():
    """Write dvc.lock for the files in plan/."""
    raw = read_params()
    stages = {train_stage(cell): [f"plan/train/{cell.task}/{cell.variant}.json"] for cell in cells(load_study())}
    stages |= {f"{name}@{task}": [f"plan/{name}/{task}.txt"] for name in ("generate", "evaluate") for task in raw["tasks"]}
    stages |= {name: [f"plan/{name}.txt"] for name in ("judge", "render", "publish")}
    content = {
        name: {"deps": [{"path": path, "md5": md5(Path(path).read_text())} for path in paths]} for name, paths in stages.items()
    }
    for task, section in raw["tasks"].items():
        content[f"generate@{task}"]["params"] = {"params.yaml": {"data_seed": 0, f"tasks.{task}.data": section["data"]}}
    Path("dvc.lock").write_text(json.dumps({"schema": "2.0", "stages": content}))


def reasons():
    return plan_of(load_study()).reasons


def test_without_an_edit_nothing_is_to_train(study):
    assert reasons() == {}
    assert retrained_line(load_study()).startswith("nothing to train: settings and code of all 39 cells")


def test_an_edit_names_its_keys_and_its_cells(study):
    edit(**{"variants.qk_d2.dilation": 4, "variants.mamba_qk.conv_q": 5})
    assert reasons() == {
        "plan/train/nar/qk_d2.json": ["model.dilation 2 -> 4"],
        "plan/train/ar/mamba_qk.json": ["model.mixers.1.conv_q 3 -> 5"],
    }
    line = retrained_line(load_study())
    assert line == "`dvc repro` will train 2 of 39 cells: qk_d2 on nar; mamba_qk on ar; about 0:00:02 of training"


def test_data_a_new_cell_and_missing_results_are_told_apart(study):
    edit(
        **{"tasks.nar3.data.train_examples": 128, "ablations.hybrid.variants": ["mamba_qk", "new"], "variants.new": {"conv_k": 5}}
    )
    shutil.rmtree("runs/text")
    assert reasons()["plan/train/ar/new.json"] == ["new"]
    assert retrained_line(load_study()).split("; ") == [
        "`dvc repro` will train 1 of 40 cells: new on ar",
        "how long is not known",
        "and 2 cells of nar3, if the training data change",
        "about 0:00:02 of training",
        "and 4 cells that are not in this folder, unless DVC restores them",
        "about 0:00:04 of training",
    ]


def test_code_is_named_by_its_files_if_the_last_plan_is_there(study):
    """The last plan had other code of the layer of Mamba."""
    old = json.loads(Path(MAMBA).read_text())
    Path(MAMBA).write_text(json.dumps(old | {"code": "0"}))
    lock()
    assert reasons() == {MAMBA: ["code"]}
    modules = json.loads(Path("plan/modules.json").read_text())
    Path("plan/modules.json").write_text(json.dumps(modules | {"cat.mixers.mamba.layer": "0", "cat.mixers.hyena.layer": "0"}))
    assert reasons() == {MAMBA: ["code of cat/mixers/mamba/layer.py"]}


def test_an_older_plan_is_found_in_the_cache_of_dvc(study):
    """As after a run that ended between planning and training."""
    text = Path(MAMBA).read_text()
    digest = md5(text)
    raw = read_params()
    raw["variants"]["mamba"]["state"] = 4
    write_params(raw)
    Path(MAMBA).write_text(stage_files(load_study())["train/ar/mamba.json"])
    assert reasons()[MAMBA] == ["settings or code"]
    Path(".dvc/cache/files/md5", digest[:2]).mkdir(parents=True)
    Path(".dvc/cache/files/md5", digest[:2], digest[2:]).write_text(text)
    assert reasons()[MAMBA] == ["model.state 16 -> 4"]
