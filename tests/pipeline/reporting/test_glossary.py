"""The glossary has every task and variant of the study, with its name."""

from pipeline.config.grid import cells
from pipeline.config.load import load_study
from pipeline.reporting.glossary import glossary
from pipeline.reporting.labels import task_label, variant_label, with_names, with_slug
from tests.helpers.study import ROOT


def test_every_trained_task_and_variant_is_explained():
    study = load_study(ROOT / "params.yaml")
    text = glossary(study)
    for cell in cells(study):
        assert f"| {with_slug(task_label(study, cell.task), cell.task)} " in text
        assert f"| {with_slug(variant_label(study, cell.variant), cell.variant)} " in text
    assert "**copying**: Selective copying" in text
    assert "    BOS  . s . . t . u . .  SEP  s t         targets s t u" in text


def test_the_reason_of_a_verdict_has_names():
    study = load_study(ROOT / "params.yaml")
    assert with_names(study, "smallest margin: k against qk on nar at length 40; k is no better than: guess on (0.1)") == (
        "smallest margin: CAT-K (k) against CAT-QK (qk) on 2-gram recall (nar) at length 40;"
        " CAT-K (k) is no better than: guess on (0.1)"
    )
    assert with_names(study, "qk_l2 on hops at length 32") == "CAT-QK, 2 layers (qk_l2) on hops along a cycle (hops) at length 32"
    assert with_names(study, "k against itself at 1x on ar at length 8").startswith("CAT-K (k) against itself at 1x on assoc")
    assert with_names(study, "no comparison: other on x at length 2") == "no comparison: other on x at length 2"
