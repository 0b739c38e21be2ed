"""The plot of docs/guide.md: a file of the study's folder, from its check to the report."""

import re
import sys
from pathlib import Path

import pytest

from pipeline.config.code_digest import module_digest
from pipeline.config.errors import ParamsError
from pipeline.config.load import load_study
from pipeline.storage.paths import PLAN
from tests.helpers.study import ROOT, edit, shared_study, stage
from tests.pipeline.config.test_study import errors_of

SECTION = (ROOT / "docs/guide.md").read_text().partition("## Write a plot")[2].partition("\n## ")[0]
(SOURCE,) = re.findall(r"```python\n(.*?)```", SECTION, flags=re.DOTALL)
STAGES = (ROOT / "dvc.yaml").read_text()
DEPS = "deps: [params.yaml, claims.yaml, cat, pipeline]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return shared_study(tmp_path_factory, tasks=["copying"])


@pytest.fixture
def own(study, tmp_path, monkeypatch):
    """The finished study with the plot of the guide, as the working folder."""
    monkeypatch.syspath_prepend(tmp_path / "study")
    Path("my_package").mkdir()
    Path("my_package/gap.py").write_text(SOURCE)
    Path("dvc.yaml").write_text(STAGES.replace(DEPS, DEPS.replace("pipeline]", "pipeline, my_package]")))
    edit(**{"ablations.construction.plot": "my_package.gap"})
    yield
    module_digest.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[module]


def test_a_plot_of_ones_own_is_drawn_and_reported(own):
    stage("validate")
    stage("plan")
    stage("render")
    stage("report")
    svg = Path("reports/figures/construction.svg").read_text()
    assert "construction" in svg, "the variants are on the axis"
    report = Path("reports/report.md").read_text()
    assert "![construction](figures/construction.svg)\n\n*Accuracy lost from the shortest to the longest test.*" in report
    assert all(Path(f"reports/figures/construction_{end}.svg").exists() for end in ("length", "training"))


def test_its_check_is_one_line(own):
    (line,) = errors_of({"ablations.language.plot": "my_package.gap"})
    assert line == "ablations.language: plot = my_package.gap needs accuracy, but task 'text' has none"


def test_its_code_redraws_the_figures_and_retrains_nothing(own):
    def planned(source):
        Path("my_package/gap.py").write_text(source)
        module_digest.cache_clear()
        stage("plan")
        return {str(path.relative_to(PLAN)): path.read_text() for path in PLAN.rglob("*.txt")}

    before = planned(SOURCE)
    assert planned(SOURCE + "# A comment.\n") == before
    after = planned(SOURCE.replace("bar(", "barh("))
    assert {name for name in after if after[name] != before[name]} == {"render.txt", "publish.txt"}


@pytest.mark.parametrize("dependency", ["my_package", "my_package/gap.py", "my_package/"])
def test_the_plan_depends_on_its_file(own, dependency):
    Path("dvc.yaml").write_text(STAGES)
    with pytest.raises(SystemExit):
        stage("validate")
    Path("dvc.yaml").write_text(STAGES.replace(DEPS, DEPS.replace("pipeline]", f"pipeline, {dependency}]")))
    stage("validate")


def test_a_missing_dependency_is_one_line(own, capsys):
    Path("dvc.yaml").write_text(STAGES)
    with pytest.raises(SystemExit):
        stage("plan")
    assert capsys.readouterr().err == (
        "params.yaml: ablations.construction: the stage plan in dvc.yaml must depend on my_package/gap.py."
        " Fix: add my_package to its deps\n"
    )


def test_a_lost_file_is_one_line(own):
    Path("my_package/gap.py").unlink()
    with pytest.raises(ParamsError) as error:
        load_study()
    assert error.value.lines == [
        'params.yaml: ablations.construction.plot = "my_package.gap": the file my_package/gap.py does not exist'
    ]
