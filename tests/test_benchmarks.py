"""Benchmarks run and write what they measured; how fast anything is, no test says."""

import json

from click.testing import CliRunner

from benchmarks import landmark


def test_landmark_and_dense_attention_are_measured_in_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(landmark, "RESULTS", tmp_path)
    result = CliRunner().invoke(landmark.main, ["--device", "cpu", "--longest", "1024"])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.iterdir()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["kind"], row["length"], row["block"]) for row in rows] == [("dense", 1024, 32), ("landmark", 1024, 32)]
    assert all(row["seconds"] > 0 and row["bytes"] > 0 for row in rows)
    assert "dense / landmark" in result.output
