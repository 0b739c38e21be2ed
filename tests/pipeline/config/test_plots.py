"""A plot is found by its name; a file that is no plot gives one line."""

import re
import sys

import pytest

from pipeline.config.names import plot_names
from pipeline.config.outputs import figure_plots
from pipeline.config.plots import load_plot
from pipeline.config.study import Ablation, Study
from tests.pipeline.config.test_study import ROOT, errors_of

PLOT = """
from pipeline.config.plots import Plot

class {name}(Plot):
    caption = "What it shows."

    def draw(self, study, ablation, results, references):
        raise NotImplementedError
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes modules of the package `own` in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own").mkdir()
    yield lambda name, text: (tmp_path / "own" / f"{name}.py").write_text(text)
    for module in [name for name in sys.modules if name.partition(".")[0] == "own"]:
        del sys.modules[module]


@pytest.mark.parametrize("name", plot_names())
def test_a_plot_has_the_name_of_its_file_and_a_caption(name):
    plot = load_plot(name)
    assert plot.name == name
    assert re.fullmatch(r"[A-Z].*\.", plot.caption, flags=re.DOTALL)
    assert load_plot(name).problems.__func__ is type(plot).problems, "check, not problems, is what a plot defines"


def test_the_guide_and_the_schema_list_every_plot():
    guide = (ROOT / "docs/guide.md").read_text().partition("| plot | shows |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", guide, flags=re.MULTILINE)) == list(plot_names())
    schema = Study.model_json_schema()["$defs"]["Ablation"]["properties"]["plot"]
    assert schema["anyOf"][0]["enum"] == list(plot_names())


def test_an_unknown_plot_gives_the_known_names_and_the_nearest():
    (line,) = errors_of({"ablations.ngram.plot": "line"})
    assert line == (
        f'ablations.ngram.plot = "line": must be one of {", ".join(plot_names())}, or a module of your own such as'
        " my_package.my_plot; did you mean 'lines'?"
    )
    assert [line.partition(": ")[0] for line in errors_of({"ablations.ngram.plot": "base", "ablations.width.plot": "x.y"})] == [
        'ablations.ngram.plot = "base"',
        'ablations.width.plot = "x.y"',
    ]


@pytest.mark.parametrize("name", ["a/b", "..x", "x.", "a b", "", "1", "a.1"])
def test_a_name_that_no_module_has_is_refused_before_it_is_imported(name):
    (line,) = errors_of({"ablations.ngram.plot": name})
    assert line.endswith("must be the name of a plot, or of a module with your own, such as my_package.my_plot")


def test_a_plot_of_ones_own_is_a_module_of_the_working_folder(write):
    write("gap", PLOT.format(name="Gap"))
    plot = load_plot("own.gap")
    assert (plot.name, type(plot).__name__) == ("own.gap", "Gap")
    ablation = Ablation(question="?", tasks=["ar"], variants=["k"], plot="own.gap")
    assert {file: plot.name for file, plot in figure_plots("a", ablation).items()} == {
        "a": "own.gap",
        "a_length": "lines",
        "a_training": "training",
    }


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "the file own/gap.py does not exist"),
        ("import no_such_module", "own/gap.py cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("class Gap(", "own/gap.py cannot be imported: SyntaxError: '(' was never closed (gap.py, line 1)"),
        ("from pipeline.config.plots import Plot", "own.gap must define exactly one plot, found 0"),
        (PLOT.format(name="One") + PLOT.format(name="Two"), "own.gap must define exactly one plot, found 2"),
        (PLOT.format(name="Gap").replace("caption", "capton"), "own.gap: the class Gap lacks caption"),
        (PLOT.format(name="Gap").replace("draw", "drow"), "own.gap: the class Gap lacks draw"),
    ],
)
def test_a_file_that_is_no_plot_gives_one_line(write, text, problem):
    if text is not None:
        write("gap", text)
    (line,) = errors_of({"ablations.ngram.plot": "own.gap"})
    assert line == f'ablations.ngram.plot = "own.gap": {problem}'


def test_a_module_outside_the_working_folder_is_not_imported(write):
    (line,) = errors_of({"ablations.ngram.plot": "antigravity.x"})
    assert line.endswith("the file antigravity/x.py does not exist")
    assert "antigravity" not in sys.modules


def test_a_plot_may_extend_another(write):
    write("wide", "from pipeline.figures.heatmap import Heatmap\n\nclass Wide(Heatmap):\n    caption = 'Wide.'\n")
    assert load_plot("own.wide").shows_references
