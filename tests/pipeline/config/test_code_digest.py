"""What DVC is told of the code of a stage: all that it runs, nothing else, and nothing that only people read."""

import pytest
from ruamel.yaml import YAML

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


def digest_of(text):
    """What counts of a source: its code and its imports."""
    return read_source(text)


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
def test_what_only_people_read_changes_no_digest(old, new):
    assert old in SOURCE
    assert digest_of(SOURCE.replace(old, new)) == digest_of(SOURCE)


@pytest.mark.parametrize(("old", "new"), [("2 * x", "3 * x"), ("return 2", 'return "# 2"'), ("size = 3", 'size = "three"')])
def test_what_is_run_changes_the_digest(old, new):
    assert old in SOURCE
    assert digest_of(SOURCE.replace(old, new)) != digest_of(SOURCE)


def test_a_hash_in_a_string_is_no_comment():
    assert digest_of('a = "b#c"') != digest_of('a = "b#d"')


def test_what_is_imported_is_reached_but_for_declarations():
    assert modules_reached(["cat.mixers.delta.layer"]) == {
        "cat.mixers.base",
        "cat.mixers.delta.layer",
        "cat.mixers.delta.op",
        "cat.mixers.filters",
        "cat.mixers.qkv",
        "cat.ops.common",
        "cat.ops.conv.causal",
        "cat.ops.conv.direct",
        "cat.ops.conv.fft",
        "cat.ops.conv.numba_backend",
        "cat.ops.conv.toeplitz",
        "cat.ops.conv.torch_backend",
        "cat.ops.conv.triton_backend",
        "cat.ops.l2norm",
        "cat.ops.position",
        "cat.types",
    }


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A project of two modules, of which the first imports the second."""
    monkeypatch.setattr("pipeline.config.code_digest.ROOT", tmp_path)
    module_digest.cache_clear()

    def write(**texts):
        module_digest.cache_clear()
        for name, text in texts.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return module_digest("cat.first")

    yield write
    module_digest.cache_clear()


USE = "import math\n{}\n\ndef first():\n    return math.pi * second()\n"


def test_a_module_that_moves_changes_no_digest(package):
    before = package(cat__first=USE.format("from cat.second import second"), cat__second="def second():\n    return 2\n")
    moved = USE.format("from cat.room.deeper.second import second")
    assert package(cat__first=moved, cat__room__deeper__second="def second():\n    return 2\n") == before
    late = "def first():\n    {}\n    return second()\n"
    near, far = late.format("from cat.second import second"), late.format("from cat.room.deeper.second import second")
    assert package(cat__first=near) == package(cat__first=far) != before


@pytest.mark.parametrize("use", [USE, "def first():\n    {}\n    return second()\n"])
def test_what_an_import_runs_changes_the_digest_late_or_not(package, use):
    before = package(cat__first=use.format("from cat.second import second"), cat__second="def second():\n    return 2\n")
    assert package(cat__second="def second():\n    return 2  # two\n") == before
    assert package(cat__second="def second():\n    return 3\n") != before


def test_another_name_of_the_same_module_changes_the_digest(package):
    text = "def second():\n    return 2\n\n\ndef third():\n    return 3\n"
    before = package(cat__first=USE.format("from cat.second import second"), cat__second=text)
    assert package(cat__first=USE.format("from cat.second import third as second")) != before


def test_an_import_for_types_is_nothing_to_the_digest(package):
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from cat.second import second\n"
    before = package(cat__first=typed, cat__second="def second():\n    return 2\n")
    assert package(cat__second="def second():\n    return 3\n") == before


def test_modules_named_after_their_package_are_found():
    assert {"pipeline.runtime.workers", "pipeline.storage.runs"} <= modules_reached(["pipeline.stages.train"])


def test_only_the_cell_of_a_theorem_depends_on_the_theory():
    assert "cat.theory" not in modules_reached(["pipeline.stages.train"])


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml"))

    def planned():
        write(load_study())
        return {str(path.relative_to(PLAN)): path.read_text() for path in PLAN.rglob("*.txt")}

    return planned


def test_a_variant_is_trained_again_for_its_own_mixer_alone(plan):
    plan()
    reached = {name: modules_reached(modules) for name, modules in stage_modules(load_study()).items()}
    users = {name for name, modules in reached.items() if "cat.mixers.mamba.layer" in modules}
    assert users == {"train/mamba", "train/mamba_qk", "evaluate/ar", "evaluate/text"}
    assert "cat.theory" in reached["train/theory"]
    assert "cat.tasks.text" in reached["generate/text"]
    assert not any("cat.tasks.text" in reached[f"train/{variant}"] for variant in ("k", "mamba", "theory"))


def test_a_new_cell_changes_the_evaluation_of_its_task_alone(plan):
    before = plan()
    edit(**{"variants.added": dict(read_params()["variants"]["k"])})
    edit(**{"ablations.kinds.variants": ["qk_channel", "qk_mixing", "qk_network", "added"]})
    after = plan()
    assert {name for name in after if after[name] != before.get(name)} == {"train/added.txt", "evaluate/nar.txt", "render.txt"}


def test_what_a_configuration_leaves_to_defaults_is_listed_and_what_is_off_is_not(plan):
    def defaults(name):
        return [line for line in plan()[name].splitlines() if ": " in line]

    assert defaults("train/mamba.txt") == ["activation: gelu", "norm: layer", "expand: 2", "state: 16", "conv: 4"]
    edit(**{"variants.mamba.state": 8})
    assert defaults("train/mamba.txt") == ["activation: gelu", "norm: layer", "expand: 2", "conv: 4"]
    assert defaults("generate/text.txt") == ["tokens: bytes"]


def test_figures_are_drawn_anew_when_variants_change_places(plan):
    before = plan()
    raw = read_params()
    raw["variants"] = dict(reversed(raw["variants"].items()))
    write_params(raw)
    after = plan()
    assert "render.txt" in {name for name in after if after[name] != before[name]}
    assert all(after[name] == before[name] for name in after if name.startswith("train/"))


def test_a_theorem_s_weights_are_prescribed_again_for_other_lengths_and_nothing_is_trained(plan):
    before = plan()
    edit(**{"tasks.copying.data.test": 31, "tasks.copying.data.multiples": [1, 2, 8]})
    after = plan()
    assert {name for name in after if after[name] != before[name]} == {"train/theory.txt"}
    edit(**{"tasks.copying.data.test": 30, "tasks.copying.data.multiples": [0.5, 1, 2, 8]})
    assert plan() == after


def test_the_schema_is_the_same_for_every_study(plan):
    plan()
    before = (PLAN.parent / "params.schema.json").read_text()
    edit(seeds=[4], **{"variants.k.k": 2})
    plan()
    assert (PLAN.parent / "params.schema.json").read_text() == before
