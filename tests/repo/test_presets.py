"""A preset has the claims of claims.yaml or its own; the page lists verdicts that differ."""

import csv
import re

import pytest

from pipeline.config import claims
from pipeline.config.load import load_study
from tests.helpers.study import ROOT

OWN_CLAIMS = sorted((ROOT / "presets" / "claims").glob("*.yaml"))
RESULTS = ROOT / "presets" / "results"


def verdicts(folder):
    with (folder / "verdicts" / "claims.csv").open(encoding="utf-8", newline="") as file:
        return {row["claim"]: row["verdict"] for row in csv.DictReader(file)}


@pytest.mark.parametrize("file", OWN_CLAIMS, ids=lambda file: file.stem)
def test_a_preset_decides_its_own_claims(file):
    own, study = claims.load(file), load_study(ROOT / "presets" / file.name)
    claims.check(own, study)
    assert list(claims.undecided(own, study)) == []


@pytest.mark.parametrize("file", OWN_CLAIMS, ids=lambda file: file.stem)
def test_a_claim_with_the_name_of_a_default_one_is_the_same(file):
    default = claims.load(ROOT / "claims.yaml")
    shared = {name: claim for name, claim in claims.load(file).items() if name in default}
    assert shared == {name: default[name] for name in shared}


def test_the_page_lists_every_verdict_that_differs_from_the_default_study():
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \| `([\w-]+)`: (\w+) \|", page, flags=re.MULTILINE)
    default = verdicts(ROOT)
    decided = {folder.name: verdicts(folder) for folder in RESULTS.glob("reference-*")}
    differ = [
        (claim, default[claim], preset, verdict)
        for preset, found in decided.items()
        for claim, verdict in found.items()
        if claim in default and default[claim] != verdict and not lacks_data(preset, claim)
    ]
    assert decided
    assert sorted(listed) == sorted(differ)


def lacks_data(preset, claim):
    """Whether the preset has too few seeds for the claim, or not its tasks and variants."""
    chosen = {claim: claims.load(ROOT / "claims.yaml")[claim]}
    return any(claims.undecided(chosen, load_study(ROOT / "presets" / f"{preset}.yaml")))
