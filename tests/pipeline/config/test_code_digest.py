"""Code digests cover all code that a stage runs, nothing else, and no comments or docstrings."""

import functools
import json
from functools import partial

import pytest
from ruamel.yaml import YAML

from pipeline.config import code_digest
from pipeline.config.code_digest import ROOT, module_digest, modules_reached, read_source
from pipeline.config.load import load_study
from pipeline.stages.plan import PLAN, stage_modules, write
from tests.helpers.study import edit, read_params, write_params

SOURCE = '''"""What it is."""

# why
def double(x):  # of a number
    """Twice x.

    Really.
    """
    return 2 * x


class Sized:
    size = 3
    """How large."""
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# why\n", ""),
        ("# of a number", "# of anything"),
        ('    """Twice x.\n\n    Really.\n    """\n', ""),
        ('"""How large."""', '"""How many."""'),
        ("\n\n\n", "\n"),
    ],
)
def test_comments_docstrings_and_blank_lines_do_not_change_the_digest(old, new):
    assert old in SOURCE
    assert read_source(SOURCE.replace(old, new)) == read_source(SOURCE)


@pytest.mark.parametrize(("old", "new"), [("2 * x", "3 * x"), ("return 2", 'return "# 2"'), ("size = 3", 'size = "three"')])
def test_code_changes_the_digest(old, new):
    assert old in SOURCE
    assert read_source(SOURCE.replace(old, new)) != read_source(SOURCE)


def test_a_hash_sign_in_a_string_is_not_a_comment():
    assert read_source('a = "b#c"') != read_source('a = "b#d"')


def test_imports_are_reached_except_declarations():
    assert modules_reached(["cat.mixers.delta.layer"]) == {
        "cat.mixers.base",
        "cat.mixers.canon",
        "cat.mixers.delta.layer",
        "cat.mixers.delta.op",
        "cat.mixers.filters",
        "cat.mixers.output_gate",
        "cat.mixers.packing",
        "cat.mixers.qkv",
        "cat.mixers.step_size",
        "cat.mixers.token_shift",
        "cat.ops.common",
        "cat.ops.conv.causal",
        "cat.ops.conv.direct",
        "cat.ops.conv.fft",
        "cat.ops.conv.numba_backend",
        "cat.ops.conv.toeplitz",
        "cat.ops.conv.torch_backend",
        "cat.ops.conv.triton_backend",
        "cat.ops.l2norm",
        "cat.ops.linear",
        "cat.ops.numba_loops",
        "cat.ops.position",
        "cat.ops.scan.numba_matrix",
        "cat.ops.scan.numba_selective",
        "cat.ops.scan.recurrence",
        "cat.types",
    }


def digest_with(folder, target, **texts):
    """Write modules below `folder`; return the digest of the module `target`."""
    module_digest.cache_clear()
    for name, text in texts.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return module_digest(target)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes modules and returns the digest of `cat.first`, which imports `cat.second`."""
    monkeypatch.setattr("pipeline.config.code_digest.ROOT", tmp_path)
    module_digest.cache_clear()

    yield partial(digest_with, tmp_path, "cat.first")
    module_digest.cache_clear()


USE = "import math\n{}\n\ndef first():\n    return math.pi * second()\n"


def test_moving_a_module_does_not_change_the_digest(package):
    before = package(cat__first=USE.format("from cat.second import second"), cat__second="def second():\n    return 2\n")
    moved = USE.format("from cat.room.deeper.second import second")
    assert package(cat__first=moved, cat__room__deeper__second="def second():\n    return 2\n") == before
    late = "def first():\n    {}\n    return second()\n"
    near, far = late.format("from cat.second import second"), late.format("from cat.room.deeper.second import second")
    assert package(cat__first=near) == package(cat__first=far) != before


@pytest.mark.parametrize("use", [USE, "def first():\n    {}\n    return second()\n"])
def test_imported_code_changes_the_digest_also_inside_a_function(package, use):
    before = package(cat__first=use.format("from cat.second import second"), cat__second="def second():\n    return 2\n")
    assert package(cat__second="def second():\n    return 2  # two\n") == before
    assert package(cat__second="def second():\n    return 3\n") != before


def test_importing_another_name_changes_the_digest(package):
    text = "def second():\n    return 2\n\n\ndef third():\n    return 3\n"
    before = package(cat__first=USE.format("from cat.second import second"), cat__second=text)
    assert package(cat__first=USE.format("from cat.second import third as second")) != before


@pytest.mark.parametrize("use", ["from own.second import second", "from own import second", "import own.second"])
def test_code_of_a_package_in_the_working_directory_counts(use, package, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"import numpy as np\nfrom os import path\n{use}\n\nprint(np, path)\n"
    before = package(cat__first=text, own__second="def second():\n    return 2\n")
    assert modules_reached(["cat.first"]) == {"cat.first", "own.second"}
    assert package(own__second="def second():\n    return 3\n") != before


def test_an_import_for_type_checking_does_not_change_the_digest(package):
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cat.second import second\n"
    before = package(cat__first=typed, cat__second="def second():\n    return 2\n")
    assert package(cat__second="def second():\n    return 3\n") == before


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes modules into the working folder and returns the digest of `mine.plot`."""
    monkeypatch.chdir(tmp_path)

    yield partial(digest_with, tmp_path, "mine.plot")
    module_digest.cache_clear()


@pytest.mark.parametrize(
    "use",
    [
        "from mine.helper import f\n",
        "from mine import helper\n",
        "from .helper import f\n",
        "from . import helper\n",
        "import mine.helper as h\n",
        "def draw():\n    from mine.helper import f\n",
        "from .deeper.more import g\n",
        "import single\n",
    ],
)
def test_a_module_of_ones_own_counts_with_its_imports(own, use):
    def changed(value):
        helper = f"def f():\n    return {value}\n"
        return own(
            mine__plot=use, mine__helper=helper, mine__deeper__more="from ..helper import f\n", single="import mine.helper\n"
        )

    assert changed("1") == changed("1  # one") != changed("2")


def test_a_package_file_of_ones_own_counts(own, tmp_path):
    own(mine__plot="from mine import f\n")
    digests = []
    for value in ("1", "1  # one", "2"):
        (tmp_path / "mine/__init__.py").write_text(f"f = {value}\n")
        digests.append(own())
    assert digests[0] == digests[1] != digests[2]


def test_code_of_the_program_counts_for_a_module_of_ones_own(own):
    own(mine__plot="from pipeline.figures.heatmap import Heatmap\n")
    assert {"mine.plot", "pipeline.figures.heatmap", "pipeline.config.plots"} <= modules_reached(["mine.plot"])


def test_installed_packages_do_not_count(own):
    own(mine__plot="import pandas\nfrom matplotlib import pyplot\n")
    assert modules_reached(["mine.plot"]) == {"mine.plot"}


def test_an_installed_mixer_counts_with_the_files_of_its_folder(tmp_path, monkeypatch):
    for name in ("site", "study"):
        (tmp_path / name).mkdir()
    folder = tmp_path / "site/installed_package/retention"
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "study")
    monkeypatch.syspath_prepend(tmp_path / "site")
    digests = []
    for scale in (1, 2, 1):
        (folder / "layer.py").write_text("from installed_package.retention.op import scale\n")
        (folder / "op.py").write_text(f"scale = {scale}\n")
        module_digest.cache_clear()
        digests.append(code_digest.code_digest(["installed_package.retention.layer"]))
    assert digests[0] == digests[2] != digests[1]
    assert modules_reached(["installed_package.retention.layer"]) == {"installed_package.retention.layer"}
    with pytest.raises(ValueError, match="there is no such module"):
        module_digest("installed_package.retention.missing")
    module_digest.cache_clear()


def test_modules_of_ones_own_may_not_import_each_other(own):
    with pytest.raises(ValueError, match=r"mine/(plot|helper)\.py: imports itself by way of other modules"):
        own(mine__plot="import mine.helper\n", mine__helper="def f():\n    import mine.plot\n")


def test_modules_in_packages_are_found():
    assert {"pipeline.runtime.workers", "pipeline.storage.runs"} <= modules_reached(["pipeline.stages.train"])


def test_training_does_not_depend_on_the_theory():
    assert "cat.theory" not in modules_reached(["pipeline.stages.train"])


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code_digest, "_read", functools.cache(code_digest._read))  # the sources do not change
    write_params(YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml"))

    def planned():
        write(load_study())
        return {str(path.relative_to(PLAN)): path.read_text() for path in PLAN.rglob("*.*")}

    return planned


def test_a_variant_depends_only_on_its_own_mixer(plan):
    plan()
    reached = {name: modules_reached(modules) for name, modules in stage_modules(load_study()).items()}
    users = {name for name, modules in reached.items() if "cat.mixers.mamba.layer" in modules}
    assert users == {"train/mamba", "train/mamba_qk", "evaluate/ar", "evaluate/text", "render", "publish"}
    assert "cat.theory" in reached["train/construction"]
    assert "cat.tasks.text" in reached["generate/text"]
    assert not any("cat.tasks.text" in reached[f"train/{variant}"] for variant in ("k", "mamba", "construction"))


def test_the_figures_depend_on_the_code_of_their_plots_only(plan):
    def plots(stage):
        return {module for module in stage_modules(load_study())[stage] if module.startswith("pipeline.figures.")}

    plan()
    assert plots("render") == plots("publish")
    assert {"pipeline.figures.recall", "pipeline.figures.lines", "pipeline.figures.training"} <= plots("render")
    edit(**{"ablations.recall.plot": "positions"})
    assert "pipeline.figures.recall" not in plots("render")


def test_the_figures_depend_on_the_code_of_the_models_whose_state_they_measure(plan):
    plan()
    for stage in ("render", "publish"):
        assert {"cat.mixers.attention.layer", "cat.mixers.mamba.layer"} <= set(stage_modules(load_study())[stage])


def test_a_new_cell_changes_only_the_evaluation_of_its_task(plan):
    before = plan()
    edit(**{"variants.added": dict(read_params()["variants"]["k"])})
    edit(**{"ablations.parametrization.variants": ["qk_channel", "qk_mixing", "qk_network", "added"]})
    after = plan()
    assert {name for name in after if after[name] != before.get(name)} == {
        "train/nar/added.json",
        "evaluate/nar.txt",
        "render.txt",
    }


def test_defaults_are_listed_unless_they_are_off(plan):
    def model():
        return json.loads(plan()["train/ar/mamba.json"])["model"]

    mamba = {"mixer": "mamba", "expand": 2, "state": 16, "conv_size": 4}
    kept = {"activation": "gelu", "canon_size": 4, "norm": "layer", "position": "none"}
    assert model() == {"width": 16, "layers": 1, **kept, "mixers": [mamba]}
    edit(**{"variants.mamba.mlp": 2})
    assert model()["mlp"] == 2
    assert [line for line in plan()["generate/text.txt"].splitlines() if ": " in line] == ["tokens: bytes"]


def test_a_new_order_of_variants_redraws_the_figures(plan):
    before = plan()
    raw = read_params()
    raw["variants"] = dict(reversed(raw["variants"].items()))
    write_params(raw)
    after = plan()
    assert "render.txt" in {name for name in after if after[name] != before[name]}
    assert all(after[name] == before[name] for name in after if name.startswith("train/"))


def test_other_lengths_rebuild_the_construction_and_retrain_nothing(plan):
    before = plan()
    edit(**{"tasks.copying.data.test_examples": 31, "tasks.copying.data.multiples": [1, 2, 8]})
    after = plan()
    assert {name for name in after if after[name] != before[name]} == {"train/copying/construction.json"}
    edit(**{"tasks.copying.data.test_examples": 30, "tasks.copying.data.multiples": [0.5, 1, 2, 8]})
    assert plan() == after


def test_the_schema_is_the_same_for_every_study(plan):
    plan()
    before = (PLAN.parent / "params.schema.json").read_text()
    edit(**{"defaults.training.seeds": [4], "variants.k.conv_k": 2})
    plan()
    assert (PLAN.parent / "params.schema.json").read_text() == before
