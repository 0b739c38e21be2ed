"""params.yaml: what is valid runs, what is not ends in one clear line a fault, and the grid is DVC's grid."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner, Result
from dvc.repo import Repo
from dvc.utils.serialize import load_yaml, modify_yaml
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from cat.config import Config
from cat.mixers.registry import AnyVariant, ConstructionConfig
from pipeline.cli import main
from pipeline.config.errors import ParamsError, find_entry
from pipeline.config.grid import cells, variants_on
from pipeline.config.load import load_study
from pipeline.config.study import Study
from pipeline.config.yaml_file import read_yaml
from pipeline.stages.plan import check_stages

ROOT = Path(__file__).parents[3]
STUDIES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
SMOKE_TEXT = (ROOT / "presets/smoke.yaml").read_text(encoding="utf-8")
SMOKE = YAML(typ="safe").load(SMOKE_TEXT)
for inside in ("example", "filters", "positions"):  # would object to much that is tried of the others' variants
    del SMOKE["ablations"][inside]
SMOKE["ablations"]["stability"] |= {"across": [], "beside": [], "figure": "heatmap"}
RECALL = SMOKE["ablations"].pop("recall")
SMOKE_JSON = json.dumps(SMOKE)
MIXERS = " or ".join(get_args(mixer.model_fields["mixer"].annotation)[0] for mixer in get_args(get_args(AnyVariant)[0]))

ALL = pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
MISSING = Enum("Edit", ["MISSING"]).MISSING  # unlike an object's, its name is the same in every process of the tests


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """An empty folder with dvc.yaml, as the current one."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edited(edits: dict) -> Any:
    """smoke.yaml with other values at some paths, dotted or, where a key has a dot in it, as a tuple."""
    mapping = json.loads(SMOKE_JSON)
    for path, value in edits.items():
        *parents, key = path.split(".") if isinstance(path, str) else path
        owner = mapping
        for parent in parents:
            owner = owner[parent]
        if value is MISSING:
            del owner[key]
        else:
            owner[key] = value
    return mapping


def without(mapping: dict) -> dict:
    """What is left when all that is missing is left out."""
    return {key: value for key, value in mapping.items() if value is not MISSING}


def dump(mapping: Any, file: Path) -> None:
    writer = YAML(typ="safe")
    writer.allow_unicode = True
    writer.sort_base_mapping_type_on_output = False
    writer.dump(mapping, file)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(project: Path, *arguments: str) -> list[str]:
    """The lines of a command that must be refused, as every command must refuse: exit code 2, nothing printed or written."""
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
def test_a_study_is_what_it_was_once_dvc_has_written_it_for_an_experiment(file, tmp_path):
    written = shutil.copy(file, tmp_path)
    with modify_yaml(written) as content:
        content["seeds"] = [7]
    assert load_yaml(written) == {**load_yaml(file), "seeds": [7]}


def test_what_cannot_be_read_once_dvc_has_written_it_is_refused(project):
    text = SMOKE_TEXT.replace("{question: Other blocks,", '{question: "Other blocks?",')
    assert text != SMOKE_TEXT
    (project / "params.yaml").write_text(text, encoding="utf-8")
    assert load_study().ablations["blocks"].question == "Other blocks?"
    assert refused(project, "validate") == [
        "params.yaml: blocks: {question: Other blocks?, tasks: [], variants: []...: cannot be read once `dvc exp run -S` has"
        " written it anew, without quotes; is there a question mark in braces?"
    ]


@ALL
def test_validating_prints_the_grid_and_imports_nothing_heavy(file):
    result = run("-X", "importtime", "-m", "pipeline", "validate", str(file.relative_to(ROOT)), cwd=ROOT)
    assert result.returncode == 0
    study = load_study(file)
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["variant", *study.tasks]
    assert [line.split()[0] for line in lines[2 : 2 + len(study.variants)]] == list(study.variants)
    assert lines[-1].startswith(f"{len(cells(study))} cells, ")
    # The seeds, learning rates and steps of every cell, and of no other place in the table.
    known = [cell for cell in cells(study) if isinstance(study.variants[cell.variant], ConstructionConfig)]
    assert result.stdout.count("theorem") == len(known)
    assert result.stdout.count(" x ") == 2 * (len(cells(study)) - len(known)) + lines[-1].count(" x ")

    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert {"pydantic", "ruamel", "tabulate"} <= loaded, "the list of imports was not understood"
    assert not loaded & {"torch", "mlflow", "pandas"}


TASK = SMOKE["tasks"]["ar"]
LANDMARK = {"mixer": "landmark", "width": 16, "layers": 1, "heads": 2, "position": "none", "k": 3, "block": 8, "top": 2}
LINEAR = {"mixer": "linear", "width": 16, "layers": 1, "heads": 2, "position": "none"}
MAMBA = {"mixer": "mamba", "width": 16, "layers": 1}
NAME = "is not a name of one to forty small letters, digits and underscores, the first of them no underscore"
DEVICE = "is not auto, cpu, cuda or cuda:N, N from 0 to 99"

UNKNOWN = {
    "seed": ([0], "seed = [0]: unknown key; did you mean 'seeds'?"),
    "tasks.ar.trian": ({}, "tasks.ar.trian = {}: unknown key; did you mean 'train'?"),
    "tasks.ar.data.ngrams": (1, "tasks.ar.data.ngrams = 1: unknown key; did you mean 'ngram'?"),
    "tasks.copying.data.signal": (3, "tasks.copying.data.signal = 3: unknown key; did you mean 'signals'?"),
    "tasks.text.data.sources": ("x", "tasks.text.data.sources = \"x\": unknown key; did you mean 'source'?"),
    "tasks.ar.train.learning_rate": (0.1, "tasks.ar.train.learning_rate = 0.1: unknown key; did you mean 'learning_rates'?"),
    "variants.qk.qknorm": (True, "variants.qk.qknorm = true: unknown key; did you mean 'qk_norm'?"),
    "ablations.streams.questions": ("?", "ablations.streams.questions = \"?\": unknown key; did you mean 'question'?"),
    "train.weightdecay": (0, "train.weightdecay = 0: unknown key; did you mean 'weight_decay'?"),
    "evaluate.multiple": ([1], "evaluate.multiple = [1]: unknown key; did you mean 'multiples'?"),
    "render.dpis": (None, "render.dpis = null: unknown key; did you mean 'dpi'?"),
    "render.zzz": (1, "render.zzz = 1: unknown key; known are dpi, spread"),
    "variants.k": (LANDMARK | {"blok": 8}, "variants.k.blok = 8: unknown key; did you mean 'block'?"),
    "variants.none": (MAMBA | {"expansion": 2}, "variants.none.expansion = 2: unknown key; did you mean 'expand'?"),
}
ABSENT = {
    "seeds": "seeds: is missing",
    "train": "train: is missing",
    "tasks.ar.data": "tasks.ar.data: is missing",
    "tasks.ar.data.length": "tasks.ar.data.length: is missing",
    "tasks.ar.data.kind": "tasks.ar.data: kind is missing",
    "tasks.ar.train.batch": "tasks.ar.train.batch: is missing",
    "variants.none.heads": "variants.none.heads: is missing",
    "variants.none.mixer": "variants.none: mixer is missing",
    "ablations.streams.question": "ablations.streams.question: is missing",
    "evaluate.multiples": "evaluate.multiples: is missing",
}
WRONG = [
    ("tasks.ar.train.steps", True, "true: is not a whole number"),
    ("tasks.ar.train.steps", 3.5, "3.5: is not a whole number"),
    ("tasks.ar.train.steps", None, "null: is not a whole number"),
    ("tasks.ar.train.steps", "20", '"20": is not a whole number'),
    ("variants.qk.qk_norm", 1, "1: is not true or false"),
    ("tasks.copying.data.unique", "yes", '"yes": is not true or false'),
    ("train.clip", "x", '"x": is not a number'),
    ("train.clip", True, "true: is not a number"),
    ("device", 0, "0: is not text"),
    ("device", None, "null: is not text"),
    ("seeds", {"a": 1}, '{"a": 1}: is not a list'),
    ("seeds", 3, "3: is not a list"),
    ("seeds", [], "[]: is empty"),
    ("tasks", {}, "{}: is empty"),
    ("evaluate.multiples", [], "[]: is empty"),
    ("ablations.streams.tasks", "ar", '"ar": is not a list'),
    ("tasks", [1], "[1]: is not a mapping"),
    ("train", [1, 2], "[1, 2]: is not a mapping"),
    ("tasks.ar.train", None, "null: is not a mapping"),
    ("variants.none", "x", '"x": is not a mapping'),
    ("threads", "autos", "\"autos\": is not a whole number, and is not auto; did you mean 'auto'?"),
    ("variants.k.k", True, "true: is not a whole number, and is not full or network or decay or state"),
    ("variants.k.k", 0, "0: must be greater than or equal to 1, and is not full or network or decay or state"),
    ("tasks.ar.train.steps", -5, "-5: must be greater than or equal to 1"),
    ("tasks.ar.train.steps", 2**31, "2147483648: must be less than 2147483648"),
    ("tasks.ar.data.ngram", 9, "9: must be less than or equal to 8"),
    ("train.warmup", 1, "1: must be less than 1"),
    ("train.warmup", 1.0, "1.0: must be less than 1"),
    ("train.stop_at", 1.5, "1.5: must be less than or equal to 1"),
    ("train.weight_decay", float("nan"), "NaN: is not a finite number"),
    ("train.weight_decay", float("inf"), "Infinity: is not a finite number"),
    ("train.clip", float("inf"), "Infinity: is not a finite number"),
    ("render.dpi", 49, "49: must be greater than or equal to 50"),
    ("data_seed", 2**31, "2147483648: must be less than 2147483648"),
    ("device", "cuda:128", f'"cuda:128": {DEVICE}'),
    ("device", "gpu", f'"gpu": {DEVICE}'),
    ("device", "cuda:", f'"cuda:": {DEVICE}'),
    ("precision", "float16", "\"float16\": is not float32 or bfloat16; did you mean 'bfloat16'?"),
    ("variants.none.mixer", "atention", f"\"atention\": is not {MIXERS}; did you mean 'attention'?"),
    ("variants.none.mixer", "zzz", f'"zzz": is not {MIXERS}'),
    ("tasks.ar.data.kind", "recal", "\"recal\": is not recall or copying or text; did you mean 'recall'?"),
    ("tasks.ar.data.kind", None, "null: is not recall or copying or text"),
    ("tasks.ar.data.kind", True, "true: is not recall or copying or text"),
    ("tasks.ar.data.questions", "al", "\"al\": is not one or all; did you mean 'all'?"),
    (
        "variants.none.position",
        "rotory",
        "\"rotory\": is not none or rotary or alibi or learned or sinusoidal; did you mean 'rotary'?",
    ),
]
ITEMS = [
    ("seeds", [0, -1], "seeds.1 = -1: must be greater than or equal to 0"),
    ("seeds", [0, None], "seeds.1 = null: is not a whole number"),
    ("seeds", [None], "seeds.0 = null: is not a whole number"),
    ("tasks.ar.train.learning_rates", [0.01, 0], "tasks.ar.train.learning_rates.1 = 0: must be greater than 0"),
    ("tasks.ar.data.multiples", [-1, 1], "tasks.ar.data.multiples.0 = -1: must be greater than 0"),
    ("ablations.streams.variants", ["Q"], f'ablations.streams.variants.0 = "Q": {NAME}'),
    ("ablations.streams.variants", [1], "ablations.streams.variants.0 = 1: is not text"),
]
PLAIN = {"mixer": "attention", "width": 16, "layers": 1, "heads": 2, "position": "none"}
BASED, PERFORMER = PLAIN | {"mixer": "based", "window": 4}, PLAIN | {"mixer": "performer", "features": 8}
DELTA, HYENA = PLAIN | {"mixer": "delta"}, {"mixer": "hyena", "width": 16, "layers": 1, "conv": 3, "filter_size": 4}
GLA, UNDONE = (
    PLAIN | {"mixer": "gla", "gate_rank": 4},
    "gated linear attention normalises what it reads, which undoes any temperature",
)
KNOWN = {"mixer": "theory"}
WITHOUT = "without a filter on q, k or v"
TAPS = "is not full or network or decay or state"
SOFTMAX = ": alibi position is added to the scores before a softmax, and"
CONDITION = "is about one layer of attention without positions and qk_norm, its only filter on k, one a head"
OF_COPYING = "the training length of 16 of task 'copying'"
LINES = [
    # What a filter is, where there is none or another one.
    (PLAIN, {"sharing": "channel"}, f': sharing = "channel" {WITHOUT}'),
    (PLAIN, {"dilation": 2}, f": dilation = 2 {WITHOUT}"),
    (PLAIN, {"filter_init": "random"}, f': filter_init = "random" {WITHOUT}'),
    (PLAIN, {"filter_bias": True}, f": filter_bias = true {WITHOUT}"),
    (LANDMARK, {"k": None, "filter_norm": True}, ": filter_norm = true without a filter on q, k, v or summary"),
    (PLAIN, {"k": "state"}, ": k = state needs filter_size, its hidden units or decays"),
    (PLAIN, {"q": 3, "v": "network"}, ": v = network needs filter_size, its hidden units or decays"),
    (LANDMARK, {"summary": "decay"}, ": summary = decay needs filter_size, its hidden units or decays"),
    (PLAIN, {"k": 3, "filter_size": 2}, ": filter_size = 2 is for filters whose taps are generated: network, decay, state"),
    (PLAIN, {"k": "full", "filter_size": 2}, ": filter_size = 2 is for filters whose taps are generated: network, decay, state"),
    (PLAIN, {"k": 1, "dilation": 2}, ": dilation = 2 spaces the taps of a filter that counts two or more, and there is none"),
    (
        PLAIN,
        {"k": "full", "dilation": 2},
        ": dilation = 2 spaces the taps of a filter that counts two or more, and there is none",
    ),
    (PLAIN, {"k": 4, "dilation": 6}, f": k = 4 taps 6 tokens apart reach past {OF_COPYING}"),
    (PLAIN, {"k": 3, "heads": 1, "sharing": "mixing"}, ": sharing = mixing needs more than one head to mix"),
    (
        PLAIN,
        {"qk_norm": True, "temperature": True},
        ": temperature = true with qk_norm = true, which learns the temperature already",
    ),
    # What a mixer has not.
    (BASED, {"position": "alibi"}, f"{SOFTMAX} Taylor features have none"),
    (PERFORMER, {"position": "alibi"}, f"{SOFTMAX} random features have none"),
    (DELTA, {"position": "alibi"}, f"{SOFTMAX} the delta rule has none"),
    (DELTA, {"position": "rotary"}, ": rotary position turns keys that the delta rule compares; use none, learned or sinusoidal"),
    (DELTA, {"qk_norm": True}, ": qk_norm = true: the delta rule has unit keys and queries always, and no temperature"),
    (DELTA, {"temperature": True}, ": temperature = true: the delta rule has unit keys and queries always, and no temperature"),
    (GLA, {"position": "alibi"}, f"{SOFTMAX} gated linear attention has none"),
    (GLA, {"position": "rotary"}, ": rotary position turns pairs of channels that decay apart; use none, learned or sinusoidal"),
    (GLA, {"qk_norm": True}, f": qk_norm = true: {UNDONE}"),
    (GLA, {"temperature": True}, f": temperature = true: {UNDONE}"),
    (GLA, {"gate_rank": 17}, ": gate_rank = 17 is more than width = 16, the rank of any map of a token"),
    (PLAIN, {"window": 4}, ".window = 4: mixer 'attention' has no window"),
    (PLAIN, {"features": 4}, ".features = 4: mixer 'attention' has no features"),
    (PLAIN, {"output_gate": True}, ".output_gate = true: mixer 'attention' has no output_gate"),
    (PLAIN, {"gate": True}, ".gate = true: mixer 'attention' has no gate"),
    (PLAIN, {"summary": 4}, ".summary = 4: mixer 'attention' has no stream summary to filter"),
    (HYENA, {"k": 3}, ".k = 3: mixer 'hyena' has no stream k to filter"),
    (HYENA, {"sharing": "head"}, ".sharing = \"head\": mixer 'hyena' has no sharing"),
    (MAMBA, {"filter_size": 3}, ".filter_size = 3: mixer 'mamba' has no filter_size"),
    (KNOWN, {"width": 16}, ".width = 16: mixer 'theory' has no width"),
    (KNOWN, {}, " on task 'text': no theorem is about tasks of kind text"),
    # What cannot be trained at its length.
    (BASED, {"window": 16}, f": window = 16 leaves nothing to Taylor features in {OF_COPYING}"),
    (HYENA, {"conv": 17}, f": conv = 17 taps reach past {OF_COPYING}"),
    (LANDMARK, {"summary": 17}, f": summary = 17 taps is longer than {OF_COPYING}"),
    # Values that are none.
    (PLAIN, {"k": "ful"}, f".k = \"ful\": is not a whole number, and {TAPS}; did you mean 'full'?"),
    (PLAIN, {"k": 1.5}, f".k = 1.5: is not a whole number, and {TAPS}"),
    (PLAIN, {"k": 3, "sharing": "heads"}, ".sharing = \"heads\": is not head or channel or mixing; did you mean 'head'?"),
    (PLAIN, {"k": 3, "dilation": 0}, ".dilation = 0: must be greater than or equal to 1"),
    (PLAIN, {"k": 3, "filter_init": "zero"}, '.filter_init = "zero": is not identity or random'),
    (PLAIN, {"k": 3, "filter_bias": 1}, ".filter_bias = 1: is not true or false"),
    (PLAIN, {"k": "state", "filter_size": 0}, ".filter_size = 0: must be greater than or equal to 1"),
    (PLAIN, {"temperature": 8.0}, ".temperature = 8.0: is not true or false"),
    (BASED, {"window": 0}, ".window = 0: must be greater than or equal to 1"),
    (BASED, {"window": "full"}, '.window = "full": is not a whole number'),
    (PERFORMER, {"features": 0}, ".features = 0: must be greater than or equal to 1"),
    (DELTA, {"gate": 1}, ".gate = 1: is not true or false"),
    (GLA, {"gate_rank": 0}, ".gate_rank = 0: must be greater than or equal to 1"),
    (HYENA, {"conv": 0}, ".conv = 0: must be greater than or equal to 1"),
    (HYENA, {"filter_size": "network"}, '.filter_size = "network": is not a whole number'),
    # Values that are missing.
    (PLAIN, {"mixer": "based"}, ".window: is missing"),
    (PLAIN, {"mixer": "performer"}, ".features: is missing"),
    (PLAIN, {"mixer": "gla"}, ".gate_rank: is missing"),
    (HYENA, {"conv": MISSING}, ".conv: is missing"),
    (HYENA, {"filter_size": MISSING}, ".filter_size: is missing"),
]
BAD_NAMES = ["a-b", "AR", "../x", "a b", ";rm", "a.b", "$(id)", "\N{CYRILLIC SMALL LETTER A}r", "\N{ARABIC-INDIC DIGIT TWO}"]
RULES = {
    "filter on a stream that the mixer lacks": (
        {"variants.none": MAMBA | {"v": 2}},
        "variants.none.v = 2: mixer 'mamba' has no stream v to filter",
    ),
    "filter longer than training": (
        {"variants.k.k": 17},
        "variants.k: k = 17 taps is longer than the training length of 16 of task 'copying'",
    ),
    "block longer than training": (
        {"variants.k": LANDMARK | {"block": 17}, "ablations.rates.figure": "lines"},
        "variants.k: block = 17 is longer than the training length of 16 of task 'copying'",
    ),
    "mamba's filter longer than training": (
        {"variants.k": MAMBA | {"conv": 17}, "ablations.rates.figure": "lines"},
        "variants.k: conv = 17 taps reach past the training length of 16 of task 'copying'",
    ),
    "more pairs than N-grams": (
        {"tasks.nar.data.keys": 1},
        "tasks.nar.data: pairs = 4 is more than the 1 2-grams over keys = 1",
    ),
    "sequence too short for its pairs": (
        {"tasks.ar.data.length": 16},
        "tasks.ar.data: a sequence of 8 tokens cannot hold 2 pairs and their questions, which take 9",
    ),
    "more unique signals than symbols": (
        {"tasks.copying.data.unique": True, "tasks.copying.data.alphabet": 2},
        "tasks.copying.data: signals = 3 unique signals need an alphabet of as many, not 2",
    ),
    "multiples without 1": (
        {"tasks.ar.data.multiples": [0.5, 2]},
        "tasks.ar.data: multiples = [0.5, 2.0] must rise and have 1, the training length, among them",
    ),
    "heads do not divide width": ({"variants.none.heads": 3}, "variants.none: heads = 3 does not divide width = 16"),
    "odd head width with rotary": (
        {"variants.none.position": "rotary", "variants.none.width": 6},
        "variants.none: rotary position needs an even head width, not 3",
    ),
    "alibi in linear attention": (
        {"variants.k": LINEAR | {"position": "alibi"}},
        "variants.k: alibi position is added to the scores before a softmax, and linear attention has none",
    ),
    "alibi in landmark attention": (
        {"variants.k": LANDMARK | {"position": "alibi"}},
        "variants.k: alibi position makes landmarks compete by distance, not by content; landmark attention has none",
    ),
    "filter_norm without a filter": (
        {"variants.none.filter_norm": True},
        "variants.none: filter_norm = true without a filter on q, k or v",
    ),
    "heatmap with x": ({"ablations.streams.x": "k"}, "ablations.streams: figure = heatmap has no axis x"),
    "sweep without x": ({"ablations.width.x": MISSING}, "ablations.width: figure = sweep needs x, the key on its axis"),
    "x is no key": (
        {"ablations.depth.x": "layer"},
        "ablations.depth.x = \"layer\": variant 'none' has no such key; did you mean 'layers'?",
        "ablations.depth.x = \"layer\": variant 'qk' has no such key; did you mean 'layers'?",
        "ablations.depth.x = \"layer\": variant 'qk_l2' has no such key; did you mean 'layers'?",
    ),
    "x tells nothing apart": (
        {"ablations.depth.x": "width"},
        "ablations.depth.x = \"width\": does not tell variant 'qk_l2' from 'qk'",
    ),
    "sweep over what is no number": (
        {"ablations.width.beside": [], "ablations.width.x": "position"},
        'ablations.width.x = "position": a sweep needs a number, and variant \'qk_full\' has "none"',
    ),
    "sweep over what a variant beside does not have": (
        {"ablations.width.x": "v", "variants.qk_full.v": "full"},
        "ablations.width.x = \"v\": variant 'qk' has no v; set variants.qk.v, or take 'qk' out of beside",
    ),
    "unknown task in an ablation": (
        {"ablations.streams.tasks": ["ar", "nar", "copying", "text", "texts"]},
        "ablations.streams.tasks = \"texts\": is not among tasks; did you mean 'text'?",
    ),
    "unknown variant in an ablation": (
        {"ablations.streams.variants": ["none", "k", "qk", "nome"]},
        "ablations.streams.variants = \"nome\": is not among variants; did you mean 'none'?",
    ),
    "unknown variant beside": (
        {"ablations.width.beside": ["qk", "zzz"]},
        'ablations.width.beside = "zzz": is not among variants',
    ),
    "one cell in two ablations": (
        {"ablations.streams.variants": ["none", "k", "qk", "learned"]},
        "ablations.position.variants: 'learned' on 'ar' is trained by ablation 'streams' already; list it under beside",
    ),
    "beside, and trained nowhere there": (
        {"ablations.depth.beside": ["learned", "qk"]},
        "ablations.depth.beside: 'learned' is trained on none of its tasks; list it under variants",
    ),
    "unknown task across": (
        {"ablations.ngram.across": ["ar", "nra"]},
        "ablations.ngram.across = \"nra\": is not among tasks; did you mean 'nar'?",
    ),
    "across, and trained nowhere there": (
        {"ablations.dilation.across": ["ar_rates"]},
        "ablations.dilation.across: none of its variants is trained on 'ar_rates'; list it under tasks",
    ),
    "task trained and across": (
        {"ablations.ngram.across": ["ar", "nar3"]},
        "ablations.ngram: 'nar3' is under tasks and under across",
    ),
    "task twice across": ({"ablations.ngram.across": ["ar", "ar"]}, "ablations.ngram: across has 'ar' twice"),
    "figure that there is not": (
        {"ablations.ngram.figure": "line"},
        'ablations.ngram.figure = "line": is not heatmap or sweep or contrast or lines or attention or rates or stability or'
        " example or filters or positions or recall; did you mean 'lines'?",
    ),
    "attention of what attends to nothing": (
        {"ablations.baselines.figure": "attention"},
        *(
            f"ablations.baselines: figure = attention shows weights of attention, and variant {variant!r} has none"
            for variant in ("delta", "gla", "mamba", "hyena")
        ),
    ),
    "attention with turned features": (
        {"variants.linear.position": "rotary", "ablations.baselines.figure": "attention"}
        | {"ablations.baselines.variants": ["linear"], "ablations.kinds.variants": ["qk_channel", "qk_mixing", "qk_network"]}
        | {"ablations.streams.beside": ["theory", "linear"], "ablations.hybrid.beside": ["none", "qk"]}
        | {"ablations.state.variants": ["qk_state", "based", "performer", "delta", "gla", "mamba", "hyena"]},
        "ablations.baselines: figure = attention shows weights of attention, and variant 'linear' has none",
    ),
    "rates of a filter on other streams": (
        {"ablations.rates.beside": ["none"], "ablations.rates.across": ["ar"], "variants.k.v": 3},
        *(f"ablations.rates: figure = rates {CONDITION}, which variant {variant!r} is not" for variant in ("none", "k")),
    ),
    "rates of a theorem": (
        {"ablations.rates.beside": ["theory"], "ablations.rates.across": ["ar"]},
        f"ablations.rates: figure = rates {CONDITION}, which variant 'theory' is not",
    ),
    "rates of a task with another condition": (
        {"ablations.rates.across": ["nar", "copying"]},
        "ablations.rates: figure = rates is about recall with ngram = 1, which task 'nar' is not",
        "ablations.rates: figure = rates is about recall with ngram = 1, which task 'copying' is not",
    ),
    "bits along what is no text": (
        {"ablations.theory.figure": "positions"},
        *(
            f"ablations.theory: figure = positions is about text, which task {task!r} is not"
            for task in ("ar", "nar", "nar3", "copying")
        ),
    ),
    "recall where nothing says what it is": (
        {"ablations.language.figure": "recall", "tasks.text.data.ngram": MISSING},
        "ablations.language: figure = recall is about recalled answers, and tasks.text.data.ngram, which says what they are, is"
        " missing",
    ),
    "recall of one variant": (
        {"ablations.language.figure": "recall", "ablations.language.beside": []},
        "ablations.language: figure = recall compares variants with the first, and there is no other",
    ),
    "recall beside what is trained elsewhere": (
        {"ablations.language.figure": "recall", "ablations.language.across": ["ar"], "ablations.language.beside": ["none"]},
        "ablations.language: figure = recall is about text, which task 'ar' is not",
    ),
    "recall beside a reference that is not there": (
        {"ablations.recall": RECALL | {"across": ["text", "text2"], "beside": ["k", "mamba"]}}
        | {"tasks.text2": SMOKE["tasks"]["text"], "ablations.language.tasks": ["text", "text2"]},
        "ablations.recall: figure = recall is of gains on 'k', which is not trained on 'text2'",
    ),
    "runs of tokens longer than what is before an answer": (
        {"tasks.text.data.ngram": 9},
        "tasks.text.data: ngram = 9 is more than the 8 tokens before the answers of a test window",
    ),
    "attention by an axis": (
        {"ablations.norm.x": "k"},
        "ablations.norm: figure = attention has no axis x",
    ),
    "sweep over what generates the taps": (
        {"ablations.width.variants": ["qk_full", "qk_network"], "ablations.kinds.variants": ["qk_channel", "qk_mixing"]},
        'ablations.width.x = "q": a sweep needs a number, and variant \'qk_network\' has "network"',
    ),
    "theorem about signals that occur twice": (
        {"tasks.copying.data.unique": False},
        "variants.theory on task 'copying': the theorem about copying is about signals that occur once: unique: true",
    ),
    "theorem about long keys": (
        {"tasks.nar3.data.ngram": 5, "tasks.nar3.data.length": 32},
        "variants.theory on task 'nar3': ngram = 5 needs scores that 32-bit numbers do not tell apart; up to 4 is prescribed",
    ),
    "theorem about many tokens": (
        {"tasks.ar.data.values": 1008},
        "variants.theory on task 'ar': the theorem's layer is twice as wide as the vocabulary; it is built up to 1024 tokens,"
        " not 1026",
    ),
    "task in no ablation": (
        {"tasks.extra": TASK},
        "tasks.extra: belongs to no ablation, so it would not be trained; name it in one or take it out",
    ),
    "variant in no ablation": (
        {"variants.extra": MAMBA},
        "variants.extra: belongs to no ablation, so it would not be trained; name it in one or take it out",
    ),
    "evaluated at a length without a test split": (
        {"tasks.text.data.multiples": [0.5, 1]},
        "evaluate.multiples: 2 is not among tasks.text.data.multiples",
    ),
    "batch larger than the training split": (
        {"tasks.ar.train.batch": 257},
        "tasks.ar.train.batch = 257: is more than the 256 training examples",
    ),
    "seed twice": ({"seeds": [3, 0, 3]}, "seeds = [3, 0, 3] has a seed twice"),
    "micro-batch of a whole batch": (
        {"tasks.ar.train.micro_batch": 16},
        "tasks.ar.train: micro_batch = 16 is no part of batch = 16; it must be smaller",
    ),
    "stability at one learning rate": (
        {"ablations.dilation.figure": "stability", "ablations.dilation.x": MISSING},
        "ablations.dilation: figure = stability is drawn against the learning rate, of which task 'nar' has one",
    ),
    "learning rate twice": (
        {"tasks.ar.train.learning_rates": [0.01, 1e-2]},
        "tasks.ar.train: learning_rates = [0.01, 0.01] has a value twice",
    ),
    "variant twice in an ablation": (
        {"ablations.streams.variants": ["none", "k", "k", "qk"]},
        "ablations.streams: variants has 'k' twice",
    ),
    "task twice in an ablation": ({"ablations.width.tasks": ["ar", "ar"]}, "ablations.width: tasks has 'ar' twice"),
    "ablation without a stage": (
        {"ablations.extra": {"question": "?", "tasks": ["text"], "variants": ["learned"], "figure": "lines"}},
        "ablations.extra: dvc.yaml has no stage for it; copy another train_ stage to train_extra and put extra in its matrix",
    ),
    "stage without an ablation": (
        {"ablations.depth": MISSING, "variants.qk_l2": MISSING},
        "ablations.depth: is missing, and dvc.yaml has a stage train_depth; empty lists of tasks and variants switch it off",
    ),
    "two faults, two lines": (
        {"data_seed": None, "render.spread": "sf"},
        "data_seed = null: is not a whole number",
        "render.spread = \"sf\": is not range or sd; did you mean 'sd'?",
    ),
}
FAULTS = [
    *(pytest.param({path: value}, [line], id=f"unknown {path}") for path, (value, line) in UNKNOWN.items()),
    *(pytest.param({path: MISSING}, [line], id=f"without {path}") for path, line in ABSENT.items()),
    *(pytest.param({path: value}, [f"{path} = {end}"], id=f"{path} = {value}") for path, value, end in WRONG),
    *(pytest.param({path: value}, [line], id=f"{path} = {value}") for path, value, line in ITEMS),
    *(
        pytest.param(
            {("tasks", name): TASK}, [f"tasks.{name} = {json.dumps(name, ensure_ascii=False)}: {NAME}"], id=f"named {name}"
        )
        for name in BAD_NAMES
    ),
    pytest.param({("variants", "a-b"): MAMBA}, [f'variants.a-b = "a-b": {NAME}'], id="variant named a-b"),
    pytest.param({("ablations", "A"): SMOKE["ablations"]["width"]}, [f'ablations.A = "A": {NAME}'], id="ablation named A"),
    pytest.param({("tasks", "a" * 300): TASK}, [f'tasks.{"a" * 57}... = "{"a" * 56}...: {NAME}'], id="named with 300 letters"),
    *(pytest.param(edits, lines, id=name) for name, (edits, *lines) in RULES.items()),
    *(
        pytest.param(
            {"variants.k": without(line | keys), "ablations.rates.figure": "lines"},
            [f"variants.k{end}"],
            id=f"{line['mixer']} {keys}",
        )
        for line, keys, end in LINES
    ),
]


@pytest.mark.parametrize(("edits", "lines"), FAULTS)
def test_a_fault_is_one_line(edits, lines, project):
    dump(edited(edits), project / "params.yaml")
    expected = [f"params.yaml: {line}" for line in lines]
    assert refused(project, "validate") == expected
    assert refused(project, "plan") == expected


@pytest.mark.parametrize("command", ["validate", "plan"])
def test_a_fault_is_one_line_of_a_fresh_interpreter(command, project):
    dump(edited({"variants.k.k": 0, ("tasks", "../x"): TASK}), project / "params.yaml")
    before = contents(project)
    result = run("-m", "pipeline", command, cwd=project)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f'params.yaml: tasks.../x = "../x": {NAME}\n'
        "params.yaml: variants.k.k = 0: must be greater than or equal to 1, and is not full or network or decay or state\n"
    )
    assert contents(project) == before


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "the file = null: is not a mapping"),
        (b"# nothing\n", "the file = null: is not a mapping"),
        (b"[1, 2]", "the file = [1, 2]: is not a mapping"),
        (b"a text", 'the file = "a text": is not a mapping'),
        (b"seeds: \xff", "byte 7 is not UTF-8"),
    ],
)
def test_a_file_that_is_no_mapping(content, line, project):
    (project / "params.yaml").write_bytes(content)
    assert refused(project, "validate") == [f"params.yaml: {line}"]
    assert refused(project, "plan") == [f"params.yaml: {line}"]


def test_no_file(project):
    (project / "folder").mkdir()
    assert refused(project, "plan") == ["params.yaml: No such file or directory"]
    assert refused(project, "validate") == ["params.yaml: No such file or directory"]
    assert refused(project, "validate", "nowhere/a.yaml") == ["nowhere/a.yaml: No such file or directory"]
    assert refused(project, "validate", "folder") == ["folder: Is a directory"]


def in_smoke(line: str) -> str:
    """smoke.yaml with `line` in the place of its data seed."""
    assert SMOKE_TEXT.count("\ndata_seed: 0\n") == 1
    return SMOKE_TEXT.replace("\ndata_seed: 0\n", f"\n{line}\n")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (in_smoke("data_seed: 0\ndata_seed: 1"), "line 6: key 'data_seed' twice"),
        (SMOKE_TEXT.replace("k: 3}", "k: 3, k: 4}", 1), r"line \d+: key 'k' twice"),
        (in_smoke("data_seed: [0"), "line 6, column 7: while parsing a flow sequence, did not find expected ',' or ']'"),
        (in_smoke("data_seed: 0\n  x: 1"), "line 6, column 4: mapping values are not allowed .*"),
        (in_smoke("data_seed: *nothing"), "line 5, column 12: found undefined alias"),
        (in_smoke("data_seed: !!python/object/apply:os.mkdir [made]"), "line 5, column 12: could not determine a .* tag .*"),
        (in_smoke("data_seed:\t0\n\tx: 1"), "line 6, column 1: .*"),
        (SMOKE_TEXT + "---\na: 1\n", r"line \d+, column 1: expected a single document in the stream, but found another .*"),
    ],
    ids=[
        "key twice",
        "key of a variant twice",
        "bracket left open",
        "indent",
        "alias of nothing",
        "tag",
        "tab",
        "two documents",
    ],
)
def test_broken_yaml_is_one_line_with_the_place(content, words, project):
    (project / "params.yaml").write_text(content, encoding="utf-8")
    (line,) = refused(project, "validate")
    assert re.fullmatch(f"params.yaml: {words}", line)
    assert refused(project, "plan") == [line]


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
def test_strange_yaml_is_refused_in_printable_lines(line, project):
    (project / "params.yaml").write_text(in_smoke(line), encoding="utf-8")
    for fault in refused(project, "validate"):
        assert fault.startswith("params.yaml: ")
        assert fault.isprintable()
        assert len(fault) < 500


@pytest.mark.parametrize(
    ("edits", "subject"),
    [
        ({"tasks.ar.data.length": 10**400}, "tasks.ar.data"),
        ({("tasks", "a\nb"): TASK}, "tasks.a"),
        ({"evaluate.multiples": [1, 2, 1]}, "evaluate"),
        ({"ablations.streams.beside": ["qk"]}, "ablations.streams"),
        ({"tasks.ar.data.multiples": [0.5, 0.51, 1, 2]}, "tasks.ar.data"),
        ({"device": "cuda:\N{ARABIC-INDIC DIGIT THREE}"}, "device"),
        ({"ablations.streams.question": "a\rb"}, 'ablations.streams.question = "a\\rb": is not one line of text'),
    ],
    ids=[
        "endless sequence",
        "name of two lines",
        "multiple twice",
        "variant trained and beside",
        "two splits of one length",
        "device in other digits",
        "question with a carriage return",
    ],
)
def test_a_fault_is_one_line_about_its_key(edits, subject, project):
    dump(edited(edits), project / "params.yaml")
    (line,) = refused(project, "validate")
    assert line.startswith(f"params.yaml: {subject}")
    assert line.isprintable()
    assert len(line) < 500


@pytest.mark.parametrize(
    ("path", "value"),
    [("ablations.streams.question", ""), ("train", {1: 2}), ("variants", {True: MAMBA})],
)
def test_a_fault_is_told_in_the_words_of_yaml(path, value, project):
    dump(edited({path: value}), project / "params.yaml")
    for line in refused(project, "validate"):
        assert line.startswith(f"params.yaml: {path}")
        assert not re.search("Tuple|Dictionary|String|Keys|validation", line)


def test_no_key_of_another_meaning_is_suggested(project):
    dump(edited({"variants.none": MAMBA | {"heads": 2}}), project / "params.yaml")
    (line,) = refused(project, "validate")
    assert line.startswith("params.yaml: variants.none.heads = 2: ")
    assert "expand'" not in line


def test_a_fault_names_the_file_that_was_checked(project):
    dump(edited({"ablations.depth": MISSING, "variants.qk_l2": MISSING}), project / "other.yaml")
    (line,) = refused(project, "validate", "other.yaml")
    assert line.startswith("other.yaml: ablations.depth: is missing")


@pytest.mark.parametrize("content", ["", "[]", "stages:", "stages: 3", "stages: [", "x: 1", "stages: {1: {cmd: x}}"])
def test_broken_stages_are_one_line(content, project):
    dump(SMOKE, project / "params.yaml")
    (project / "dvc.yaml").write_text(content, encoding="utf-8")
    (line,) = refused(project, "validate")
    assert line.startswith("dvc.yaml: ")
    assert refused(project, "plan") == [line]


def test_a_command_names_what_is_there(project):
    dump(SMOKE, project / "params.yaml")
    assert refused(project, "generate", "arr") == ["params.yaml: tasks.arr: is missing; did you mean 'ar'?"]
    variants = load_study("params.yaml").variants
    assert find_entry(variants, "variants", "k") is variants["k"]
    with pytest.raises(ParamsError) as caught:
        find_entry(variants, "variants", "zzz")
    assert caught.value.lines == ["params.yaml: variants.zzz: is missing"]


def places(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every key and every item below `node`."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(node[key], (*path, key))


def at(mapping: Any, path: tuple) -> Any:
    for step in path:
        mapping = mapping[step]
    return mapping


def mutants(path: tuple) -> Iterator[tuple[tuple, Any]]:
    """Where smoke.yaml is changed, at `path` or at its misspelling, and what it then is."""
    for value in (MISSING, None, [], {}, "x", True, -1, 1e9, 0.5):
        mutant = json.loads(SMOKE_JSON)
        if value is MISSING:
            del at(mutant, path[:-1])[path[-1]]
        else:
            at(mutant, path[:-1])[path[-1]] = value
        yield path, mutant
    if isinstance(path[-1], str):
        mutant = json.loads(SMOKE_JSON)
        owner = at(mutant, path[:-1])
        owner[f"{path[-1]}x"] = owner.pop(path[-1])
        yield (*path[:-1], f"{path[-1]}x"), mutant


def subject(line: str, file: Path) -> tuple[str, ...]:
    """The path that an error is about."""
    assert line.startswith(f"{file}: ")
    assert line.isprintable()
    key = re.split(" = |: ", line.removeprefix(f"{file}: "), maxsplit=1)[0]
    return () if key == "the file" else tuple(key.split("."))


def plain(mapping: Any) -> str:
    """Equal for 1 and 1.0, unlike for 1 and true."""
    return json.dumps(json.loads(json.dumps(mapping), parse_int=float), sort_keys=True)


def outcome(file: Path) -> Study | list[str]:
    """The study of a file, or its faults."""
    try:
        return load_study(file)
    except ParamsError as error:
        return error.lines


@pytest.mark.parametrize("section", SMOKE)
def test_every_mutant_is_valid_or_refused_by_its_key(section, tmp_path):
    file = tmp_path / "mutant.yaml"
    for path in [path for path in places(SMOKE) if path[0] == section]:
        for faulty, mutant in mutants(path):
            file.write_text(json.dumps(mutant), encoding="utf-8")
            result = outcome(file)
            if isinstance(result, Study):
                assert plain(result.model_dump(mode="json", exclude_unset=True)) == plain(mutant), (
                    "a value was changed or ignored"
                )
                assert faulty == path or path[:-1] == ("ablations",), "only an ablation may have any name"
                continue
            assert result
            subjects = {subject(line, file) for line in result}
            try:
                Study.model_validate(mutant)
            except ValidationError:
                ways = [tuple(map(str, way)) for way in (path, faulty)]
                for key in subjects:
                    assert any(key[: len(way)] == way[: len(key)] for way in ways), f"{key} is not on the way to {path}"
            else:  # A contradiction between sections: it is about what another one says.
                for key in subjects:
                    at(mutant, key)


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


def test_values_are_read_as_dvc_reads_them(tmp_path):
    file = tmp_path / "strange.yaml"
    file.write_text(STRANGE)
    values = read_yaml(file)
    # Their text, because 1 == True and nan != nan.
    assert repr(values) == repr(load_yaml(str(file)))
    assert (values["exponent"], values["on"], values["no"], values["zero"], values["octal"]) == (1e-3, "on", "no", 12, 15)


@ALL
def test_a_study_is_read_as_dvc_reads_it(file):
    assert repr(read_yaml(file)) == repr(load_yaml(str(file)))


@pytest.fixture
def stages(project, monkeypatch):
    """The names of the train_ stages that DVC makes of params.yaml."""
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
def test_the_cells_are_the_stages_that_dvc_trains(file, stages, project):
    shutil.copy(file, project / "params.yaml")
    study = load_study("params.yaml")
    trained = cells(study)
    # Cells are walked in the order of params.yaml, stages in that of dvc.yaml.
    assert sorted(stages()) == sorted(f"train_{cell.ablation}@{cell.task}-{cell.variant}" for cell in trained)
    assert len({(cell.task, cell.variant) for cell in trained}) == len(trained)

    raw = load_yaml(str(file))
    expected = []
    for name, ablation in raw["ablations"].items():
        for task in ablation["tasks"]:
            for variant in ablation["variants"]:
                expected.append((task, variant, name))
    assert trained == expected
    for task in raw["tasks"]:
        assert variants_on(study, task) == [v for v in raw["variants"] if any((task, v) == cell[:2] for cell in expected)]


def test_a_stage_of_another_ablation_s_cells_is_refused(stages, project):
    dump(SMOKE, project / "params.yaml")
    text = (project / "dvc.yaml").read_text()
    (project / "dvc.yaml").write_text(text.replace("ablations.depth.variants", "ablations.kinds.variants"))
    with pytest.raises(ParamsError) as raised:
        check_stages(load_study("params.yaml"))
    assert raised.value.lines == [
        "params.yaml: ablations.depth: the matrix of train_depth in dvc.yaml must be"
        " {task: ${ablations.depth.tasks}, variant: ${ablations.depth.variants}}"
    ]


def test_empty_lists_switch_an_ablation_off(stages, project):
    off = {"ablations.depth.tasks": [], "ablations.depth.variants": [], "variants.qk_l2": MISSING}
    dump(edited(off), project / "params.yaml")
    study = load_study("params.yaml")
    check_stages(study)
    assert {cell.ablation for cell in cells(study)} == {name for name, a in SMOKE["ablations"].items() if a["tasks"]} - {"depth"}
    assert len(stages()) == len(cells(study))
    assert CliRunner().invoke(main, ["validate"]).exit_code == 0


@pytest.mark.parametrize("emptied", ["tasks", "variants"])
def test_one_empty_list_is_enough(emptied, stages, project):
    off = {"variants.qk_l2": MISSING, "ablations.depth.variants": ["k"], "ablations.depth.beside": []}
    dump(edited(off | {f"ablations.depth.{emptied}": []}), project / "params.yaml")
    assert len(stages()) == len(cells(load_study("params.yaml")))


def models(value: Any) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for key in type(value).model_fields:
            yield from models(getattr(value, key))
    elif isinstance(value, dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from models(item)


@ALL
def test_a_study_cannot_be_changed(file):
    study = load_study(file)
    assert {type(model).__name__ for model in models(study)} >= {
        "Study",
        "TaskSection",
        "Attention",
        "Ablation",
        "Protocol",
    }
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
