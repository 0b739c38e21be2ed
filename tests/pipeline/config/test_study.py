"""params.yaml: a valid study loads, every error is one clear line, and the grid equals the stages of DVC."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml, modify_yaml
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from cat.config import Config
from cat.mixers.registry import ConstructionConfig
from cat.tasks.registry import KINDS
from pipeline.cli import main
from pipeline.config.errors import ParamsError, find_entry
from pipeline.config.grid import cells, variants_on
from pipeline.config.load import load_study, study_of
from pipeline.config.yaml_file import check_rewritten, read_yaml
from pipeline.stages.plan import check_stages

ROOT = Path(__file__).parents[3]
STUDIES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
SMOKE_TEXT = (ROOT / "presets/smoke.yaml").read_text(encoding="utf-8")
SMOKE = YAML(typ="safe").load(SMOKE_TEXT)
for shown_only in ("example", "filters", "positions"):  # these restrict the variants of other ablations
    del SMOKE["ablations"][shown_only]
for name, ablation in list(SMOKE["ablations"].items()):
    SMOKE["ablations"][name] = {"tasks": [], "variants": []} | ablation
    SMOKE["ablations"][name].pop("reference_lines", None)
del SMOKE["ablations"]["stability"]
RECALL = SMOKE["ablations"].pop("recall")
SMOKE_JSON = json.dumps(SMOKE)
ALL_KINDS = ", ".join(map(repr, sorted(KINDS)))

ALL = pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
MISSING = Enum("Edit", ["MISSING"]).MISSING  # unlike `object()`, it has the same name in every test process


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """The working directory, which contains only dvc.yaml."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edited(edits: dict) -> Any:
    """smoke.yaml with other values at some paths: dotted, or a tuple if a key contains a dot."""
    mapping = json.loads(SMOKE_JSON)
    for path, value in edits.items():
        *parents, key = path.split(".") if isinstance(path, str) else path
        owner = at(mapping, parents)
        if value is MISSING:
            del owner[key]
        else:
            owner[key] = value
    return mapping


def dump(mapping: Any, file: Path) -> None:
    writer = YAML(typ="safe")
    writer.allow_unicode = True
    writer.sort_base_mapping_type_on_output = False
    writer.dump(mapping, file)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def errors_of(edits: dict) -> list[str]:
    """The errors of smoke.yaml after some edits, without the name of the file."""
    with pytest.raises(ParamsError) as raised:
        study_of(edited(edits), "params.yaml")
    assert all(line.startswith("params.yaml: ") and line.isprintable() and len(line) < 500 for line in raised.value.lines)
    return [line.removeprefix("params.yaml: ") for line in raised.value.lines]


def errors_of_file(content: bytes | str, file: Path) -> list[str]:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ParamsError) as raised:
        load_study(file)
    assert all(line.startswith(f"{file}: ") and line.isprintable() for line in raised.value.lines)
    return [line.removeprefix(f"{file}: ") for line in raised.value.lines]


def refused(project: Path, *arguments: str) -> list[str]:
    """The error lines of a command, which must exit with 2, print nothing and write nothing."""
    before = contents(project)
    result: Result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.exception
    assert result.stdout == ""
    assert contents(project) == before
    return result.stderr.removesuffix("\n").split("\n")


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


@ALL
def test_a_study_of_this_repository_is_valid(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_stages(load_study(file))


@ALL
def test_a_study_stays_the_same_after_dvc_rewrites_it_for_an_experiment(file, tmp_path):
    written = shutil.copy(file, tmp_path)
    with modify_yaml(written) as content:
        content["data_seed"] = 7
    assert load_yaml(written) == {**load_yaml(file), "data_seed": 7}


def test_a_file_that_dvc_would_make_unreadable_is_refused(project):
    extra = 'extra: {question: "Other blocks?", reference_tasks: [ar], reference_variants: [k], plot: heatmap}'
    text = SMOKE_TEXT.replace("\nevaluate:", f"  {extra}\n\nevaluate:")
    assert text != SMOKE_TEXT
    (project / "params.yaml").write_text(text, encoding="utf-8")
    assert load_study().ablations["extra"].question == "Other blocks?"
    (line,) = refused(project, "validate")
    assert line.startswith("params.yaml: extra: {question: Other blocks?, reference_tasks: [ar]")
    assert "`dvc exp run -S`" in line


@pytest.mark.parametrize(
    ("line", "column", "words"),
    [
        ("data_seed: 0\t# a comment", 13, "Fix: use spaces, not tabs"),
        ("data_seed: 0\t", 13, "Fix: use spaces, not tabs"),
        ("data_seed:\t0", 11, "Fix: use spaces, not tabs"),
        ("resources: &x {<<: *x}\ndata_seed: 0", 12, "cannot be read"),
    ],
    ids=["before a comment", "at the end", "after a colon", "a merge of itself"],
)
def test_a_file_that_dvc_cannot_rewrite_is_refused_with_the_place(line, column, words, project):
    before, after = SMOKE_TEXT.split("data_seed: 0", 1)
    (project / "params.yaml").write_text(before + line + after, encoding="utf-8")
    load_study()
    (error,) = refused(project, "validate")
    assert error.startswith(f"params.yaml: line {before.count(chr(10)) + 1}, column {column}: ")
    assert "`dvc exp run -S` could not read the file" in error
    assert words in error


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("%YAML 1.1\n---\na: on\n", "a: `dvc exp run -S` would change a value in it"),
        ("a: " + "[" * 300 + "]" * 300 + "\n", "a value is nested too deeply"),
    ],
)
def test_rewriting_changes_no_value(text, problem, tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError) as error:
        check_rewritten(file)
    (line,) = error.value.lines
    assert problem in line


@ALL
def test_validating_prints_the_grid(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(main, ["validate", str(file.relative_to(ROOT))])
    assert result.exit_code == 0
    study = load_study(file)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["variant", *study.tasks]
    assert [line.split()[0] for line in lines[2 : 2 + len(study.variants)]] == list(study.variants)
    (summary,) = [line for line in lines if line.startswith(f"{len(cells(study))} cells, ")]
    # The seeds, learning rates and steps of every trained cell, and of no other place in the table.
    constructed = [cell for cell in cells(study) if isinstance(study.variants[cell.variant], ConstructionConfig)]
    assert result.stdout.count("not trained") == len(constructed)
    assert result.stdout.count(" x ") == 2 * (len(cells(study)) - len(constructed)) + summary.count(" x ")


def test_validating_imports_nothing_heavy():
    result = run("-X", "importtime", "-m", "pipeline", "validate", cwd=ROOT)
    assert result.returncode == 0
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert {"pydantic", "ruamel", "tabulate"} <= loaded, "the list of imports was not understood"
    assert not loaded & {"torch", "mlflow", "pandas"}


TASK = SMOKE["tasks"]["ar"]
PLAIN = {"mixer": "attention"}
LANDMARK = PLAIN | {"mixer": "landmark", "conv_k": 3, "block": 8, "top": 2}
LINEAR, BASED = PLAIN | {"mixer": "linear"}, PLAIN | {"mixer": "based", "window": 4}
PERFORMER = PLAIN | {"mixer": "performer", "features": 8}
DELTA, GLA = PLAIN | {"mixer": "delta"}, PLAIN | {"mixer": "gla", "gate_rank": 4}
MAMBA = {"mixer": "mamba"}
HYENA = {"mixer": "hyena", "conv_size": 3, "filter_size": 4}
USED = "(used by variants."
CONSTRUCTION = {"mixer": "construction"}
NAME = "must be 1 to 40 lowercase letters, digits and underscores"
DEVICE = "must be auto, cpu, cuda or cuda:N"
INTEGER, LIST, MAPPING = "must be a valid integer", "must be a list", "must be a mapping"
SIZE = "must be a valid integer or 'full', 'network', 'decay' or 'state'"
AT_LEAST_1 = "must be greater than or equal to 1"

# One key with one value: the error is about this key and contains the phrase.
VALUES = [
    # Unknown keys, with the nearest known name.
    ("datas_eed", 0, "unknown key; did you mean 'data_seed'?"),
    ("tasks.ar.trainin", {}, "did you mean 'training'?"),
    ("tasks.ar.data.ngrams", 1, "did you mean 'ngram'?"),
    ("tasks.copying.data.signal", 3, "did you mean 'signals'?"),
    ("tasks.text.data.sources", "x", "did you mean 'source'?"),
    ("tasks.ar.training.learning_rate", 0.1, "did you mean 'learning_rates'?"),
    ("variants.qk.qknorm", True, "did you mean 'qk_norm'?"),
    ("ablations.qkv_subsets.questions", "?", "did you mean 'question'?"),
    ("defaults.training.weightdecay", 0, "did you mean 'weight_decay'?"),
    ("evaluate.multiple", [1], "did you mean 'multiples'?"),
    ("render.error_bands", None, "did you mean 'error_band'?"),
    ("render.zzz", 1, "unknown key; known are error_band"),
    # Types.
    ("tasks.ar.training.steps", True, INTEGER),
    ("tasks.ar.training.steps", 3.5, INTEGER),
    ("tasks.ar.training.steps", None, INTEGER),
    ("tasks.ar.training.steps", "20", INTEGER),
    ("variants.qk.qk_norm", 1, "must be a valid boolean"),
    ("tasks.copying.data.unique", "yes", "must be a valid boolean"),
    ("defaults.training.grad_clip", "x", "must be a valid number"),
    ("defaults.training.grad_clip", True, "must be a valid number"),
    ("device", 0, "must be a valid string"),
    ("device", None, "must be a valid string"),
    ("defaults.training.seeds", {"a": 1}, LIST),
    ("defaults.training.seeds", 0, LIST),
    ("defaults.training.seeds", True, LIST),
    ("defaults.widht", 3, "no variant has this key; did you mean 'width'?"),
    ("defaults.width", 0, AT_LEAST_1),
    ("defaults.heads", "x", INTEGER),
    ("defaults.position", "rotory", "did you mean 'rotary'?"),
    ("defaults.mixer", "atention", "did you mean 'attention'?"),
    ("defaults", [], MAPPING),
    ("defaults.training", [1], MAPPING),
    ("variants.k.training", 3, MAPPING),
    ("variants.k.mixer", [], "needs at least one mixer"),
    ("variants.k.mixer", ["attention", 3], "must be the name of a mixer, or a list of names and of mappings"),
    ("variants.k.mixer", "my_package.retention", "there is no my_package/retention/config.py"),
    ("ablations.qkv_subsets.tasks", "ar", LIST),
    ("tasks", [1], MAPPING),
    ("tasks.ar.training", None, MAPPING),
    ("variants.none", "x", MAPPING),
    ("defaults.training.seeds", [], "must have at least 1 item"),
    ("tasks", {}, "must have at least 1 item"),
    ("evaluate.multiples", [], "must have at least 1 item"),
    ("parallel_runs", "autos", "must be a valid integer or 'auto'; did you mean 'auto'?"),
    ("variants.k.conv_k", True, SIZE),
    ("variants.k.conv_k", 0, "must be greater than or equal to 1 or 'full', 'network', 'decay' or 'state'"),
    # Ranges.
    ("tasks.ar.training.steps", -5, AT_LEAST_1),
    ("tasks.ar.training.steps", 2**31, "must be less than 2147483648"),
    ("tasks.ar.data.ngram", 9, "must be less than or equal to 8"),
    ("defaults.training.warmup", 1, "must be less than 1"),
    ("defaults.training.warmup", 1.0, "must be less than 1"),
    ("defaults.training.early_stop_accuracy", 1.5, "must be less than or equal to 1"),
    ("defaults.training.weight_decay", float("nan"), "must be a finite number"),
    ("defaults.training.weight_decay", float("inf"), "must be a finite number"),
    ("data_seed", 2**31, "must be less than 2147483648"),
    # Choices.
    ("device", "cuda:128", DEVICE),
    ("device", "gpu", DEVICE),
    ("device", "cuda:", DEVICE),
    ("device", "cuda:\N{ARABIC-INDIC DIGIT THREE}", DEVICE),
    ("precision", "float16", "must be 'float32' or 'bfloat16'; did you mean 'bfloat16'?"),
    ("variants.none.mixer", "atention", "did you mean 'attention'?"),
    ("variants.none.mixer", "zzz", "must be one of 'attention', 'based', 'delta'"),
    ("tasks.ar.data.kind", "recal", f"must be one of {ALL_KINDS}; did you mean 'recall'?"),
    ("tasks.ar.data.kind", None, f"must be one of {ALL_KINDS}"),
    ("tasks.ar.data.kind", True, f"must be one of {ALL_KINDS}"),
    ("tasks.ar.data.queries", "al", "must be 'one' or 'all'; did you mean 'all'?"),
    ("variants.none.position", "rotory", "did you mean 'rotary'?"),
    ("ablations.ngram.plot", "line", "did you mean 'lines'?"),
    ("ablations.qkv_subsets.question", "a\rb", "must be one line of text"),
    ("ablations.qkv_subsets.question", "", "must be one line of text"),
]
# The error is about an item of the value, or about another key.
ITEMS = [
    ("defaults.training.seeds", [0, -1], "defaults.training.seeds.1", "must be greater than or equal to 0"),
    ("defaults.training.seeds", [0, None], "defaults.training.seeds.1", INTEGER),
    ("defaults.training.seeds", [None], "defaults.training.seeds.0", INTEGER),
    ("variants.k.training", {"step": 3}, "variants.k.training.step", "did you mean 'steps'?"),
    ("variants.k.training", {"tasks": {"arr": {}}}, "variants.k.training.tasks.arr", "is not among tasks; did you mean 'ar'?"),
    ("variants.k.training", {"tasks": {"ar": 3}}, "variants.k.training.tasks.ar", MAPPING),
    ("variants.k.training", {"tasks": {"ar": {"batch": 0}}}, "variants.k.training.tasks.ar.batch", AT_LEAST_1),
    (
        "variants.k.mixer",
        [{"mixer": "attention", "width": 8}],
        "variants.k.mixer.0.width",
        "is a key of the model, not of a mixer",
    ),
    ("variants.k.mixer", {"mixer": "attention", "width": 8}, "variants.k.mixer.0.width", "is a key of the model, not of a mixer"),
    ("defaults.mixer", [{"mixer": "attention", "conv_k": 0}], "defaults.mixer.0.conv_k", "must be greater than"),
    ("defaults.mixer", [{"mixer": "attention", "width": 8}], "defaults.mixer.0.width", "is a key of the model, not of a mixer"),
    ("variants.k.mixer", [{"mixer": "attention", "conv_k": 0}], "variants.k.mixer.0.conv_k", "must be greater than"),
    ("variants.k.mixer", ["attention", "mamba"], "variants.k", "needs a multiple of 2 layers, not layers = 1"),
    ("tasks.ar.training.learning_rates", [0.01, 0], "tasks.ar.training.learning_rates.1", "must be greater than 0"),
    ("tasks.ar.data.multiples", [-1, 1], "tasks.ar.data.multiples.0", "must be greater than 0"),
    ("ablations.qkv_subsets.variants", ["Q"], "ablations.qkv_subsets.variants.0", NAME),
    ("ablations.qkv_subsets.variants", [1], "ablations.qkv_subsets.variants.0", "must be a valid string"),
    ("variants", {True: MAMBA}, "variants.1", "must be a valid string"),
]
ABSENT = [
    "defaults", "tasks.ar.data", "tasks.ar.data.length", "tasks.ar.data.kind", "defaults.training.batch",
    "ablations.qkv_subsets.question", "evaluate.multiples",
]  # fmt: skip
RENAMED = [
    ("threads", "auto", "parallel_runs"),
    ("train", {}, "defaults.training"),
    ("optimizer", {}, "defaults.training"),
    ("seeds", [0], "defaults.training.seeds"),
    ("tasks.ar.train", {}, "training"),
    ("tasks.ar.data.questions", "all", "queries"),
    ("tasks.ar.data.train", 5, "train_examples"),
    ("defaults.training.clip", 1, "grad_clip"),
    ("variants.k.blocks", [], "mixer, which can be a list"),
    ("variants.k.k", 3, "conv_k"),
    ("variants.hyena.conv", 3, "conv_size"),
    ("ablations.width.beside", [], "reference_variants"),
    ("render.spread", "sd", "error_band"),
]
# A variant in the place of `k`, trained on copying at length 16: the error is about this key of it and contains the phrase.
VARIANTS = [
    # Settings of a convolution that is not there or is of another kind.
    (PLAIN, {"sharing": "channel"}, "", "sharing = "),
    (PLAIN, {"dilation": 2}, "", "dilation = 2"),
    (PLAIN, {"filter_init": "random"}, "", "filter_init = "),
    (PLAIN, {"filter_bias": True}, "", "filter_bias = true"),
    (PLAIN, {"filter_norm": True}, "", "filter_norm = true"),
    (LANDMARK, {"conv_k": None, "filter_norm": True}, "", "conv_summary"),
    (PLAIN, {"conv_k": "state"}, "", "conv_k = state needs filter_size"),
    (PLAIN, {"conv_q": 3, "conv_v": "network"}, "", "conv_v = network needs filter_size"),
    (LANDMARK, {"conv_summary": "decay"}, "", "conv_summary = decay needs filter_size"),
    (PLAIN, {"conv_k": 3, "filter_size": 2}, "", "filter_size = 2"),
    (PLAIN, {"conv_k": "full", "filter_size": 2}, "", "filter_size = 2"),
    (PLAIN, {"conv_k": 1, "dilation": 2}, "", "dilation = 2"),
    (PLAIN, {"conv_k": "full", "dilation": 2}, "", "dilation = 2"),
    (PLAIN, {"conv_k": 3, "heads": 1, "sharing": "mixing"}, "", "sharing = mixing"),
    (PLAIN, {"qk_norm": True, "temperature": True}, "", "temperature = true"),
    # Settings that a mixer does not have.
    (LINEAR, {"position": "alibi"}, "", "alibi"),
    (BASED, {"position": "alibi"}, "", "alibi"),
    (PERFORMER, {"position": "alibi"}, "", "alibi"),
    (LANDMARK, {"position": "alibi"}, "", "alibi"),
    (DELTA, {"position": "rotary"}, ".position", "no mixer of this variant has it. Fix: use none, learned or sinusoidal"),
    (DELTA, {"qk_norm": True}, ".qk_norm", "mixer 'delta' has no qk_norm"),
    (GLA, {"temperature": True}, ".temperature", "mixer 'gla' has no temperature"),
    (GLA, {"gate_rank": 17}, "", "gate_rank = 17"),
    (PLAIN, {"heads": 3}, "", "heads = 3 does not divide width = 16"),
    (PLAIN, {"position": "rotary", "width": 6}, "", "even head width, not 3"),
    (LINEAR, {"window": 4}, ".window", "mixer 'linear' has no window"),
    (PLAIN, {"features": 4}, ".features", "mixer 'attention' has no features"),
    (PLAIN, {"output_gate": True}, ".output_gate", "mixer 'attention' has no output_gate"),
    (PLAIN, {"gate": True}, ".gate", "mixer 'attention' has no gate"),
    (PLAIN, {"conv_summary": 4}, ".conv_summary", "mixer 'attention' has no conv_summary"),
    (HYENA, {"conv_k": 3}, ".conv_k", "mixer 'hyena' has no conv_k"),
    (HYENA, {"sharing": "head"}, ".sharing", "mixer 'hyena' has no sharing"),
    (MAMBA, {"filter_size": 3}, ".filter_size", "mixer 'mamba' has no filter_size"),
    (MAMBA, {"conv_v": 2}, ".conv_v", "mixer 'mamba' has no conv_v"),
    (MAMBA, {"heads": 2}, ".heads", "mixer 'mamba' has no heads"),
    (MAMBA, {"expansion": 2}, ".expansion", "did you mean 'expand'?"),
    (LANDMARK, {"blok": 8}, ".blok", "did you mean 'block'?"),
    (CONSTRUCTION, {"width": 16}, ".width", "a construction has no keys besides mixer and placement"),
    (CONSTRUCTION, {"placement": "inptu"}, ".placement", "did you mean 'input'?"),
    # Settings that do not fit the training length or the task.
    (PLAIN, {"conv_k": 17}, "", "conv_k = 17 is longer than the training length of 16 (task 'copying')"),
    (PLAIN, {"conv_k": 4, "dilation": 6}, "", "conv_k = 4 with dilation = 6 is longer than the training length of 16"),
    (LANDMARK, {"conv_summary": 17}, "", "conv_summary = 17"),
    (LANDMARK, {"block": 17}, "", "block = 17"),
    (BASED, {"window": 16}, "", "window = 16"),
    (HYENA, {"conv_size": 17}, "", "conv_size = 17"),
    (MAMBA, {"conv_size": 17}, "", "conv_size = 17"),
    (CONSTRUCTION, {}, "", "no construction solves tasks of kind text (task 'text')"),
    # Types and ranges.
    (PLAIN, {"conv_k": "ful"}, ".conv_k", f"{SIZE}; did you mean 'full'?"),
    (PLAIN, {"conv_k": 1.5}, ".conv_k", SIZE),
    (PLAIN, {"conv_k": 3, "sharing": "heads"}, ".sharing", "did you mean 'head'?"),
    (PLAIN, {"conv_k": 3, "dilation": 0}, ".dilation", AT_LEAST_1),
    (PLAIN, {"conv_k": 3, "filter_init": "zero"}, ".filter_init", "must be 'identity', 'random', 'uniform', 'shift' or 'primer'"),
    (PLAIN, {"conv_k": 3, "filter_bias": 1}, ".filter_bias", "must be a valid boolean"),
    (PLAIN, {"conv_k": "state", "filter_size": 0}, ".filter_size", AT_LEAST_1),
    (PLAIN, {"temperature": 8.0}, ".temperature", "must be a valid boolean"),
    (BASED, {"window": 0}, ".window", AT_LEAST_1),
    (BASED, {"window": "full"}, ".window", INTEGER),
    (PERFORMER, {"features": 0}, ".features", AT_LEAST_1),
    (DELTA, {"gate": 1}, ".gate", "must be a valid boolean"),
    (GLA, {"gate_rank": 0}, ".gate_rank", AT_LEAST_1),
    (HYENA, {"conv_size": 0}, ".conv_size", AT_LEAST_1),
    (HYENA, {"filter_size": "network"}, ".filter_size", INTEGER),
    # Missing values.
    (LANDMARK, {"top": MISSING}, ".top", "is missing"),
]
BAD_NAMES = [
    "a-b", "AR", "../x", "a b", ";rm", "a.b", "$(id)", "a\nb", "\N{CYRILLIC SMALL LETTER A}r", "\N{ARABIC-INDIC DIGIT TWO}",
]  # fmt: skip
RULES = {
    "more pairs than N-grams": ({"tasks.nar.data.keys": 1}, ("tasks.nar.data", "pairs = 4")),
    "sequence too short for its pairs": ({"tasks.ar.data.length": 16}, ("tasks.ar.data", "length 8 is too short for 2 pairs")),
    "more unique signals than symbols": ({"tasks.copying.data.alphabet": 2}, ("tasks.copying.data", "signals = 3")),
    "multiples without 1": ({"tasks.ar.data.multiples": [0.5, 2]}, ("tasks.ar.data", "multiples = [0.5, 2.0]")),
    "two test splits of one length": ({"tasks.ar.data.multiples": [0.5, 0.51, 1, 2]}, ("tasks.ar.data", "must differ")),
    "huge sequence": ({"tasks.ar.data.length": 10**400}, ("tasks.ar.data.length", "must be less than")),
    "n-gram longer than the context": ({"tasks.text.data.ngram": 9}, ("tasks.text.data", "ngram = 9 exceeds the 8 tokens")),
    "no training length": ({"tasks.ar.data.length": []}, ("tasks.ar.data.length", "an empty list has no training length")),
    "training length twice": ({"tasks.ar.data.length": [10, 10]}, ("tasks.ar.data", "length = [10, 10] must be ascending")),
    "training length too short for its pairs": (
        {"tasks.ar.data.length": [4, 20]},
        ("tasks.ar.data", "length 4 is too short for a pair: 4 pairs at length 20 give none"),
    ),
    "training length that is no number": ({"tasks.ar.data.length": [10, "x"]}, ("tasks.ar.data.length.1", INTEGER)),
    "range of lengths that falls": (
        {"tasks.ar.data.length": {"from": 40, "to": 20}},
        ("tasks.ar.data.length", "from = 40 must be smaller than to = 20"),
    ),
    "range of lengths without its end": ({"tasks.ar.data.length": {"from": 20}}, ("tasks.ar.data.length", "needs to")),
    "range of lengths with another key": (
        {"tasks.ar.data.length": {"form": 20, "to": 40}},
        ("tasks.ar.data.length", "unknown key 'form'; a range of lengths has the keys from and to"),
    ),
    "range of huge lengths": (
        {"tasks.ar.data.length": {"from": 20, "to": 10**400}},
        ("tasks.ar.data.length", "to must be a whole number"),
    ),
    "batch larger than the examples of a length": (
        {"tasks.ar.data.length": [10, 20], "tasks.ar.training.batch": 129},
        ("tasks.ar.data.train_examples", "is fewer than the batch of 129, which give 128 per training length"),
    ),
    "seed twice": ({"tasks.ar.training": {"seeds": [3, 0, 3]}}, ("tasks.ar.training", "seeds = [3, 0, 3] has a value twice")),
    "multiple twice": ({"evaluate.multiples": [1, 2, 1]}, ("evaluate", "twice")),
    "learning rate twice": ({"tasks.ar.training.learning_rates": [0.01, 1e-2]}, ("tasks.ar.training", "twice")),
    "micro-batch of a whole batch": ({"tasks.ar.training.micro_batch": 16}, ("tasks.ar.training", "micro_batch = 16")),
    "batch larger than the training split": (
        {"tasks.ar.training.batch": 257},
        ("tasks.ar.data.train_examples", "is fewer than the batch of 257"),
    ),
    "evaluated at a length without a test split": (
        {"tasks.text.data.multiples": [0.5, 1]},
        ("evaluate.multiples", "2 is not among tasks.text.data.multiples"),
    ),
    # Axes.
    "heatmap with x": ({"ablations.qkv_subsets.x": "conv_k"}, ("ablations.qkv_subsets", "plot = heatmap takes no x")),
    "attention with x": ({"ablations.qk_norm.x": "conv_k"}, ("ablations.qk_norm", "plot = attention takes no x")),
    "sweep without x": ({"ablations.width.x": MISSING}, ("ablations.width", "plot = sweep needs x")),
    "x is no key": (
        {"ablations.depth.x": "layer"},
        *(
            ("ablations.depth", f"x = \"layer\": variant {variant!r} has no key 'layer'; did you mean 'layers'?")
            for variant in ("none", "qk", "qk_l2")
        ),
    ),
    "two variants in one place": (
        {"ablations.depth.x": "width"},
        ("ablations.depth", "x = \"width\": has the same value for variants 'qk' and 'qk_l2'"),
    ),
    "sweep over text": (
        {"ablations.width.reference_variants": [], "ablations.width.x": "position"},
        ("ablations.width", "a sweep needs numbers, but variant 'qk_full' has \"none\""),
    ),
    "sweep over a key that a reference variant does not set": (
        {"ablations.width.x": "conv_v", "variants.qk_full.conv_v": "full"},
        ("ablations.width", "Fix: set variants.qk.conv_v, or remove it from reference_variants"),
    ),
    "sweep over generated kernels": (
        {
            "ablations.width.x": "conv_q",
            "ablations.width.variants": ["qk_full", "qk_network"],
            "ablations.parametrization.variants": ["qk_channel", "qk_mixing"],
        },
        ("ablations.width", "variant 'qk_network' has \"network\""),
    ),
    # Names and cells.
    "unknown task": (
        {"ablations.qkv_subsets.tasks": ["ar", "nar", "copying", "text", "texts"]},
        ("ablations.qkv_subsets.tasks", "is not among tasks; did you mean 'text'?"),
    ),
    "unknown variant": (
        {"ablations.qkv_subsets.variants": ["none", "k", "qk", "nome"]},
        ("ablations.qkv_subsets.variants", "is not among variants; did you mean 'none'?"),
    ),
    "unknown reference variant": (
        {"ablations.width.reference_variants": ["qk", "zzz"]},
        ("ablations.width.reference_variants", "is not among variants"),
    ),
    "unknown reference task": (
        {"ablations.ngram.reference_tasks": ["ar", "nra"]},
        ("ablations.ngram.reference_tasks", "is not among tasks; did you mean 'nar'?"),
    ),
    "one cell in two ablations": (
        {"ablations.qkv_subsets.variants": ["none", "k", "qk", "learned"]},
        ("ablations.position.variants", "'learned' on 'ar' is already trained by ablation 'qkv_subsets'"),
    ),
    "untrained reference variant": (
        {"ablations.depth.reference_variants": ["learned", "qk"]},
        ("ablations.depth.reference_variants", "'learned' is trained on none of the tasks"),
    ),
    "untrained reference task": (
        {"ablations.dilation.reference_tasks": ["ar_rates"]},
        ("ablations.dilation.reference_tasks", "no variant of this ablation is trained on 'ar_rates'"),
    ),
    "task in both lists": (
        {"ablations.ngram.reference_tasks": ["ar", "nar3"]},
        ("ablations.ngram", "'nar3' is in both tasks and reference_tasks"),
    ),
    "variant in both lists": (
        {"ablations.qkv_subsets.reference_variants": ["qk"]},
        ("ablations.qkv_subsets", "'qk' is in both variants and reference_variants"),
    ),
    "reference task twice": ({"ablations.ngram.reference_tasks": ["ar", "ar"]}, ("ablations.ngram", "contains 'ar' twice")),
    "variant twice": (
        {"ablations.qkv_subsets.variants": ["none", "k", "k", "qk"]},
        ("ablations.qkv_subsets", "contains 'k' twice"),
    ),
    "task twice": ({"ablations.width.tasks": ["ar", "ar"]}, ("ablations.width", "contains 'ar' twice")),
    "task in no ablation": ({"tasks.extra": TASK}, ("tasks.extra", "is in no ablation")),
    "variant in no ablation": ({"variants.extra": MAMBA}, ("variants.extra", "is in no ablation")),
    "resources of an unknown task": ({"resources": {"tasks": {"arr": {}}}}, ("resources.tasks.arr", "is not among tasks")),
    # What a plot needs.
    "attention of mixers without attention weights": (
        {"ablations.baselines.plot": "attention"},
        *(
            ("ablations.baselines", f"plot = attention needs attention weights, but variant {variant!r} has none")
            for variant in ("delta", "gla", "mamba", "hyena")
        ),
    ),
    "attention of rotated features": (
        {"variants.linear.position": "rotary", "ablations.baselines.plot": "attention"}
        | {
            "ablations.baselines.variants": ["linear"],
            "ablations.parametrization.variants": ["qk_channel", "qk_mixing", "qk_network"],
        }
        | {"ablations.qkv_subsets.reference_variants": ["construction", "linear"]}
        | {"ablations.hybrid.reference_variants": ["none", "qk"]}
        | {"ablations.state.variants": ["qk_state", "based", "performer", "delta", "gla", "mamba", "hyena"]},
        ("ablations.baselines", "but variant 'linear' has none"),
    ),
    "learning rates of other convolutions": (
        {
            "ablations.learning_rates.reference_variants": ["none"],
            "ablations.learning_rates.reference_tasks": ["ar"],
            "variants.k.conv_v": 3,
        },
        *(("ablations.learning_rates", f"variant {variant!r} differs") for variant in ("none", "k")),
    ),
    "learning rates of a construction": (
        {"ablations.learning_rates.reference_variants": ["construction"], "ablations.learning_rates.reference_tasks": ["ar"]},
        ("ablations.learning_rates", "variant 'construction' differs"),
    ),
    "learning rates of other tasks": (
        {"ablations.learning_rates.reference_tasks": ["nar", "copying"]},
        *(
            ("ablations.learning_rates", f"needs a recall task with ngram = 1, but task {task!r} is none")
            for task in ("nar", "copying")
        ),
    ),
    "stability at one learning rate": (
        {"ablations.dilation.plot": "stability", "ablations.dilation.x": MISSING},
        *(
            ("ablations.dilation", f"plot = stability needs at least two learning rates, but variant {v!r} has one on task 'nar'")
            for v in ("qk", "qk_d2")
        ),
    ),
    "example of another task": (
        {"ablations.depth.plot": "example", "ablations.depth.x": MISSING, "ablations.depth.tasks": ["copying"]},
        ("ablations.depth", "plot = example needs a task of kind recall or needles, but task 'copying' is not"),
    ),
    "filters without a convolution": (
        {"ablations.depth.plot": "filters", "ablations.depth.x": MISSING},
        ("ablations.depth", "plot = filters needs a convolution, but variant 'none' has none"),
    ),
    "filters of Canon layers": (
        {"ablations.depth.plot": "filters", "ablations.depth.x": MISSING, "variants.none.canon": "A"},
        ("ablations.position", "has the same value for variants 'none' and 'qk'"),  # both have a convolution now
        ("ablations.depth", "plot = filters needs a convolution, but variant 'none' has none"),
    ),
    "positions of other tasks": (
        {"ablations.construction.plot": "positions"},
        *(
            ("ablations.construction", f"plot = positions needs a text task, but task {task!r} is none")
            for task in ("ar", "nar", "nar3", "copying")
        ),
    ),
    "recall without n-grams": (
        {"ablations.language.plot": "recall", "tasks.text.data.ngram": MISSING},
        ("ablations.language", "plot = recall needs tasks.text.data.ngram"),
    ),
    "recall of one variant": (
        {"ablations.language.plot": "recall", "ablations.language.reference_variants": []},
        ("ablations.language", "it needs at least two"),
    ),
    "recall of another task": (
        {"ablations.language.plot": "recall", "ablations.language.reference_tasks": ["ar"]}
        | {"ablations.language.reference_variants": ["none"]},
        ("ablations.language", "plot = recall needs a text task, but task 'ar' is none"),
    ),
    "recall against an untrained variant": (
        {"ablations.recall": RECALL | {"reference_tasks": ["text", "text2"], "reference_variants": ["k", "mamba"]}}
        | {"tasks.text2": SMOKE["tasks"]["text"], "ablations.language.tasks": ["text", "text2"]},
        ("ablations.recall", "plot = recall compares with 'k', which is not trained on 'text2'"),
    ),
    # Constructions.
    "construction for repeated signals": (
        {"tasks.copying.data.unique": False},
        ("variants.construction", "unique = true (task 'copying')"),
    ),
    "construction for long keys": (
        {"tasks.nar3.data.ngram": 5, "tasks.nar3.data.length": 32},
        ("variants.construction", "ngram = 5"),
    ),
    "construction with its convolution elsewhere": (
        {"variants.construction.placement": "v"},
        ("variants.construction.placement", "must be 'input', "),
    ),
    "placement that cannot solve a task": (
        {"variants.construction.placement": "input"},
        ("variants.construction", "no construction with placement = input solves copying (task 'copying')"),
    ),
    "construction for a large vocabulary": (
        {"tasks.ar.data.values": 1008},
        ("variants.construction", "supports a vocabulary of 1024, not 1026"),
    ),
    "two errors": (
        {"data_seed": None, "render.error_band": "sf"},
        ("data_seed", INTEGER),
        ("render.error_band", "did you mean 'sd'?"),
    ),
}
ERRORS = [
    *(pytest.param({path: value}, [(path, phrase)], id=f"{path} = {value}") for path, value, phrase in VALUES),
    *(pytest.param({path: value}, [(key, phrase)], id=f"{path} = {value}") for path, value, key, phrase in ITEMS),
    *(pytest.param({path: MISSING}, [(path, "is missing")], id=f"without {path}") for path in ABSENT),
    *(pytest.param({path: value}, [(path, f"renamed to {new}")], id=f"{path}, renamed") for path, value, new in RENAMED),
    *(
        pytest.param(
            {"variants.k": config | keys, "ablations.learning_rates.plot": "lines", "ablations.placement.plot": "lines"},
            [(f"variants.k{key}", phrase)],
            id=f"{config['mixer']} {keys}",
        )
        for config, keys, key, phrase in VARIANTS
    ),
    *(
        pytest.param(
            {("tasks", name): TASK}, [(f"tasks.{json.dumps(name, ensure_ascii=False)[1:-1]}", NAME)], id=f"task {name!r}"
        )
        for name in BAD_NAMES
    ),
    pytest.param({("variants", "a-b"): MAMBA}, [("variants.a-b", NAME)], id="variant a-b"),
    pytest.param({("ablations", "A"): SMOKE["ablations"]["width"]}, [("ablations.A", NAME)], id="ablation A"),
    pytest.param({("tasks", "a" * 300): TASK}, [(f"tasks.{'a' * 57}...", NAME)], id="name of 300 letters"),
    *(pytest.param(edits, errors, id=name) for name, (edits, *errors) in RULES.items()),
]


@pytest.mark.parametrize(("edits", "errors"), ERRORS)
def test_an_error_is_one_line_with_its_key(edits, errors):
    edits = {
        path: {k: v for k, v in value.items() if v is not MISSING} if isinstance(value, dict) else value
        for path, value in edits.items()
    }
    lines = errors_of(edits)
    assert len(lines) == len(errors), lines
    for line, (key, phrase) in zip(lines, errors, strict=True):
        assert re.match(rf"{re.escape(key)}( = |: | \(used by )", line), line
        assert phrase in line


GOLDEN = {
    "seeds": ([0], "seeds = [0]: renamed to defaults.training.seeds"),
    "defaults.training.clip": (
        1.0,
        "defaults.training.clip = 1.0 (used by variants.none on ar and 38 more): renamed to grad_clip",
    ),
    "defaults.training.warmup": (
        1,
        "defaults.training.warmup = 1 (used by variants.none on ar and 38 more): must be less than 1",
    ),
    "tasks.ar.data.ngrams": (1, "tasks.ar.data.ngrams = 1: unknown key; did you mean 'ngram'?"),
    "tasks.ar.data.lenght": (20, "tasks.ar.data.lenght = 20: unknown key; did you mean 'length'?"),
    "tasks.ar.data.kind": (MISSING, "tasks.ar.data.kind: is missing"),
    "tasks.ar.training.steps": (
        3.5,
        "tasks.ar.training.steps = 3.5: must be a valid integer",
    ),
    "variants.k.conv_k": (
        "ful",
        "variants.k.conv_k = \"ful\": must be a valid integer or 'full', 'network', 'decay' or 'state'; did you mean 'full'?",
    ),
    "variants.mamba.heads": (2, "variants.mamba.heads = 2: mixer 'mamba' has no heads"),
    "variants.none.heads": (3, "variants.none: heads = 3 does not divide width = 16 (width from defaults)"),
    "ablations.width.x": (MISSING, "ablations.width: plot = sweep needs x, the key on its axis"),
    "ablations.width.reference_variants": (
        ["qk", "constructio"],
        "ablations.width.reference_variants = \"constructio\": is not among variants; did you mean 'construction'?",
    ),
    "tasks.extra": (TASK, "tasks.extra: is in no ablation, so it would not be trained. Fix: add it to an ablation or remove it"),
}


@pytest.mark.parametrize("path", GOLDEN)
def test_whole_messages(path):
    value, message = GOLDEN[path]
    assert errors_of({path: value}) == [message]


def test_every_command_refuses_a_file_with_errors(project):
    dump(edited({"variants.k.conv_k": 0, ("tasks", "../x"): TASK}), project / "params.yaml")
    lines = refused(project, "validate")
    assert [line.split(" = ")[0] for line in lines] == ["params.yaml: tasks.../x", "params.yaml: variants.k.conv_k"]
    for command in (("plan",), ("generate", "ar"), ("train", "ar", "k"), ("evaluate", "ar")):
        assert refused(project, *command) == lines


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "the file = null: must be a mapping"),
        (b"# nothing\n", "the file = null: must be a mapping"),
        (b"[1, 2]", "the file = [1, 2]: must be a mapping"),
        (b"a text", 'the file = "a text": must be a mapping'),
        (b"seeds: \xff", "byte 7 is not UTF-8"),
    ],
)
def test_a_file_without_a_mapping(content, line, tmp_path):
    assert errors_of_file(content, tmp_path / "params.yaml") == [line]


def test_a_missing_file(project):
    (project / "folder").mkdir()
    assert refused(project, "plan") == ["params.yaml: No such file or directory"]
    assert refused(project, "validate") == ["params.yaml: No such file or directory"]
    assert refused(project, "validate", "nowhere/a.yaml") == ["nowhere/a.yaml: No such file or directory"]
    assert refused(project, "validate", "folder") == ["folder: Is a directory"]


HEAD = "seeds: [0, 1]\n{}\ndevice: cpu\nvariants:\n  k: {{mixer: attention, conv_k: 3}}\n"


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (HEAD.format("data_seed: 0\ndata_seed: 1"), "line 3: key 'data_seed' appears twice"),
        (HEAD.format("data_seed: 0").replace("k: 3}", "k: 3, conv_k: 4}"), "line 5: key 'conv_k' appears twice"),
        (HEAD.format("data_seed: [0"), "line 3, column 7: while parsing a flow sequence, did not find expected ',' or ']'"),
        (HEAD.format("data_seed: 0\n  x: 1"), "line 3, column 4: mapping values are not allowed .*"),
        (HEAD.format("data_seed: *nothing"), "line 2, column 12: found undefined alias"),
        (HEAD.format("data_seed: !!python/object/apply:os.mkdir [made]"), "line 2, column 12: could not determine a .* tag .*"),
        (HEAD.format("data_seed: 0\ntasks: !!set {a, b}"), "line 3, column 8: could not determine a .* tag .*:set'"),
        (HEAD.format("data_seed:\t0\n\tx: 1"), "line 3, column 1: .*"),
        (HEAD.format("data_seed: 0") + "---\na: 1\n", r"line 6, column 1: expected a single document in the stream, .*"),
    ],
    ids=["key twice", "key of a variant twice", "bracket", "indent", "undefined alias", "tag", "set", "tab", "two documents"],
)
def test_broken_yaml_is_one_line_with_its_place(content, pattern, tmp_path):
    (line,) = errors_of_file(content, tmp_path / "params.yaml")
    assert re.fullmatch(pattern, line)


@pytest.mark.parametrize(
    "line",
    [
        "data_seed: 2026-02-30",
        "data_seed: 2026-02-03T25:00:00",
        "data_seed: !!int x",
        "data_seed: !!float x",
        "data_seed: !!bool x",
        "data_seed: !!binary x",
        "data_seed: !!set {a}",
        "data_seed: &a [*a]",
        f"data_seed: {'9' * 5000}",
        f"data_seed: {'[' * 3000}{']' * 3000}",
        "data_seed: 0\n1: 2",
        "data_seed: 0\nnull: 2",
        "data_seed: 0\n2026-01-01: 2",
        "data_seed: 0\n? [a]\n: 2",
        "data_seed: 0\n? {a: 1}\n: 2",
        'data_seed: 0\n"": 2',
        'data_seed: 0\n"a\\nb": 2',
        'data_seed: 0\n"a\\e[31m\\rb": 2',
    ],
    ids=lambda line: line.partition("\n")[2] or line[11:30],
)
def test_unusual_yaml_is_refused_in_printable_lines(line, tmp_path):
    for error in errors_of_file(HEAD.format(line), tmp_path / "params.yaml"):
        assert len(error) < 500


def test_an_error_names_the_file_that_was_checked(project):
    dump(edited({"ablations.depth": MISSING, "variants.qk_l2": MISSING}), project / "other.yaml")
    (line,) = refused(project, "validate", "other.yaml")
    assert line.startswith("other.yaml: ablations.depth: is missing, and dvc.yaml has a stage train_depth")


def test_an_ablation_without_a_stage_is_refused(project):
    extra = {"question": "?", "tasks": ["text"], "variants": ["learned"], "plot": "lines"}
    with pytest.raises(ParamsError, match=r"^params.yaml: ablations.extra: dvc.yaml has no stage") as raised:
        check_stages(study_of(edited({"ablations.extra": extra}), "params.yaml"))
    assert len(raised.value.lines) == 1


@pytest.mark.parametrize("content", ["", "[]", "stages:", "stages: 3", "stages: [", "x: 1", "stages: {1: {cmd: x}}"])
def test_a_broken_dvc_yaml_is_one_line(content, project):
    (project / "dvc.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ParamsError) as raised:
        check_stages(study_of(SMOKE, "params.yaml"))
    (line,) = raised.value.lines
    assert line.startswith("dvc.yaml: ")


def test_an_unknown_task_or_variant_is_refused_with_the_nearest_name(project):
    dump(SMOKE, project / "params.yaml")
    assert refused(project, "generate", "arr") == ["params.yaml: tasks.arr: is missing; did you mean 'ar'?"]
    variants = load_study("params.yaml").variants
    assert find_entry(variants, "variants", "k") is variants["k"]
    with pytest.raises(ParamsError) as caught:
        find_entry(variants, "variants", "zzz")
    assert caught.value.lines == ["params.yaml: variants.zzz: is missing"]


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key and item below `node`."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(node[key], (*path, key))


def at(mapping: Any, path: tuple | list) -> Any:
    for step in path:
        mapping = mapping[step]
    return mapping


def subject(line: str, file: str | Path) -> tuple[str, ...]:
    """The path of the key that an error is about."""
    assert line.startswith(f"{file}: ")
    assert line.isprintable()
    key = re.split(r" = |: | \(used by ", line.removeprefix(f"{file}: "), maxsplit=1)[0]
    return () if key == "the file" else tuple(key.split("."))


def plain(mapping: Any) -> str:
    """Equal for 1 and 1.0, different for 1 and true."""
    return json.dumps(json.loads(json.dumps(mapping, default=str), parse_int=float), sort_keys=True)  # str of a date


STRANGE = """
exponent: 1e-3
large: 1e9
point: 1.
no_zero: .5
"on": on
"off": off
"yes": yes
"no": no
"y": y
"true": True
zero: 012
octal: 0o17
hexadecimal: 0x1F
binary: 0b11
thousand: 1_000
plus: +1
"null": null
tilde: ~
nothing:
None: None
date: 2026-01-02
time: 2026-01-02T03:04:05
clock: 12:30:45
infinite: .inf
minus: -.Inf
nan: .nan
quoted: "1"
tagged: !!str 1
merged: {<<: {a: 1, b: 2}, b: 3}
"""


def test_values_are_parsed_as_by_dvc(tmp_path):
    file = tmp_path / "strange.yaml"
    file.write_text(STRANGE)
    values = read_yaml(file)
    # As text, because 1 == True and nan != nan.
    assert repr(values) == repr(load_yaml(str(file)))
    assert (values["exponent"], values["on"], values["no"], values["zero"], values["octal"]) == (1e-3, "on", "no", 12, 15)


@ALL
def test_a_study_is_parsed_as_by_dvc(file):
    assert repr(read_yaml(file)) == repr(load_yaml(str(file)))


@pytest.fixture
def train_stages(project, monkeypatch):
    """A function that returns the names of the train stages that DVC makes of params.yaml."""
    for place in ("SITE_CACHE", "GLOBAL_CONFIG", "SYSTEM_CONFIG"):
        monkeypatch.setenv(f"DVC_{place}_DIR", str(project / place))
    (project / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc/config", project / ".dvc")
    subprocess.run(["git", "init", "--quiet"], check=True)

    def resolve() -> list[str]:
        with Repo(str(project)) as repo:
            return [stage.name for stage in repo.index.stages if stage.name.startswith("train_")]

    return resolve


@ALL
def test_the_cells_are_the_train_stages_of_dvc(file, train_stages, project):
    shutil.copy(file, project / "params.yaml")
    study = load_study("params.yaml")
    trained = cells(study)
    # Cells have the order of params.yaml, stages that of dvc.yaml.
    assert sorted(train_stages()) == sorted(f"train_{cell.ablation}@{cell.task}-{cell.variant}" for cell in trained)
    assert len({(cell.task, cell.variant) for cell in trained}) == len(trained)

    raw = load_yaml(str(file))
    expected = []
    for name, ablation in raw["ablations"].items():
        for task in ablation.get("tasks", []):
            for variant in ablation.get("variants", []):
                expected.append((task, variant, name))
    assert trained == expected
    for task in raw["tasks"]:
        assert variants_on(study, task) == [v for v in raw["variants"] if any((task, v) == cell[:2] for cell in expected)]


def test_a_stage_with_the_matrix_of_another_ablation_is_refused(project):
    text = (project / "dvc.yaml").read_text()
    wrong = text.replace("ablations.depth.variants", "ablations.parametrization.variants")
    assert wrong != text
    (project / "dvc.yaml").write_text(wrong)
    with pytest.raises(ParamsError) as raised:
        check_stages(study_of(SMOKE, "params.yaml"))
    (line,) = raised.value.lines
    assert line.startswith("params.yaml: ablations.depth: the matrix of train_depth in dvc.yaml must be")


def test_empty_lists_switch_an_ablation_off(train_stages, project):
    off = {"ablations.depth.tasks": [], "ablations.depth.variants": [], "variants.qk_l2": MISSING}
    dump(edited(off), project / "params.yaml")
    study = load_study("params.yaml")
    check_stages(study)
    assert {cell.ablation for cell in cells(study)} == {name for name, a in SMOKE["ablations"].items() if a["tasks"]} - {"depth"}
    assert len(train_stages()) == len(cells(study))
    assert CliRunner().invoke(main, ["validate"]).exit_code == 0


@pytest.mark.parametrize("emptied", ["tasks", "variants"])
def test_one_empty_list_switches_an_ablation_off(emptied, train_stages, project):
    off = {"variants.qk_l2": MISSING, "ablations.depth.variants": ["k"], "ablations.depth.reference_variants": []}
    dump(edited(off | {f"ablations.depth.{emptied}": []}), project / "params.yaml")
    assert len(train_stages()) == len(cells(load_study("params.yaml")))


def models(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for key in type(value).model_fields:
            yield from models(getattr(value, key))
    elif isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from models(item)


def test_a_study_cannot_be_changed():
    study = study_of(SMOKE, "params.yaml")
    found = {type(model).__name__ for model in models(study)}
    assert found >= {"Study", "TaskConfig", "AttentionConfig", "Ablation", "CellTraining"}
    for model in models(study):
        for key in type(model).model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(model, key, getattr(model, key))
            assert not isinstance(getattr(model, key), list | set)


def test_every_configuration_is_strict():
    found = [Config]
    for kind in found:
        found += kind.__subclasses__()
        assert (kind.model_config["frozen"], kind.model_config["extra"], kind.model_config["strict"]) == (True, "forbid", True)
        with pytest.raises(TypeError):
            kind(1)
    assert len(found) > 10
