"""`pipeline` imports `cat`, never the reverse; heavy packages are imported only when they are needed."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOREIGN_TO_CAT = {"pipeline", "mlflow", "dvc", "ruamel", "click", "pandas", "seaborn", "matplotlib", "safetensors", "tabulate"}
FOREIGN_TO_CAT |= {"tokenizers", "huggingface_hub", "pyarrow"}  # imported by the function that needs them
FOREIGN_TO_CAT |= {"transformers", "lm_eval", "datasets", "accelerate"}  # imported by cat.hf, which nothing imports
OPTIONAL = {"cat.hf"} | ({"cat.ops.conv.triton_backend"} if find_spec("triton") is None else set())
MODULES = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in sorted((ROOT / "cat").rglob("*.py"))]
LIBRARY = ", ".join(module for module in MODULES if module not in OPTIONAL)


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a statement imports in a new interpreter."""
    script = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split())


def test_the_library_does_not_import_the_study():
    assert not loaded_by(f"import {LIBRARY}") & FOREIGN_TO_CAT


def test_the_library_s_dependencies_are_what_its_modules_import():
    optional = {"triton_backend.py", "hf.py"}  # Triton comes with PyTorch, transformers with the extra `hf`
    files = [path for path in (ROOT / "cat").rglob("*.py") if path.name not in optional]
    statements = [line for path in files for line in ast.parse(path.read_text(encoding="utf-8")).body]
    names = [alias.name for line in statements if isinstance(line, ast.Import) for alias in line.names]
    names += [line.module or "" for line in statements if isinstance(line, ast.ImportFrom)]
    imported = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"cat"}
    with (ROOT / "pyproject.toml").open("rb") as file:
        needed = tomllib.load(file)["project"]["dependencies"]
    assert {re.match("[a-z]+", name).group() for name in needed} == imported


def test_the_test_above_can_fail():
    assert loaded_by("import pipeline.config.study, tokenizers") & FOREIGN_TO_CAT >= {"pipeline", "tokenizers"}


def test_only_one_module_imports_transformers():
    files = [path for folder in ("cat", "pipeline") for path in (ROOT / folder).rglob("*.py")]
    importing = re.compile(r"^\s*(?:from|import) (?:transformers|lm_eval|accelerate)\b", re.MULTILINE)
    assert [path.name for path in files if importing.search(path.read_text(encoding="utf-8"))] == ["hf.py"]


def test_validation_imports_no_torch_mlflow_or_pandas():
    modules = "pipeline.cli, pipeline.config.study, pipeline.config.grid, pipeline.stages.plan, cat.tasks.registry"
    assert not loaded_by(f"import {modules}") & {"torch", "mlflow", "pandas", "matplotlib"}


def test_checking_every_plot_imports_no_package_that_draws():
    heavy = {"torch", "pandas", "matplotlib", "seaborn", "scipy"}
    load = "from pipeline.config import names, plots; used = [plots.load_plot(name) for name in names.plot_names()]"
    assert not loaded_by(load) & heavy
    assert loaded_by(f"{load}; import pipeline.figures.drawing.style") >= {"pandas", "matplotlib", "seaborn"}


def test_only_tracking_imports_mlflow():
    stages = ("train", "evaluate", "generate", "judge", "render", "report")
    assert "mlflow" not in loaded_by("import " + ", ".join(f"pipeline.stages.{stage}" for stage in stages))


def test_tables_and_tracking_import_no_torch():
    assert "torch" not in loaded_by("import pipeline.stages.render, pipeline.tracking.sync")


def test_numba_is_imported_only_for_convolution_or_recurrence_on_a_cpu():
    filtered = "from cat.ops.conv.causal import filter_channels; filter_channels(torch.ones(1, 1, 9, 2), torch.ones(1, 2, 3))"
    scanned = "from cat.mixers.delta.op import delta_rule; x = torch.ones(1, 1, 9, 2); delta_rule(x, x, x, x[..., 0])"
    assert "numba" not in loaded_by("import pipeline.stages.train, cat.ops.conv.causal, cat.mixers.delta.op, cat.mixers.mamba.op")
    assert "numba" in loaded_by(f"import torch; {scanned}")
    assert "numba" in loaded_by(f"import torch; {filtered}")


def test_training_imports_no_pandas():
    assert not loaded_by("import pipeline.stages.train, pipeline.stages.evaluate") & {"pandas", "matplotlib", "seaborn"}
