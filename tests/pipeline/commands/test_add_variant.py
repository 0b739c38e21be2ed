"""`python -m pipeline new-variant`: two insertions into params.yaml and nothing else, or one clear line and nothing at all."""

import difflib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from dvc.repo import Repo
from ruamel.yaml import YAML

from cat.mixers.attention.config import AttentionConfig
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


def new_variant(*arguments):
    return CliRunner().invoke(main, ["new-variant", *arguments])


def added(*arguments):
    """What is said when the variant is added."""
    done = new_variant(*arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments):
    """The lines that are said when it is not; the folder must be as it was to the byte."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    done = new_variant(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before
    return done.stderr.splitlines()


def test_the_line_is_copied_with_its_alignment_and_named_after_its_source(study):
    before = SMOKE.splitlines()
    (source,) = (line for line in before if line.startswith("  qk_d2:"))
    at = before.index("  theory:     {mixer: theory}")
    new = source.replace("qk_d2", "qk_d4").replace("dilation: 2", "dilation: 4")
    expected = [*before[: at + 1], new, *before[at + 1 :]]
    expected[expected.index("    variants: [qk_d2]")] = "    variants: [qk_d2, qk_d4]"
    added(*D4)
    assert (study / "params.yaml").read_text().splitlines() == expected


def test_the_name_stands_after_its_source_or_last(study):
    added("wide", "--from", "learned", "--set", "position=sinusoidal", "--set", "width=32", "--ablation", "kinds")
    added("deep", "--from", "qk_mixing", "--set", "layers=2")
    assert read_params()["ablations"]["kinds"]["variants"] == ["qk_channel", "qk_mixing", "deep", "qk_network", "wide"]


def crlf(text):
    return text.replace("\n", "\r\n")


def with_byte_order_mark(text):
    return "\ufeff" + text


def variants_last_without_a_final_newline(text):
    head, variants, rest = text.partition("\nvariants:\n")
    lines, _, others = rest.partition("\n\n")
    return f"{head}\n{others}{variants}{lines}  # no more"


def remarks_everywhere(text):
    text = text.replace("  theory:     {mixer: theory}\n", "  theory:     {mixer: theory}  # of the theorem\n  # none follows\n")
    return text.replace("    variants: [qk_d2]\n", "    variants:  # further apart\n      [ qk_d2 # two\n      ]\n")


def one_key_a_line(text):
    lines = text.splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines) if line.startswith("  qk_d2:"))
    pairs = lines[at].partition("{")[2].rstrip("}\n").split(", ")
    lines[at : at + 1] = ["  qk_d2:  # apart\n", *(f"     {pair}\n" for pair in pairs), "\n"]
    return "".join(lines).replace("    variants: [qk_d2]\n", "    variants:\n    # one\n    - qk_d2  # two apart\n\n")


def written_by_a_program(text):
    raw = YAML(typ="safe").load(text)
    write_params(raw)
    return Path("params.yaml").read_text()


@pytest.mark.parametrize(
    "style",
    [
        crlf,
        with_byte_order_mark,
        variants_last_without_a_final_newline,
        remarks_everywhere,
        one_key_a_line,
        written_by_a_program,
    ],
)
def test_all_else_stays_as_it_is_to_the_byte(study, style):
    file = study / "params.yaml"
    file.write_bytes(style(SMOKE).encode())
    before = file.read_bytes().decode()
    expected = read_params()
    added(*D4)
    after = file.read_bytes().decode()
    expected["variants"]["qk_d4"] = expected["variants"]["qk_d2"] | {"dilation": 4}
    expected["ablations"]["dilation"]["variants"] = ["qk_d2", "qk_d4"]
    assert read_params() == expected
    # New lines, and in at most one old line a name.
    diff = list(difflib.unified_diff(before.split("\n"), after.split("\n"), n=0, lineterm=""))[2:]
    gone, new = ([line[1:] for line in diff if line[0] == sign] for sign in "-+")
    assert gone == [line.replace(", qk_d4", "") for line in new if ", qk_d4" in line]
    assert len(gone) <= 1
    assert (after.count("\r\n") == after.count("\n")) == ("\r" in before)


def one_list_for_two_ablations(text):
    text = text.replace("    variants: [qk_d2]\n    beside: [qk]\n", "    variants: &apart [qk_d2]\n    beside: [qk]\n")
    head, kinds, rest = text.partition("  kinds:\n")
    return head + kinds + rest.replace("    beside: [qk]\n", "    beside: *apart\n", 1)


def one_mapping_of_variants(text):
    return text[: text.index("variants:\n")] + one_line(text, "variants") + text[text.index("\n\nablations:") :]


def a_list_that_is_merged_in(text):
    return text.replace("    variants: [qk_d2]\n", "    <<: {variants: [qk_d2]}\n")


def one_line(text, section):
    return f"{section}: {json.dumps(YAML(typ='safe').load(text)[section])}"


@pytest.mark.parametrize("style", [one_list_for_two_ablations, one_mapping_of_variants, a_list_that_is_merged_in])
def test_a_file_in_which_that_cannot_be_done_is_left_alone(study, style):
    (study / "params.yaml").write_text(style(SMOKE))
    load_study()
    assert refused(*D4) == [
        "params.yaml: variants or ablations.dilation.variants do not have a line each; add qk_d4: {mixer: attention, width: 16,"
        " layers: 1, heads: 2, position: none, qk_norm: true, q: 3, k: 3, dilation: 4} by hand"
    ]


@pytest.mark.parametrize("value", ["", "null", "~", "none"])
def test_a_key_is_taken_out(study, value):
    added("q", "--from", "qk_learned", "--ablation", "kinds", "--set", f"k={value}", "--set", "position=none")
    assert read_params()["variants"]["q"] == {
        "mixer": "attention", "width": 16, "layers": 1, "heads": 2, "position": "none", "q": 3, "filter_norm": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (("qk", "--from", "k"), ["params.yaml: variants.qk: is there already"]),
        (("qk-5", "--from", "k"), [f"params.yaml: variants: 'qk-5' {PATTERNS[NAME]}"]),
        (("a\nb", "--from", "k"), [f"params.yaml: variants: 'a\\nb' {PATTERNS[NAME]}"]),
        (("new", "--from", "lerned"), ["params.yaml: variants.lerned: is missing; did you mean 'learned'?"]),
        (
            ("new", "--from", "k", "--set", "k=5"),
            ["params.yaml: variants.k: is trained by the ablations streams, rates; name one with --ablation"],
        ),
        (
            ("new", "--from", "k", "--set", "k=5", "--ablation", "rate"),
            ["params.yaml: ablations.rate: is missing; did you mean 'rates'?"],
        ),
        (
            ("new", "--from", "k", "--set", "taps=5", "--set", "q=-5"),
            [
                "params.yaml: variants.new.q = -5: must be greater than or equal to 1,"
                " and is not full or network or decay or state",
                "params.yaml: variants.new.taps = 5: unknown key; known are " + ", ".join(AttentionConfig.model_fields),
            ],
        ),
        (("new", "--from", "k", "--set", "q"), ["--set 'q': is not key=value"]),
        (("new", "--from", "qk_d2"), ["params.yaml: variants.new: is the same as variants.qk_d2"]),
        (("new", "--from", "qk_d2", "--set", "tied=false"), ["params.yaml: variants.new: is the same as variants.qk_d2"]),
        (("new", "--from", "qk_d2", "--set", "dilation="), ["params.yaml: variants.new: is the same as variants.qk"]),
        (
            ("new", "--from", "qk_d2", "--set", "q=3", "--set", "v=", "--set", "position=none"),
            [
                "--set 'q=3': changes nothing, variants.qk_d2 has q = 3",
                "--set 'v=': changes nothing, variants.qk_d2 has no v",
                "--set 'position=none': changes nothing, variants.qk_d2 has position = none",
            ],
        ),
        (
            ("new", "--from", "qk_d2", "--set", "q", "--set", "=3", "--set", "k=[", "--set", "v=2", "--set", "v=4"),
            [
                "--set 'q': is not key=value",
                "--set '=3': is not key=value",
                "--set 'k=[': '[' is not YAML",
                "--set 'v=4': sets v a second time",
            ],
        ),
        (
            ("new", "--from", "qk_d2", "--set", "q=four", "--set", "widht=32"),
            [
                'params.yaml: variants.new.q = "four": is not a whole number, and is not full or network or decay or state;'
                " did you mean 'full'?",
                "params.yaml: variants.new.widht = 32: unknown key; did you mean 'width'?",
            ],
        ),
        (("new", "--from", "qk_d2", "--set", "width="), ["params.yaml: variants.new.width: is missing"]),
        (
            ("new", "--from", "qk_d2", "--set", "v=3"),
            ["params.yaml: ablations.dilation.x = \"dilation\": does not tell variant 'new' from 'qk_d2'"],
        ),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(study, arguments, lines):
    assert refused(*arguments) == lines


def test_an_ablation_that_is_switched_off_trains_nothing(study):
    raw = read_params()
    raw["ablations"]["rates"] |= {"tasks": [], "variants": [], "figure": "heatmap"}
    del raw["tasks"]["ar_rates"]
    write_params(raw)
    assert refused("new", "--from", "qk_d2", "--set", "v=3", "--ablation", "rates") == [
        "params.yaml: variants.new: belongs to no ablation, so it would not be trained; name it in one or take it out"
    ]


def test_an_ablation_that_is_switched_off_does_not_count(study):
    raw = read_params()
    raw["ablations"]["rates"]["tasks"] = []
    del raw["tasks"]["ar_rates"]
    write_params(raw)
    added("k5", "--from", "k", "--set", "k=5")
    assert read_params()["ablations"]["streams"]["variants"] == ["none", "k", "k5", "qk"]


def test_a_study_that_is_wrong_already_is_said_to_be(study):
    (study / "params.yaml").write_text(SMOKE.replace("device: cpu", "device: gpu"))
    assert refused(*D4) == ['params.yaml: device = "gpu": is not auto, cpu, cuda or cuda:N, N from 0 to 99']
    (study / "params.yaml").write_text(SMOKE)
    (study / "dvc.yaml").write_text((ROOT / "dvc.yaml").read_text().replace("train_dilation:", "train_holes:"))
    assert any(line.startswith("params.yaml: ablations.dilation: dvc.yaml has no stage for it") for line in refused(*D4))


def test_a_dry_run_shows_what_would_be_written(study):
    said = new_variant(*D4, "--dry-run").stdout
    assert (study / "params.yaml").read_text() == SMOKE
    patch, _, plan = said.partition("\n\n`dvc repro` will run")
    assert plan in added(*D4)
    written = (study / "params.yaml").read_text()
    (study / "params.yaml").write_text(SMOKE)
    subprocess.run(["git", "apply", "-"], input=patch + "\n", text=True, check=True)
    assert (study / "params.yaml").read_text() == written != SMOKE


def test_the_stages_are_those_of_dvc_and_their_times_those_of_the_source(study):
    old = cells(load_study())
    for task, text in {"ar": json.dumps({"seconds": 61.2}), "copying": json.dumps({"seconds": 1.5}), "text": "{"}.items():
        (study / "logs" / task).mkdir(parents=True)
        (study / "logs" / task / "k.json").write_text(text)
    said = added("k5", "--from", "k", "--set", "k=5", "--ablation", "streams")
    Repo.init(no_scm=True)
    stages = {stage.addressing for stage in Repo().index.stages}
    after = [stage.addressing for stage in Repo().index.stages if stage.addressing.isalpha() and stage.addressing != "plan"]
    rows = [line.split(maxsplit=2) for line in said.splitlines() if line.split(maxsplit=1)[:1] and line.split()[0] in stages]
    assert rows == [
        ["plan"],
        ["train_streams@ar-k5", "0:01:02", "logs/ar/k.json"],
        ["train_streams@nar-k5", "unknown", "no time in logs/nar/k.json"],
        ["train_streams@copying-k5", "0:00:02", "logs/copying/k.json"],
        ["train_streams@text-k5", "unknown", "no time in logs/text/k.json"],
        *([f"evaluate@{task}"] for task in ("ar", "nar", "copying", "text")),
        *([stage] for stage in after),
    ]
    assert {row[0] for row in rows if row[0].startswith("train")} == {
        f"train_{cell.ablation}@{cell.task}-{cell.variant}" for cell in set(cells(load_study())) - set(old)
    }
    assert said.splitlines()[-1] == (
        "about 0:01:03 of training and 2 of 4 cells unknown, if a cell takes as long as that of k did;"
        " starting stages, scoring and drawing come on top"
    )


def test_no_log_no_estimate(study):
    said = added(*D4)
    assert said.splitlines()[-1] == "no time is known: qk_d2 has not been trained here"
    assert "unknown" not in said
    assert "\ntrain_dilation@nar-qk_d4\n" in said
