"""`python -m pipeline diff`: changes since a revision, for a study in a folder of a repository."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from pipeline.cli import main
from pipeline.commands.diff import Section, compare, resolve, show

PARAMETERS = """\
defaults: {training: {seeds: 2}}
variants:
  k:  {position: none, conv_k: 3}
  qk: {position: none, conv_q: 3, conv_k: 3}
ablations:
  qkv_subsets: {variants: [k, qk]}
"""
METRICS = {
    "k": {"ar": {"accuracy_1x": 0.5, "accuracy_8x": 0.25}, "text": {"bits_per_byte_1x": 3.5}},
    "qk": {"ar": {"accuracy_1x": 1.0, "accuracy_8x": 0.75}},
}
LENGTHS = "tasks:\n  ar: {data: {length: 10, multiples: [1, 8]}}\n"
RESULTS = """\
task,variant,seed,length,metric,value
ar,k,0,10,accuracy,0.49
ar,k,1,10,accuracy,0.51
ar,k,0,80,accuracy,0.25
ar,k,1,80,accuracy,0.25
ar,qk,0,10,accuracy,1.0
ar,qk,1,10,accuracy,1.0
ar,qk,0,80,accuracy,0.75
ar,qk,1,80,accuracy,
"""
VERDICTS = """\
claim,statement,source,verdict,reason,effect,low,high,p,seeds,comparisons,ablation
solves,"k solves recall, always.",paper,supported,k against 1 on ar,-0.25,-0.5,0,0.01,3,8,qkv_subsets
null,n/a,ours,undecided,too few seeds: 1 of 3,,,,,3,8,qkv_subsets
"""


def git(*arguments):
    settings = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.invalid"]
    return subprocess.run(["git", *settings, *arguments], check=True, capture_output=True, text=True).stdout.strip()


def write(parameters=PARAMETERS, metrics=METRICS, verdicts=VERDICTS):
    shutil.rmtree("reports", ignore_errors=True)
    for folder in ("reports/metrics", "verdicts"):
        Path(folder).mkdir(parents=True, exist_ok=True)
    Path("params.yaml").write_text(parameters)
    for variant, tasks in metrics.items():
        Path("reports/metrics", f"{variant}.json").write_text(json.dumps(tasks))
    Path("verdicts/claims.csv").write_text(verdicts)


def commit():
    git("add", ".")
    git("commit", "--quiet", "--allow-empty", "--message", "a step")
    return git("rev-parse", "HEAD")


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The working folder: a committed study in a folder of its repository."""
    (tmp_path / "study").mkdir()
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet")
    monkeypatch.chdir(tmp_path / "study")
    write()
    commit()
    return tmp_path / "study"


def output_of(*arguments):
    done = CliRunner().invoke(main, ["diff", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments):
    """The one error line of a command that fails."""
    done = CliRunner().invoke(main, ["diff", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    return line


def test_nothing_changed(study):
    summary = "reproduced: 2 of 2 verdicts, largest difference 0 (within seed spread)\n"
    assert output_of("HEAD") == "parameters: nothing changed\nresults: nothing changed\nverdicts: nothing changed\n" + summary
    parts = ["## parameters", "nothing changed", "## results", "nothing changed", "## verdicts", "nothing changed", summary]
    assert output_of("HEAD", "--md") == "\n\n".join(parts)


def test_parameters_by_their_keys(study):
    new = PARAMETERS.replace("seeds: 2", "seeds: 3").replace(
        "qk: {position: none, conv_q: 3, conv_k: 3}", "qk: {position: rotary, conv_q: 3}"
    )
    write(
        new.replace("ablations:", "  v: {position: none, conv_v: 3}\nablations:").replace(
            "  qkv_subsets: {variants: [k, qk]}", "  {}"
        )
    )
    assert compare("HEAD")[0].rows == [
        ("defaults.training.seeds", "2", "3"),
        ("variants.qk.position", "none", "rotary"),
        ("variants.qk.conv_k", "3", "-"),
        ("variants.v", "-", "{position: none, conv_v: 3}"),
        ("ablations.qkv_subsets", "{variants: [k, qk]}", "-"),
    ]


def test_results_are_sorted_by_the_size_of_their_difference(study):
    k = {"ar": {"accuracy_1x": 0.500001, "accuracy_8x": 0.125}, "text": {"bits_per_byte_1x": 4.0}}
    qk = {"ar": {"accuracy_1x": 1.0000004, "accuracy_8x": 0.75}}
    write(metrics={"k": k, "qk": qk})
    assert compare("HEAD")[1] == Section(
        "results",
        ("variant", "task", "metric", "length", "before", "after", "difference", "range over seeds"),
        [
            ("k", "text", "bits per byte", "1x", "3.500000", "4.000000", "+0.500000", "-"),
            ("k", "ar", "accuracy", "8x", "0.250000", "0.125000", "-0.125000", "-"),
            ("k", "ar", "accuracy", "1x", "0.500000", "0.500001", "+0.000001", "-"),
        ],
        [],
    )


def test_differences_within_the_seeds_are_only_counted_unless_all_are_asked_for(study):
    write(LENGTHS)
    Path("results").mkdir(exist_ok=True)
    Path("results/ar.csv").write_text(RESULTS)
    commit()
    k = {"ar": {"accuracy_1x": 0.519, "accuracy_8x": 0.25}, "text": {"bits_per_byte_1x": 3.5}}
    qk = {"ar": {"accuracy_1x": 0.9985, "accuracy_8x": 0.75}}
    write(LENGTHS, metrics={"k": k, "qk": qk})
    qk_row = ("qk", "ar", "accuracy", "1x", "1.000000", "0.998500", "-0.001500", "0.000000")
    section = compare("HEAD")[1]
    assert section.rows == [qk_row]
    assert section.notes == ["1 difference within the spread of seeds; --all shows them"]
    assert "1 difference within the spread of seeds" in output_of("HEAD")
    section = compare("HEAD", within_seeds=True)[1]
    assert section.rows == [("k", "ar", "accuracy", "1x", "0.500000", "0.519000", "+0.019000", "0.020000"), qk_row]
    assert section.notes == []
    assert "+0.019000" in output_of("HEAD", "--all", "--md")


def test_new_and_removed_cells_and_lengths_are_summarised(study):
    both = {"accuracy_1x": 0.5, "accuracy_4x": 0.25}
    write(metrics={"k": {"ar": both, "copying": both}, "qk": {"ar": {"accuracy_1x": 1.0, "accuracy_4x": 0.7}}, "v": {"ar": both}})
    section = compare("HEAD")[1]
    assert section.rows == []
    assert section.notes == [
        "new: k on copying",
        "new: v on ar",
        "new: accuracy at 4x of 2 cells",
        "gone: k on text",
        "gone: accuracy at 8x of 2 cells",
    ]


def test_changed_new_and_removed_verdicts(study):
    new = VERDICTS.replace("supported,k against 1 on ar,-0.25,-0.5,0,", "contradicted,k against 1 on ar,-0.75,-1,-0.5,")
    write(verdicts=re.sub("null.*", "other,it may be.,ours,undecided,not significant,0.125,0,1,0.5,3,8,qkv_subsets", new))
    assert compare("HEAD")[2].rows == [
        (
            "k solves recall, always. (paper)",
            "supported",
            "-0.250 (-0.500 to +0.000)",
            "contradicted",
            "-0.750 (-1.000 to -0.500)",
        ),
        ("n/a (ours)", "undecided", "-", "-", "-"),
        ("it may be. (ours)", "-", "-", "undecided", "+0.125 (+0.000 to +1.000)"),
    ]


def test_an_unchanged_verdict_is_not_listed_even_if_its_effect_moved(study):
    write(verdicts=VERDICTS.replace("-0.25,-0.5", "-0.125,-0.5"))
    assert compare("HEAD")[2].notes == ["nothing changed"]


def test_a_study_without_claims(study):
    write(verdicts="\n")
    sections = compare("HEAD")
    assert [row[3] for row in sections[2].rows] == ["-", "-"]
    assert sections[3].notes[0].startswith("0 of 2 verdicts, largest difference 0; solves: supported -> no verdict; ")
    commit()
    assert compare("HEAD")[2].notes == ["nothing changed"]


@pytest.fixture
def seeds(study):
    """A committed study with the results of each seed: they differ by 0.02 for k at 1x, and by nothing elsewhere."""
    (study / "results").mkdir()
    (study / "results" / "ar.csv").write_text(RESULTS)
    write(PARAMETERS + LENGTHS)
    commit()


def changed(**means):
    """METRICS on ar with other means, `k_1x=0.5`."""
    metrics = json.loads(json.dumps(METRICS))
    for name, mean in means.items():
        variant, _, length = name.partition("_")
        metrics[variant]["ar"][f"accuracy_{length}"] = mean
    return metrics


@pytest.mark.parametrize(
    ("means", "line"),
    [
        ({}, "reproduced: 2 of 2 verdicts, largest difference 0 (within seed spread)"),
        ({"k_1x": 0.519}, "reproduced: 2 of 2 verdicts, largest difference .019 (within seed spread)"),
        ({"qk_1x": 0.9998}, "reproduced: 2 of 2 verdicts, largest difference .000200 (within seed spread)"),
        (
            {"k_1x": 0.523},
            "not reproduced: 2 of 2 verdicts, largest difference .023;"
            " accuracy at 1x of k on ar differs by .023, its seeds by .020",
        ),
        (
            {"k_8x": 0.24, "k_1x": 0.51},
            "not reproduced: 2 of 2 verdicts, largest difference .010; accuracy at 8x of k on ar differs by .010, its seeds by 0",
        ),
        ({"qk_8x": 0.7}, "reproduced: 2 of 2 verdicts, largest difference .050 (seed spread unknown)"),
        ({"qk_16x": 0.7}, "not reproduced: 2 of 2 verdicts, largest difference 0; 1 entry on one side only"),
    ],
)
def test_the_last_line_says_whether_the_study_is_reproduced(seeds, means, line):
    write(PARAMETERS + LENGTHS, changed(**means))
    assert output_of("HEAD").splitlines()[-1] == line
    assert output_of("HEAD", "--md").splitlines()[-1] == line


def test_the_larger_spread_of_the_two_sides_counts(seeds):
    write(PARAMETERS + LENGTHS, changed(k_8x=0.3))
    Path("results/ar.csv").write_text(RESULTS.replace("ar,k,1,80,accuracy,0.25", "ar,k,1,80,accuracy,0.35"))
    assert compare("HEAD")[3] == Section("reproduced", (), [], ["2 of 2 verdicts, largest difference .050 (within seed spread)"])


def test_changed_verdicts_are_named_at_the_end(seeds):
    write(PARAMETERS + LENGTHS, verdicts=VERDICTS.replace("supported", "contradicted"))
    line = "not reproduced: 1 of 2 verdicts, largest difference 0; solves: supported -> contradicted"
    assert output_of("HEAD").splitlines()[-1] == output_of("HEAD", "--md").splitlines()[-1] == line


def test_the_terminal_and_markdown_have_the_same_rows(study, capsys):
    write(
        PARAMETERS.replace("[0, 1]", "[red]").replace("none, conv_k", "'a|b', conv_k"),
        {"k": METRICS["k"], "v": METRICS["k"]},
        VERDICTS.replace("supported", "contradicted"),
    )
    sections = compare("HEAD")
    show(sections, Console(width=200, color_system=None))
    terminal, text = capsys.readouterr().out, output_of("HEAD", "--md")
    for section in sections[:3]:
        assert section.rows or section.notes != ["nothing changed"]
        for row in section.rows:
            assert re.search(" *[│┃] *".join(map(re.escape, row)), terminal)
            assert re.search(r" *\| *".join(re.escape(cell.replace("|", r"\|")) for cell in row), text)
        for note in section.notes:
            assert f"{section.title}: {note}\n" in terminal
            assert f"\n\n{note}\n" in text


def test_an_experiment_by_its_name(study):
    base = git("rev-parse", "HEAD")
    write(PARAMETERS.replace("conv_k: 3}", "conv_k: 5}"))
    git("add", ".")
    git("commit", "--quiet", "--message", "an experiment")
    git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/wider-keys", "HEAD")
    git("update-ref", "refs/exps/exec/EXEC_HEAD", "HEAD")
    git("reset", "--quiet", "--hard", base)
    assert compare("wider-keys")[0].rows == [("variants.k.conv_k", "5", "3"), ("variants.qk.conv_k", "5", "3")]
    assert "EXEC_HEAD" in refused("EXEC_HEAD")


def test_of_several_experiments_with_one_name_this_commit_s_is_taken(study):
    bases = [git("rev-parse", "HEAD"), commit(), commit()]
    for base in bases[:2]:
        git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/twice", base)
    names = [f"refs/exps/{base[:2]}/{base[2:]}/twice" for base in bases[:2]]
    line = refused("twice")
    assert line.startswith("diff: 'twice' is the name of 2 experiments")
    assert line.endswith(", ".join(sorted(names)))
    for name, base in zip(names, bases, strict=False):
        assert resolve(name) == base
        git("checkout", "--quiet", base)
        assert resolve("twice") == base


def test_a_branch_has_priority_over_an_experiment(study):
    base = git("rev-parse", "HEAD")
    other = commit()
    git("branch", "same", base)
    git("update-ref", f"refs/exps/{base[:2]}/{base[2:]}/same", other)
    assert resolve("same") == base


@pytest.mark.parametrize("revision", ["nowhere", "HEAD:study/params.yaml", "HEAD..HEAD", "-1", ""])
def test_an_unknown_revision(study, revision):
    assert refused("--", revision) == f"diff: {revision!r} is neither a git revision nor a DVC experiment"


def test_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert refused("HEAD").startswith("diff: not a git repository")


FILES = ["params.yaml", "verdicts/claims.csv", "reports/metrics"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing(study, file):
    shutil.rmtree(file) if Path(file).is_dir() else Path(file).unlink()
    fault = "has no metrics. Fix: run `dvc repro`" if file == "reports/metrics" else "No such file or directory"
    assert refused("HEAD") == f"diff: {file}: {fault}"
    commit()
    write()
    assert refused("HEAD") == f"diff: HEAD: {file}: {fault}"


@pytest.mark.parametrize(
    ("file", "content", "fault"),
    [
        ("params.yaml", b"a: [", 'while parsing a flow node did not find expected node content in "<unicode string>"'),
        ("params.yaml", b"- a", "it is not a mapping"),
        ("params.yaml", b"\xff", "'utf-8' codec can't decode byte 0xff"),
        ("reports/metrics/k.json", b"{", "Invalid JSON: EOF while parsing"),
        ("reports/metrics/k.json", b'{"ar": 1}', "Input should be an object"),
        ("verdicts/claims.csv", b"claim,statement\na,b\n", "lacks the column source"),
        ("verdicts/claims.csv", VERDICTS.replace("0.25", "half").encode(), "could not convert string to float: '-half'"),
        ("verdicts/claims.csv", b"a\nb,c\n", "lacks the column claim"),
        ("results/ar.csv", b"a\nb\n", "lacks the column task"),
    ],
)
def test_a_file_that_cannot_be_read(study, file, content, fault):
    Path(file).parent.mkdir(exist_ok=True)
    original = Path(file).read_bytes() if Path(file).exists() else RESULTS.encode()
    Path(file).write_bytes(content)
    assert refused("HEAD").startswith(f"diff: {file}: cannot be read: {fault}")
    commit()
    Path(file).write_bytes(original)
    write()
    assert refused("HEAD").startswith(f"diff: HEAD: {file}: cannot be read: {fault}")
