"""`python -m pipeline add-variant` adds a line and a name to params.yaml, or refuses in one line and writes nothing."""

import difflib
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from ruamel.yaml import YAML

from pipeline.cli import main
from pipeline.config.grid import cells
from pipeline.config.load import load_study
from pipeline.config.names import NAME, PATTERNS
from tests.helpers.study import ROOT, read_params, write_params

SMOKE = (ROOT / "presets" / "smoke.yaml").read_text(encoding="utf-8")
D4 = ("qk_d4", "--from", "qk_d2", "--set", "dilation=4")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The smoke study's parameters and stages in the working folder."""
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    shutil.copy(ROOT / "presets" / "smoke.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def add_variant(*arguments):
    return CliRunner().invoke(main, ["add-variant", *arguments])


def added(*arguments):
    """The output of a command that succeeds."""
    result = add_variant(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments):
    """The errors of a command that fails; it must not change any file."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    result = add_variant(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return result.stderr.splitlines()


def test_the_line_is_copied_with_its_alignment_and_the_list_names_it_after_its_source(study):
    expected = SMOKE.splitlines()
    (source,) = (line for line in expected if line.startswith("  qk_d2:"))
    (last,) = (row for row, line in enumerate(expected) if line.startswith("  construction: "))
    expected.insert(last + 1, source.replace("qk_d2", "qk_d4").replace("dilation: 2", "dilation: 4"))
    expected[expected.index("    variants: [qk_d2]")] = "    variants: [qk_d2, qk_d4]"
    added(*D4)
    assert (study / "params.yaml").read_text().splitlines() == expected


def test_the_study_of_the_repository_changes_by_two_lines(study):
    shutil.copy(ROOT / "params.yaml", study)
    before = (study / "params.yaml").read_text().splitlines()
    added("qk_w16", "--from", "qk_w8", "--set", "conv_q=16", "--set", "conv_k=16")
    diff = difflib.ndiff(before, (study / "params.yaml").read_text().splitlines())
    assert [line[0] for line in diff if line[0] in "+-"] == ["+", "-", "+"]


def test_the_list_names_it_after_its_source_or_last(study):
    settings = ("--set", "position=sinusoidal", "--set", "width=32")
    added("wide", "--from", "learned", *settings, "--ablation", "parametrization")
    added("deep", "--from", "qk_mixing", "--set", "layers=2")
    expected = ["qk_channel", "qk_mixing", "deep", "qk_network", "wide"]
    assert read_params()["ablations"]["parametrization"]["variants"] == expected


def crlf(text):
    return text.replace("\n", "\r\n")


def byte_order_mark(text):
    return "\ufeff" + text


def no_final_newline(text):
    """The variants are the last section."""
    head, variants, rest = text.partition("\nvariants:\n")
    lines, _, others = rest.partition("\n\n")
    return f"{head}\n{others}{variants}{lines}  # no more"


def comments(text):
    (last,) = (line for line in text.splitlines() if line.startswith("  construction: "))
    text = text.replace(f"{last}\n", f"{last}  # by hand\n  # the end\n")
    return text.replace("    variants: [qk_d2]\n", "    variants:  # further apart\n      [ qk_d2 # two\n      ]\n")


def block_style(text):
    lines = text.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if line.startswith("  qk_d2:"))
    pairs = lines[at].partition("{")[2].rstrip("}\n").split(", ")
    lines[at : at + 1] = ["  qk_d2:  # apart\n", *(f"     {pair}\n" for pair in pairs), "\n"]
    return "".join(lines).replace("    variants: [qk_d2]\n", "    variants:\n    # one\n    - qk_d2  # two apart\n\n")


def written_by_a_program(text):
    write_params(YAML(typ="safe").load(text))
    return Path("params.yaml").read_text()


def one_list_for_two_ablations(text):
    text = text.replace(
        "    variants: [qk_d2]\n    reference_variants: [qk]\n", "    variants: &a [qk_d2]\n    reference_variants: [qk]\n"
    )
    head, ablation, rest = text.partition("  parametrization:\n")
    return head + ablation + rest.replace("    reference_variants: [qk]\n", "    reference_variants: *a\n", 1)


def variants_in_one_line(text):
    head, _, rest = text.partition("\nvariants:\n")
    line = json.dumps(YAML(typ="safe").load(text)["variants"])
    return f"{head}\nvariants: {line}{rest[rest.index(chr(10) + chr(10)) :]}"


def merge_key(text):
    return text.replace("    variants: [qk_d2]\n", "    <<: {variants: [qk_d2]}\n")


def last_variant_in_two_lines(text):
    return text.replace("{mixer: construction}", "{mixer:\n    construction}")


@pytest.mark.parametrize(
    "layout",
    [
        crlf,
        byte_order_mark,
        no_final_newline,
        comments,
        block_style,
        written_by_a_program,
        one_list_for_two_ablations,
        variants_in_one_line,
        merge_key,
        last_variant_in_two_lines,
    ],
)
def test_any_layout_keeps_its_comments_and_all_other_values(study, layout):
    file = study / "params.yaml"
    file.write_bytes(layout(SMOKE).encode())
    before, expected = file.read_text(), read_params()
    added(*D4)
    expected["variants"]["qk_d4"] = expected["variants"]["qk_d2"] | {"dilation": 4}
    expected["ablations"]["dilation"] = expected["ablations"]["dilation"] | {"variants": ["qk_d2", "qk_d4"]}
    after = read_params()
    assert after == expected
    assert list(after["variants"]) == list(expected["variants"])
    assert sorted(re.findall("#.*", file.read_text())) == sorted(re.findall("#.*", before))


@pytest.mark.parametrize("value", ["", "null", "~", "none"])
def test_a_key_is_removed(study, value):
    added("q", "--from", "qk_learned", "--ablation", "parametrization", "--set", f"conv_k={value}", "--set", "position=none")
    assert read_params()["variants"]["q"] == {"position": "none", "conv_q": 3, "filter_norm": True}


@pytest.mark.parametrize(
    ("arguments", "lines"),  # how each line begins
    [
        (("qk", "--from", "k"), ["params.yaml: variants.qk: exists already"]),
        (("qk-5", "--from", "k"), [f"params.yaml: variants: 'qk-5' {PATTERNS[NAME]}"]),
        (("a\nb", "--from", "k"), [f"params.yaml: variants: 'a\\nb' {PATTERNS[NAME]}"]),
        (("new", "--from", "lerned"), ["params.yaml: variants.lerned: is missing; did you mean 'learned'?"]),
        (
            ("new", "--from", "k", "--set", "conv_k=5"),
            ["params.yaml: variants.k: the ablations qkv_subsets, learning_rates train it. Fix: choose one with --ablation"],
        ),
        (
            ("new", "--from", "k", "--set", "conv_k=5", "--ablation", "learning_rate"),
            ["params.yaml: ablations.learning_rate: is missing; did you mean 'learning_rates'?"],
        ),
        (
            ("new", "--from", "k", "--set", "size=5", "--set", "conv_q=-5"),
            [
                "params.yaml: variants.new.size = 5: unknown key",
                "params.yaml: variants.new.conv_q = -5: must be greater than or equal to 1",
            ],
        ),
        (("new", "--from", "k", "--set", "conv_q"), ["--set 'conv_q': is not key=value"]),
        (("new", "--from", "qk_d2"), ["params.yaml: variants.new: is the same as variants.qk_d2"]),
        (
            ("new", "--from", "qk_d2", "--set", "tied=false"),
            ["--set 'tied=false': changes nothing, variants.qk_d2 has tied = false"],
        ),
        (("new", "--from", "qk_d2", "--set", "dilation="), ["params.yaml: variants.new: is the same as variants.qk"]),
        (
            ("new", "--from", "qk_d2", "--set", "conv_q=3", "--set", "conv_v=", "--set", "position=none"),
            [
                "--set 'conv_q=3': changes nothing, variants.qk_d2 has conv_q = 3",
                "--set 'conv_v=': changes nothing, variants.qk_d2 has no conv_v",
                "--set 'position=none': changes nothing, variants.qk_d2 has position = none",
            ],
        ),
        (
            ("new", "--from", "qk_d2", "--set", "q", "--set", "=3", "--set", "k=[", "--set", "conv_v=2", "--set", "conv_v=4"),
            [
                "--set 'q': is not key=value",
                "--set '=3': is not key=value",
                "--set 'k=[': '[' is not YAML",
                "--set 'conv_v=4': sets conv_v a second time",
            ],
        ),
        (
            ("new", "--from", "qk_d2", "--set", "conv_q=four", "--set", "widht=32"),
            [
                "params.yaml: variants.new.widht = 32: unknown key; did you mean 'width'?",
                'params.yaml: variants.new.conv_q = "four": ',
            ],
        ),
        (("new", "--from", "qk_d2", "--set", "width="), ["params.yaml: variants.new.width = null: must be a valid integer"]),
        (
            ("new", "--from", "qk_d2", "--set", "conv_v=3"),
            ['params.yaml: ablations.dilation: x = "dilation": '],
        ),
    ],
)
def test_errors_are_one_line_each_and_nothing_is_written(study, arguments, lines):
    errors = refused(*arguments)
    assert len(errors) == len(lines)
    assert all(error.startswith(line) for error, line in zip(errors, lines, strict=True)), errors


def test_an_ablation_without_tasks_cannot_train_it(study):
    raw = read_params()
    raw["ablations"]["learning_rates"] |= {"tasks": [], "variants": [], "plot": "heatmap"}
    del raw["tasks"]["ar_rates"]
    write_params(raw)
    (line,) = refused("new", "--from", "qk_d2", "--set", "conv_v=3", "--ablation", "learning_rates")
    assert line.startswith("params.yaml: variants.new: ")
    assert "no ablation" in line


def test_the_default_ablation_is_one_with_tasks(study):
    raw = read_params()
    raw["ablations"]["learning_rates"]["tasks"] = []
    del raw["tasks"]["ar_rates"]
    write_params(raw)
    added("k5", "--from", "k", "--set", "conv_k=5")
    assert read_params()["ablations"]["qkv_subsets"]["variants"] == ["none", "k", "k5", "qk"]


def test_a_study_with_errors_is_refused(study):
    (study / "params.yaml").write_text(SMOKE.replace("device: cpu", "device: gpu"))
    (line,) = refused(*D4)
    assert line.startswith('params.yaml: device = "gpu": ')
    (study / "params.yaml").write_text(SMOKE)
    (study / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text().replace("train_dilation:", "train_holes:"))
    assert any(line.startswith("params.yaml: ablations.dilation: dvc.yaml has no stage for it") for line in refused(*D4))


def test_a_dry_run_shows_what_would_be_written(study):
    output = add_variant(*D4, "--dry-run").stdout
    assert (study / "params.yaml").read_text() == SMOKE
    patch, _, plan = output.partition("\n\n`dvc repro` will run")
    assert plan in added(*D4)
    written = (study / "params.yaml").read_text()
    (study / "params.yaml").write_text(SMOKE)
    subprocess.run(["git", "apply", "-"], input=patch + "\n", text=True, check=True)
    assert (study / "params.yaml").read_text() == written != SMOKE


def test_the_printed_stages_are_dvc_s_and_the_times_the_source_s(study):
    old = cells(load_study())
    for task, text in {"ar": json.dumps({"seconds": 61.2}), "copying": json.dumps({"seconds": 1.5}), "text": "{"}.items():
        (study / "logs" / task).mkdir(parents=True)
        (study / "logs" / task / "k.json").write_text(text)
    output = added("k5", "--from", "k", "--set", "conv_k=5", "--ablation", "qkv_subsets")
    Repo.init(no_scm=True)
    stages = {stage.addressing for stage in Repo().index.stages}
    after = [stage.addressing for stage in Repo().index.stages if stage.addressing.isalpha() and stage.addressing != "plan"]
    rows = [line.split(maxsplit=2) for line in output.splitlines() if line.split(maxsplit=1)[:1] and line.split()[0] in stages]
    assert rows == [
        ["plan"],
        ["train_qkv_subsets@ar-k5", "0:01:02", "logs/ar/k.json"],
        ["train_qkv_subsets@nar-k5", "unknown", "no time in logs/nar/k.json"],
        ["train_qkv_subsets@copying-k5", "0:00:02", "logs/copying/k.json"],
        ["train_qkv_subsets@text-k5", "unknown", "no time in logs/text/k.json"],
        *([f"evaluate@{task}"] for task in ("ar", "nar", "copying", "text")),
        *([stage] for stage in after),
    ]
    assert {row[0] for row in rows if row[0].startswith("train")} == {
        f"train_{cell.ablation}@{cell.task}-{cell.variant}" for cell in set(cells(load_study())) - set(old)
    }
    assert output.splitlines()[-1] == (
        "about 0:01:03 of training and 2 of 4 cells unknown, if each cell takes as long as that of k;"
        " starting stages, evaluation and figures take more time"
    )


def test_without_logs_there_is_no_estimate(study):
    output = added(*D4)
    assert output.splitlines()[-1] == "no time is known: qk_d2 was not trained in this folder"
    assert "unknown" not in output
    assert "\ntrain_dilation@nar-qk_d4\n" in output
