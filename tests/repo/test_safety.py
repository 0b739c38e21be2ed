"""Outside input is refused before it does harm: names, damaged files, pickles, unsafe loaders, open ports."""

import ast
import copy
import functools
import os
import pickle
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.cli import main
from pipeline.config import claims
from pipeline.config.claims import Claim
from pipeline.config.errors import ParamsError, parse_config
from pipeline.config.load import study_of
from pipeline.config.names import NAME, PATTERNS, Name
from pipeline.config.yaml_file import read_yaml
from pipeline.reporting.html import page
from pipeline.reporting.verdicts import ABSENT
from pipeline.storage import runs
from pipeline.storage.tables import read_table
from tests.helpers.study import ROOT, shared_study
from tests.pipeline.config.test_study import at, contents, dump, run

# Names.

GOOD = ["k", "0", "none", "2_taps", "a" * 40]
BAD = {
    "parent": "../x",
    "absolute": "/etc/passwd",
    "current": ".",
    "windows": "..\\x",
    "slash": "a/b",
    "semicolon": "a;touch x",
    "substitution": "$(touch x)",
    "backticks": "`touch x`",
    "pipe": "a|b",
    "variable": "${HOME}",
    "template": "${item}",
    "glob": "*",
    "space": "a b",
    "quote": "a'b",
    "dash": "-rf",
    "dot": "a.b",
    "at": "a@b",
    "underscore": "_a",
    "capital": "K",
    "cyrillic": "\N{CYRILLIC SMALL LETTER A}",
    "full width": "\N{FULLWIDTH LATIN SMALL LETTER A}",
    "combining": "a\N{COMBINING ACUTE ACCENT}",
    "accented": "\N{LATIN SMALL LETTER E WITH ACUTE}",
    "other digits": "\N{ARABIC-INDIC DIGIT TWO}",
    "invisible": "a\N{ZERO WIDTH JOINER}",
    "backwards": "a\N{RIGHT-TO-LEFT OVERRIDE}b",
    "newline": "a\n",
    "carriage return": "a\r",
    "escape": "a\x1b[31m",
    "null": "a\0",
    "empty": "",
    "long": "a" * 41,
    "very long": "a" * 300,
}
RULE = PATTERNS[NAME]
RAW = {"params.yaml": read_yaml(ROOT / "presets/smoke.yaml"), "claims.yaml": read_yaml(ROOT / "claims.yaml")}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder inside a folder, with the smoke study and the claims."""
    folder = tmp_path / "outer" / "project"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "presets/smoke.yaml", folder / "params.yaml")
    for file in ("claims.yaml", "dvc.yaml"):
        shutil.copy(ROOT / file, folder)
    monkeypatch.chdir(folder)
    return folder


def refusal(project, *arguments):
    """The error lines of a command that fails; it must print and write nothing, inside and outside the folder.

    Evaluation may keep the scores of the models before the damaged one.
    """
    before = contents(project.parent.parent)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.exception
    assert result.stdout == ""
    after = contents(project.parent.parent)
    assert {path for path in after.keys() - before.keys() if "checkpoints" not in path.parts} == set()
    assert before.items() <= after.items()
    lines = result.stderr.removesuffix("\n").split("\n")
    assert all(line.isprintable() and len(line) < 340 for line in lines)
    return lines


def lines_of(raw, file):
    """The error lines for a parsed file."""
    read = study_of if file == "params.yaml" else functools.partial(parse_config, dict[Name, Claim])
    with pytest.raises(ParamsError) as error:
        read(raw, file)
    return error.value.lines


@pytest.mark.parametrize("place", ["tasks", "variants", "ablations", "claims"])
def test_a_bad_name_is_refused_where_it_is_defined(place, project):
    file = "claims.yaml" if place == "claims" else "params.yaml"
    for name in BAD.values():
        raw = copy.deepcopy(RAW[file])
        owner = raw if place == "claims" else raw[place]
        owner[name] = next(iter(owner.values()))
        (line,) = lines_of(raw, file)
        assert line.startswith(f"{file}: {'' if place == 'claims' else place}")
        assert line.endswith(f": {RULE}")
        assert line.isprintable()
    dump(raw, project / file)
    assert refusal(project, "validate") == [line]


@pytest.mark.parametrize(
    "path",
    [f"ablations.ngram.{key}" for key in ("tasks", "variants", "reference_variants", "reference_tasks")]
    + [f"cat_solves_recall.{key}" for key in ("tasks", "variants", "baseline", "ablation", "metric")],
)
def test_a_bad_name_is_refused_where_it_is_used(path, project):
    file = "params.yaml" if path.startswith("ablations") else "claims.yaml"
    *parents, key = path.split(".")
    for name in BAD.values():
        raw = copy.deepcopy(RAW[file])
        owner = at(raw, tuple(parents))
        owner[key] = name if key in ("ablation", "metric") else [name]
        (line,) = lines_of(raw, file)
        assert line.startswith(f"{file}: {path}")
        assert line.endswith(f": {RULE}")
        assert line.isprintable()
    dump(raw, project / file)
    assert refusal(project, "validate") == [line]


@pytest.mark.parametrize("command", ["generate", "train", "evaluate", "show", "profile", "sample"])
def test_a_bad_name_on_the_command_line_touches_no_file(command, project):
    for name in BAD.values():
        for names in [(name, "k"), ("ar", name)] if command in ("train", "profile", "sample") else [(name,)]:
            (line,) = refusal(project, command, "--", *names)
            assert line.startswith(f"params.yaml: {'tasks' if names[0] == name else 'variants'}.")
            assert "is missing" in line


@settings(derandomize=True, deadline=None, database=None)
@given(st.text() | st.from_regex(r"[a-z0-9_]{1,40}\n?"))
@example("_a")
@example("a\n")
@example("")
def test_a_name_has_at_most_forty_plain_characters(name):
    plain = len(name) <= 40 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_") and name[:1] not in ("", "_")
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        assert not plain
    else:
        assert plain


@pytest.mark.parametrize("name", GOOD)
def test_a_plain_name_is_accepted(name):
    assert TypeAdapter(Name).validate_python(name) == name


def test_an_unknown_option_is_not_taken_for_a_name(project):
    assert refusal(project, "generate", "--force")[-1].startswith("Error: No such option")


# Damaged files.


class Harmful:
    """Creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return shared_study(tmp_path_factory, tasks=["copying"])


@pytest.fixture
def study(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "outer" / "study")
    monkeypatch.chdir(tmp_path / "outer" / "study")
    return tmp_path / "outer" / "study"


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_at_lines(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))


def repeat_a_line(path):
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])


def write(content):
    return lambda path: path.write_bytes(content)


def spoil_a_number(path):
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:-1], lines[-1].rpartition(",")[0] + ",high\n"]))


def without(column):
    return lambda path: pd.read_csv(path).drop(columns=column).to_csv(path, index=False)


def objects(path):
    np.savez(path, inputs=np.array([Harmful()], dtype=object), targets=np.zeros(1))


def of_another_variant(path):
    shutil.copy(runs.weights_path("copying", "qk", 0), path)


def of_another_length(path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(path, framework="np") as file:
        about = file.metadata()["model"]
    save_file(load_file(path), path, metadata={"model": re.sub('"length": [0-9]+', '"length": 99', about)})


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 255
    path.write_bytes(content)


PICKLE = pickle.dumps(Harmful())
WEIGHTS, SCORES = "runs/copying/k/seed_0.safetensors", "scores/copying.npz"
TABLE, CURVES, CLAIMS = "results/copying.csv", "runs/copying/k/history.csv", "verdicts/claims.csv"
DAMAGED = [
    (("evaluate", "copying"), WEIGHTS, write(PICKLE), "is not a weights file of this project"),
    (("evaluate", "copying"), WEIGHTS, write(b""), "is not a weights file of this project"),
    (("evaluate", "copying"), WEIGHTS, cut, "is not a weights file of this project"),
    (("evaluate", "copying"), WEIGHTS, of_another_variant, "is of another model than"),
    (("evaluate", "copying"), WEIGHTS, of_another_length, "is of another model than"),
    (("judge",), SCORES, write(PICKLE), "is not an .npz file of numbers"),
    (("judge",), SCORES, objects, "Python objects in it are not loaded"),
    (("judge",), SCORES, write(b""), "is not an .npz file of numbers"),
    (("judge",), SCORES, cut, "is not an .npz file of numbers"),
    (("judge",), SCORES, flip, "is not an .npz file of numbers"),
    (("judge",), SCORES, Path.unlink, "is missing; run `dvc repro`"),
    (("judge",), TABLE, Path.unlink, "is missing; run `dvc repro`"),
    (("judge",), TABLE, write(b""), "is not a CSV table"),
    (("judge",), TABLE, write(bytes(range(256))), "is not a CSV table"),
    (("judge",), TABLE, cut, "its last line has no line break"),
    (("judge",), TABLE, cut_at_lines, "lacks seed 1 at length 32"),
    (("judge",), TABLE, repeat_a_line, "duplicate row"),
    (("judge",), TABLE, spoil_a_number, "is not a CSV table"),
    *[(("judge",), TABLE, without(c), f"column {c}") for c in ("task", "variant", "seed", "length", "metric", "value")],
    (("render",), TABLE, without("value"), "lacks the column value"),
    (("render",), "results/references/copying.csv", without("reference"), "lacks the column reference"),
    (("show",), TABLE, without("variant"), "lacks the column variant"),
    (("render",), CURVES, without("valid_accuracy"), "lacks the column valid_accuracy"),
    (("render",), CURVES, cut, "its last line has no line break"),
    (("render",), CLAIMS, without("effect"), "lacks the column effect"),
    (("show",), CLAIMS, without("verdict"), "lacks the column verdict"),
    (("show",), CLAIMS, lambda path: path.write_text(path.read_text().replace("undecided", "sure")), "'sure' is not supported"),
    (("show", "copying"), "verdicts/comparisons.csv", without("task"), "lacks the column task"),
    (("track",), "results/filters/copying.csv", without("lag"), "lacks the column lag"),
]


@pytest.mark.parametrize(("arguments", "file", "damage", "message"), DAMAGED)
def test_a_damaged_file_is_an_error_of_one_line(arguments, file, damage, message, study):
    damage(Path(file))
    (line,) = refusal(study, *arguments)
    assert line.startswith(f"{arguments[0]}: {file}: ")
    assert message in line
    assert "dvc" in line
    assert not Path("harmed").exists()


@pytest.mark.parametrize("damage", [objects, write(PICKLE)], ids=["objects", "pickle"])
def test_data_are_never_unpickled(damage, study):
    for split in ("data/copying/train.npz", "heldout/copying/test_16.npz"):
        damage(Path(split))
    before = contents(study)
    trained = run("-m", "pipeline", "train", "copying", "k", cwd=study)  # in a new process, because this one caches the data
    assert (trained.returncode, trained.stdout, trained.stderr.count("\n")) == (2, "", 1)
    after = contents(study)
    assert {path for path in before.keys() ^ after.keys() if "checkpoints" not in path.parts} == set(), "at most a lock may stay"
    assert before.items() <= after.items()
    assert len(refusal(study, "evaluate", "copying")) == 1
    assert not Path("harmed").exists()


def test_a_pickle_does_harm_if_it_is_loaded(tmp_path, monkeypatch):
    """Otherwise the tests above would show nothing."""
    monkeypatch.chdir(tmp_path)
    objects(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=True) as arrays:
        assert arrays["inputs"].tolist() == [None]
    assert Path("harmed").is_dir()


def test_names_that_look_like_missing_values_stay_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("variant,seed,value\nnan,0,\nnull,1,0.5\n12,2,nan\n")
    table = read_table(path, {"variant": str, "seed": int, "value": float})
    assert table["variant"].tolist() == ["nan", "null", "12"]
    assert table["value"].isna().tolist() == [True, False, True]


def test_a_study_s_texts_are_escaped_in_html():
    body = page("# Title\n\n## Is <script>alert(1)</script> run?\n\n<img src=x onerror=alert(1)>\n", Path())
    assert "<script" not in body
    assert "<img" not in body
    assert "&lt;script&gt;alert(1)" in body


def test_a_claim_s_text_is_not_terminal_markup(study):
    path = Path(CLAIMS)
    text = path.read_text().replace(ABSENT, "there is no")  # otherwise the claim would be left out
    statement = claims.load()["cat_solves_recall"].statement
    assert statement in text
    path.write_text(text.replace(statement, "[/b] One [red]layer"))
    result = CliRunner().invoke(main, ["show"])
    assert result.exit_code == 0, result.exception
    assert "[/b] One" in result.stdout


# Loaders that run code, and commands through a shell.

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
CALLS = {
    "eval",
    "exec",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.hub.load",
    "pd.read_pickle",
    "pandas.read_pickle",
}
METHODS = {"extractall", "unpack_archive", "read_pickle"}


def unsafe(source):
    """The lines of a module that unpickle, run text as code, unpack archives, or use a shell."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if any(name.partition(".")[0] in MODULES for name in imported):
                yield node.lineno
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        values = {key: value.value for key, value in options.items() if isinstance(value, ast.Constant)}
        if (
            name in CALLS
            or name.rpartition(".")[2] in METHODS
            or (name in ("np.load", "numpy.load") and values.get("allow_pickle") is not False)
            or (name == "YAML" and options and values.get("typ") not in ("safe", "rt"))
            or ("shell" in options and values.get("shell") is not False)
            or values.get("allow_pickle") is True
        ):
            yield node.lineno


SOURCES = [file for folder in ("cat", "pipeline", "benchmarks", "examples", ".ci") for file in (ROOT / folder).rglob("*.py")]


def test_no_input_is_run_as_code():
    assert len(SOURCES) > 100
    found = {str(file.relative_to(ROOT)): list(unsafe(file.read_text(encoding="utf-8"))) for file in SOURCES}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "np.savez(path, allow_pickle=True, a=a)",
        "YAML(typ='unsafe')",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "tar.extractall(path)",
        "pd.read_pickle(path)",
    ],
)
def test_unsafe_calls_are_found(source):
    assert list(unsafe(source)) == [1]


@pytest.mark.parametrize(
    "source", ["model.eval()", "np.load(path, allow_pickle=False)", "YAML(typ='safe')", "import ruamel.yaml"]
)
def test_safe_calls_are_not(source):
    assert list(unsafe(source)) == []


# Make targets.


def planned(target):
    done = subprocess.run(
        ["make", "--dry-run", "-o", ".venv/study", target], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_the_mlflow_server_is_only_reachable_from_this_machine():
    (server,) = [line for line in planned("ui").splitlines() if "mlflow server" in line]
    assert re.findall(r"--host[ =](\S+)", server) == ["127.0.0.1"]
    assert "--allowed-hosts" not in server
    for file in (ROOT / "Makefile", *SOURCES):
        assert "0.0.0.0" not in file.read_text(encoding="utf-8"), file


def test_the_audit_ignores_only_explained_vulnerabilities():
    """It must be strict: without an answer of the service, it fails."""
    (audit,) = [line for line in planned("audit").splitlines() if "--requirement requirements.lock" in line]
    assert "--strict" in audit
    for exception in re.findall(r"--ignore-vuln[ =](\S+)", audit):
        for file in ("Makefile", "docs/guide.md"):
            assert f"({exception})" in (ROOT / file).read_text(encoding="utf-8"), file
