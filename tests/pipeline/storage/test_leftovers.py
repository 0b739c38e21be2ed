"""Folders of older studies leave the folders that DVC hashes."""

import shutil
from pathlib import Path

from pipeline.config.grid import cells
from pipeline.config.load import load_study
from pipeline.storage.leftovers import set_aside
from tests.helpers.study import ROOT


def test_only_folders_of_the_study_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "presets/tutorial.yaml", "params.yaml")
    study = load_study()
    kept = [Path("runs", cell.task, cell.variant) for cell in cells(study)] + [Path("data/ar"), Path("heldout/ar")]
    kept.append(Path("runs/ar/.k.part"))  # a process is writing it
    old = [Path(path) for path in ("data/nar", "heldout/nar", "runs/ar/old", "runs/nar/none")]
    for folder in (*kept, *old):
        folder.mkdir(parents=True)
        Path(folder, "file").write_text(str(folder))
    for _ in range(2):  # the same folder can be left a second time
        lines = set_aside(study)
        assert lines == [f"{folder}: is not in this study; moved to leftover/{folder}" for folder in old]
        assert {path.parent for path in Path().glob("*/**/file") if path.parts[0] != "leftover"} == {*kept}
        assert [Path("leftover", folder, "file").read_text() for folder in old] == [str(folder) for folder in old]
        assert not Path("runs/nar").exists()
        for folder in old:
            shutil.copytree(Path("leftover", folder), folder)
    set_aside(study)
    assert set_aside(study) == []
