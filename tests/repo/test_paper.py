"""docs/paper.md names every claim of the paper, and only claims that exist."""

import re

from pipeline.config.claims import load
from tests.helpers.study import ROOT

ROWS = [row for row in (ROOT / "docs" / "paper.md").read_text(encoding="utf-8").splitlines() if row.startswith("| ")]


def test_every_named_claim_exists_and_every_claim_of_the_paper_is_named():
    claims = load(ROOT / "claims.yaml") | load(ROOT / "presets" / "claims" / "text-cpu.yaml")
    named = {name for row in ROWS for name in re.findall(r"`(\w+)`", row)}
    assert named <= claims.keys()
    of_the_paper = {name for name, claim in claims.items() if claim.source == "paper" and not name.endswith("_first")}
    assert of_the_paper <= named
    assert len(named) > 25
