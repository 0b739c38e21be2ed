"""A cell is trained again if and only if its complete configuration changed, wherever params.yaml writes it."""

from copy import deepcopy

import pytest
from ruamel.yaml import YAML

from cat.mixers.registry import CONSTRUCTION, read_model
from pipeline.config.load import load_study, study_of
from pipeline.config.study import CellTraining
from pipeline.stages.plan import stage_files
from tests.helpers.study import ROOT, stage

SMOKE = YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml")


def cell_files(raw):
    """(task, variant) -> the file in plan/ on which the training of the cell depends."""
    files = stage_files(study_of(raw, "params.yaml", check_rules=False))
    return {tuple(name.removesuffix(".json").split("/")[1:]): text for name, text in files.items() if name.startswith("train/")}


BEFORE = cell_files(SMOKE)
TRAINED = {cell for cell in BEFORE if cell[1] != CONSTRUCTION}


def changed(raw):
    """The cells that are trained again."""
    after = cell_files(raw)
    assert after.keys() == BEFORE.keys()
    return {cell for cell in BEFORE if after[cell] != BEFORE[cell]}


def edited(**changes):
    """A copy of the smoke study with other values of dotted keys, which need not exist."""
    raw = deepcopy(SMOKE)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        section = raw
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    return raw


def without(*variants):
    return {cell for cell in TRAINED if cell[1] not in variants}


RECURRENT = ("delta", "gla", "mamba", "hyena")
OWN_MIXER = ("linear", "based", "performer", "landmark", "mamba_qk", *RECURRENT)
OWN_NORM = ("qk", "qk_full", "qk_d2", "qk_l2", "landmark")
DEFAULTS = {
    "mixer": ("linear", without(*OWN_MIXER)),
    "width": (32, TRAINED),
    "layers": (2, without("qk_l2", "mamba_qk")),
    "heads": (4, without("mamba", "hyena")),
    "position": ("rotary", without("learned", "qk_learned", "mamba_qk", *RECURRENT)),
    # Not in the file:
    "mlp": (4, without("qk_l2")),
    "qk_norm": (True, without(*OWN_NORM, *RECURRENT)),
    "conv_v": (3, without("delta", "mamba", "hyena")),
    "expand": (1, {cell for cell in TRAINED if cell[1] in ("mamba", "mamba_qk")}),
}
"""Key -> another value, and the cells of variants that have the key and do not set it themselves."""
TRAINING = {
    "steps": (11, {cell for cell in TRAINED if cell[0] != "ar"}),
    "batch": (17, TRAINED),
    "learning_rates": ([0.1], {cell for cell in TRAINED if cell[0] not in ("ar", "ar_rates")}),
    "seeds": (3, {*BEFORE}),
    "weight_decay": (0.1, TRAINED),
    "grad_clip": (0.5, TRAINED),
    "warmup": (0.2, TRAINED),
    "eval_every": (2, TRAINED),
    "early_stop_accuracy": (0.5, TRAINED),
    "early_stop_patience": (1, TRAINED),
    # Not in the file:
    "micro_batch": (8, TRAINED),
    "compile": (True, TRAINED),
}
"""Key -> another value, and the cells of tasks that do not set it themselves. A construction only has seeds."""


def test_every_default_has_a_case():
    assert {*SMOKE["defaults"]} - {"training"} <= {*DEFAULTS}
    assert {*CellTraining.model_fields} == {*TRAINING}


@pytest.mark.parametrize("key", DEFAULTS)
def test_a_default_retrains_exactly_the_variants_that_use_it(key):
    value, expected = DEFAULTS[key]
    raw = edited(**{f"defaults.{key}": value})
    if key == "qk_norm":  # it learns a temperature already
        raw["variants"]["warm"] |= {"qk_norm": False}
        expected = expected - {("nar", "warm")}
    assert changed(raw) == expected


@pytest.mark.parametrize("key", TRAINING)
def test_a_default_of_training_retrains_exactly_the_cells_that_use_it(key):
    value, expected = TRAINING[key]
    assert changed(edited(**{f"defaults.training.{key}": value})) == expected


def test_a_value_can_move_between_the_defaults_and_all_variants_or_tasks():
    raw = deepcopy(SMOKE)
    heads, decay, clip = (
        raw["defaults"].pop("heads"),
        *(raw["defaults"]["training"].pop(k) for k in ("weight_decay", "grad_clip")),
    )
    for name, variant in raw["variants"].items():
        if name != CONSTRUCTION:
            variant |= {} if name in ("mamba", "hyena") else {"heads": heads}
            variant["training"] = {"weight_decay": decay}
    raw["variants"][CONSTRUCTION] |= {"training": {"weight_decay": decay}}
    for task in raw["tasks"].values():
        task["training"] = task.get("training", {}) | {"grad_clip": clip}
    assert changed(raw) == set()


def test_settings_of_a_task_or_a_variant_retrain_only_its_cells():
    def cells_of(*, task=None, variant=None):
        return {cell for cell in TRAINED if task in (None, cell[0]) and variant in (None, cell[1])}

    assert changed(edited(**{"tasks.nar.training.steps": 7})) == cells_of(task="nar")
    assert changed(edited(**{"tasks.nar.training.steps": 10})) == set(), "the default"
    assert changed(edited(**{"variants.k.conv_k": 2})) == cells_of(variant="k")
    assert changed(edited(**{"variants.k.training.batch": 8})) == cells_of(variant="k")
    assert changed(edited(**{"variants.k.training.tasks.ar.batch": 8})) == cells_of(task="ar", variant="k") == {("ar", "k")}
    assert changed(edited(**{"variants.construction.training.seeds": 3})) == {c for c in BEFORE if c[1] == CONSTRUCTION}


def test_the_most_specific_setting_of_training_counts():
    places = ["defaults.training", "tasks.nar.training", "variants.k.training", "variants.k.training.tasks.nar"]
    written = {f"{place}.steps": steps for steps, place in enumerate(places, 100)}
    training = study_of(edited(**written, **{"tasks.copying.training.steps": 101}), "params.yaml").training
    cells = [("nar", "k"), ("copying", "k"), ("copying", "none"), ("text", "none")]
    assert [training[cell].steps for cell in cells] == [103, 102, 101, 100]


def test_other_sections_retrain_nothing():
    sections = {
        "evaluate.multiples": [1],
        "render.error_band": "range",
        "parallel_runs": 2,
        "resources.cpus": 2,
        "device": "auto",
    }
    raw = edited(**sections)
    raw["ablations"]["ngram"] |= {"question": "Why?", "plot": "lines"}
    raw["tasks"]["text"]["data"]["test_examples"] = 64
    for task in raw["tasks"].values():
        task["data"]["multiples"] = [0.5, 1, 1.5, 2]
    assert changed(raw) == set()
    raw["tasks"]["ar"]["data"]["multiples"] = [1, 4]
    assert changed(raw) == {("ar", CONSTRUCTION)}, "it solves all lengths"
    assert changed(edited(precision="bfloat16")) == changed(edited(deterministic=True)) == {*BEFORE}


def test_validate_prints_the_complete_configuration_of_every_variant_and_cell(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    stage("validate", str(ROOT / "presets" / "smoke.yaml"), "--resolved")
    printed = YAML(typ="safe").load(capsys.readouterr().out)
    study = load_study(ROOT / "presets" / "smoke.yaml")
    models = {name: CONSTRUCTION if name == CONSTRUCTION else read_model(config) for name, config in printed["variants"].items()}
    assert models == {**study.variants, CONSTRUCTION: CONSTRUCTION}
    assert [*printed["variants"]] == [*study.variants]
    training = {(task, variant): values for task, cells in printed["training"].items() for variant, values in cells.items()}
    assert {cell: CellTraining(**values) for cell, values in training.items()} == study.training
    assert all({*values} == {*CellTraining.model_fields} for values in training.values())
    assert printed["tasks"]["ar"] == {**study.tasks["ar"].data.model_dump(mode="json")}
