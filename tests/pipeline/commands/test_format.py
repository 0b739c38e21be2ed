"""`python -m pipeline format` restores the layout that `dvc exp run -S` and `dvc exp apply` take from params.yaml."""

from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.utils.hydra import apply_overrides

from pipeline.cli import main
from pipeline.commands.format import formatted
from tests.helpers.study import ROOT

FILES = ["params.yaml", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("presets/*.yaml"))]


@pytest.mark.parametrize("file", FILES)
def test_every_committed_file_has_the_layout_and_gets_it_back_after_dvc(file, tmp_path):
    committed = (ROOT / file).read_text(encoding="utf-8")
    copy = tmp_path / "params.yaml"
    copy.write_text(committed, encoding="utf-8")
    apply_overrides(copy, ["data_seed=3", "+variants.new={conv_q: 6, conv_k: 6}"])
    assert len(set(copy.read_text(encoding="utf-8").splitlines()) ^ set(committed.splitlines())) > 20, "DVC rewrote the file"

    lines = formatted(copy.read_text(encoding="utf-8")).splitlines()
    added = [line for line in lines if line.startswith("  new: ")]
    assert [" ".join(line.split()) for line in added] == ["new: {conv_q: 6, conv_k: 6}"]
    lines.remove(added[0])
    assert [line.replace("data_seed: 3", "data_seed: 0") for line in lines] == committed.splitlines()
    assert formatted(committed) == committed


def test_comments_keep_their_place_and_values_stay(tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text(
        """\
# first
defaults:
  seeds:   # of weights
  - 1
  - 2      # the second
  rates:   # of learning
  - 0.1
  text: 'quoted'  # text

# of the variants
variants:
  a: {x: 1}  # about a
  longer: {x: 0x10, y: [1, 2]}          # about longer
  block:
    x: 1
  noted:
    x: 1   # stays, so the lines do, too
    y: 2
# last
"""
    )
    done = CliRunner().invoke(main, ["format", str(path)])
    assert (done.exit_code, done.output) == (0, f"{path}: formatted\n")
    assert (
        path.read_text()
        == """\
# first
defaults:
  seeds:   # of weights
  - 1
  - 2      # the second
  rates: [0.1]  # of learning
  text: 'quoted'  # text

# of the variants
variants:
  a:      {x: 1}  # about a
  longer: {x: 0x10, y: [1, 2]}          # about longer
  block:  {x: 1}
  noted:
    x: 1   # stays, so the lines do, too
    y: 2
# last
"""
    )
    assert CliRunner().invoke(main, ["format", str(path)]).output == f"{path}: has this layout already\n"


def test_a_file_that_cannot_be_read_stays_as_it_is(tmp_path):
    path = tmp_path / "params.yaml"
    for text, fault in (("- 1\n", "has no mapping of sections"), ("a: [1\n", "line 2, column 1")):
        path.write_text(text)
        done = CliRunner().invoke(main, ["format", str(path)])
        assert (done.exit_code, path.read_text()) == (2, text)
        assert fault in done.stderr
    assert not list(Path(tmp_path).glob(".*"))
