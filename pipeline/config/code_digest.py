"""What code a stage runs: the files that it begins with and what they import, each with a digest of its text.

DVC depends on the list, not on the files: a comment or a docstring retrains nothing, nor does the code of another mixer.
Names, types and rules are no part of it, since they hold no number of a run, nor is the choice of a class by its name.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
RULES = {"cat/config.py", "pipeline/config/study.py"}
CHOICES = {"cat/mixers/__init__.py", "cat/tasks/__init__.py"}
LATER = {"cat/ops/conv/causal.py": ["cat/ops/conv/triton_backend.py", "cat/ops/conv/numba_backend.py"]}
"""What is imported where it is needed."""


class Source(NamedTuple):
    """One file of the project."""

    digest: str
    imports: list[str]
    """The project's files that it imports when it is imported; what a function imports belongs to who calls it."""


def listings(beginnings: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """For each name `digest  file` of every file that its beginnings run, a line each."""
    read = functools.cache(read_source)
    return {name: "".join(f"{read(file).digest}  {file}\n" for file in reach(files, read)) for name, files in beginnings.items()}


def reach(beginnings: Iterable[str], read: Callable[[str], Source]) -> list[str]:
    """The `beginnings` and all that they import, sorted."""
    files: set[str] = set()
    waiting = list(beginnings)
    while waiting:
        file = waiting.pop()
        if file not in files | RULES | CHOICES:
            files.add(file)
            waiting += read(file).imports
    return sorted(files)


def read_source(file: str) -> Source:
    text = (ROOT / file).read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports = list(LATER.get(file, ()))
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.split(".")[0] in ("cat", "pipeline"):
            package = statement.module.replace(".", "/")
            modules = [package, *(f"{package}/{alias.name}" for alias in statement.names)]
            imports += [f"{module}.py" for module in modules if (ROOT / f"{module}.py").is_file()]
    return Source(digest(text, tree), imports)


def digest(text: str, tree: ast.Module) -> str:
    """Of the text without comments, docstrings and blank lines: the same in every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                lines[row - 1] = ""
    code = "\n".join(line for line in map(str.rstrip, lines) if line)
    return hashlib.sha256(code.encode()).hexdigest()[:16]
