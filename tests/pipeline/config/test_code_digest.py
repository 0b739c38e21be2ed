"""What DVC is told of the code of a stage: all that it runs, nothing else, and nothing that only people read."""

import ast

import pytest
from ruamel.yaml import YAML

from pipeline.config.code_digest import ROOT, digest, listings, read_source
from pipeline.config.study import load_study
from pipeline.stages.plan import PLAN, write
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
    return digest(text, ast.parse(text))


def files(listing):
    return {line.split()[1] for line in listing.splitlines()}


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


def test_a_listing_has_what_is_imported_by_what_is_imported_but_no_rules():
    listed = files(listings({"here": ["cat/mixers/delta/layer.py"]})["here"])
    assert listed == {
        "cat/ops/conv/causal.py",
        "cat/mixers/delta/op.py",
        "cat/mixers/filters.py",
        "cat/ops/common.py",
        "cat/ops/conv/triton_backend.py",
        "cat/ops/conv/numba_backend.py",
        "cat/mixers/base.py",
        "cat/mixers/delta/layer.py",
        "cat/mixers/qkv.py",
        "cat/ops/l2norm.py",
        "cat/ops/position.py",
        "cat/ops/conv/torch_backend.py",
        "cat/types.py",
    }


def test_modules_named_after_their_package_are_found():
    assert {"pipeline/runtime/workers.py", "pipeline/storage/runs.py"} <= set(read_source("pipeline/stages/train.py").imports)


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_params(YAML(typ="safe").load(ROOT / "presets" / "smoke.yaml"))

    def planned():
        write(load_study())
        return {str(path.relative_to(PLAN)): path.read_text() for path in PLAN.rglob("*.txt")}

    return planned


def test_a_variant_is_trained_again_for_its_own_mixer_alone(plan):
    texts = plan()
    users = {name for name, text in texts.items() if "cat/mixers/mamba/layer.py" in text}
    assert users == {"train/mamba.txt", "train/mamba_qk.txt", "evaluate/ar.txt", "evaluate/text.txt"}
    assert "cat/theory.py" in texts["train/theory.txt"]
    assert "cat/tasks/text.py" in texts["generate/text.txt"]
    assert not any("cat/tasks/text.py" in texts[f"train/{variant}.txt"] for variant in ("k", "mamba", "theory"))


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
