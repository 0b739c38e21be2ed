"""`check-mixer` runs every check on a mixer of this library or of somebody's own, and says in one line what is wrong."""

import sys

import pytest
from click.testing import CliRunner

from cat.mixers.checks import CHECKS, FOLDER_CHECKS
from cat.mixers.registry import mixer_class, mixer_names
from pipeline.cli import main
from pipeline.commands.check_mixer import check_mixer
from pipeline.config.errors import ParamsError

FILES = {
    "__init__.py": "",
    "config.py": """
from cat.config import Count, MixerConfig

class MeanConfig(MixerConfig):
    scale: Count = 1
""",
    "examples.py": """
from .config import MeanConfig

EXAMPLES = {"plain": MeanConfig(), "scaled": MeanConfig(scale=2)}
""",
    "layer.py": """
import torch
from torch import nn
from cat.mixers.base import Mixer
from cat.ops.position import gather_positions

class Mean(Mixer):
    def __init__(self, config, *, width, length):
        super().__init__()
        self.scale, self.output = config.scale, nn.Linear(width, width)

    def project(self, x):
        return self.scale * x

    def mix(self, projected, positions=None):
        count = torch.arange(1, projected.shape[1] + 1, device=projected.device)[:, None]
        return self.output(gather_positions(projected.cumsum(1) / count, positions))
""",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a mixer `my_package.mean`, in the working directory."""
    folder = tmp_path / "my_package" / "mean"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(FOLDER_CHECKS, "compile", lambda name: None)  # the compiler cannot trace the shape checks of the tests
    yield folder
    mixer_class.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[name]


def run(name):
    """The exit code, and the lines on standard output and standard error."""
    done = CliRunner().invoke(main, ["check-mixer", name])
    return done.exit_code, done.stdout.splitlines(), done.stderr.splitlines()


@pytest.mark.parametrize("name", ["my_package.mean", "hyena"])
def test_a_mixer_without_a_fault_passes_every_check(folder, name):
    code, lines, errors = run(name)
    assert (code, errors) == (0, [])
    assert [line.split()[0] for line in lines[:-1]] == ["ok"] * (len(CHECKS) + len(FOLDER_CHECKS))
    assert lines[-1] == f"{name} passes all {len(lines) - 1} checks"


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("layer.py", "cumsum(1)", "flip(1).cumsum(1)", "plain: the output at token 0 depends on the later token 66 (and 1 more)"),
        ("layer.py", "cumsum(1) / count", "cumsum(1)[..., :3]", "plain: RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("layer.py", "gather_positions(", "(lambda x, positions: x)(", "plain: the output at single positions has shape"),
        ("examples.py", ', "scaled": MeanConfig(scale=2)', "", "scale = 1 in every example. Fix: add one with another value"),
        ("examples.py", "EXAMPLES =", "BASELINE = MeanConfig()\nEXAMPLES =", "BASELINE has 4,160 parameters"),
    ],
)  # fmt: skip
def test_a_failed_check_has_a_line_with_the_example_and_the_fault(folder, file, old, new, problem):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    code, lines, errors = run("my_package.mean")
    failed = [line for line in lines if line.startswith("FAILED  ")]
    assert (code, errors) == (1, [])
    assert any(problem in line for line in failed)
    assert lines[-1] == f"my_package.mean passes {len(lines) - 1 - len(failed)} of {len(lines) - 1} checks"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mambo", "mambo: unknown mixer; did you mean 'mamba'?"),
        ("no_such_package.mean", "no_such_package.mean: there is no no_such_package/mean/config.py"),
        ("my_package.median", "my_package.median: there is no my_package/median/config.py"),
        ("my_package", "my_package: unknown mixer"),
    ],
)
def test_a_mixer_that_does_not_exist_is_one_line_of_error(folder, name, problem):
    assert run(name) == (2, [], [problem])


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("config.py", None, "there is no my_package/mean/config.py"),
        ("layer.py", None, "there is no my_package/mean/layer.py"),
        ("examples.py", None, "there is no my_package/mean/examples.py"),
        ("config.py", "", "my_package.mean.config must define exactly one MixerConfig, found 0"),
        ("layer.py", "", "my_package.mean.layer must define exactly one mixer, found 0"),
        ("examples.py", "", "my_package.mean.examples must define EXAMPLES, a dict of names and MeanConfig objects"),
        ("config.py", "import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("layer.py", "class Mean(\n", "SyntaxError: '(' was never closed (layer.py, line 1)"),
        ("examples.py", "from .config import MeanConfig\nMeanConfig(scale=0)", "ValidationError: 1 validation error for Mean"),
    ],
)  # fmt: skip
def test_a_folder_that_lacks_something_is_one_line_of_error(folder, file, text, problem):
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    code, lines, errors = run("my_package.mean")
    assert (code, lines, len(errors)) == (2, [], 1)
    assert errors[0].startswith(f"my_package.mean: {problem}")


def test_an_unknown_mixer_is_found_before_any_check():
    with pytest.raises(ParamsError):
        next(check_mixer("mambo"))
    assert "mambo" not in mixer_names()
