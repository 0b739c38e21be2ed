"""Digests of code, by which DVC knows whether a stage must run again.

The digest of a module covers its own code and, through its imports, the code of every project module that it uses. Comments,
docstrings, blank lines and paths do not count: neither an edited comment nor a moved file trains anything again. Imports inside
functions are followed as well. What is imported by a computed name is not: such a module is one of several alternatives, and
`plan` names the chosen one.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("cat", "pipeline")
DECLARATIONS = {
    "cat.config", "cat.mixers.registry", "cat.tasks.registry",
    *(f"pipeline.config.{name}" for name in ("errors", "load", "names", "rules", "study", "yaml_file")),
}  # fmt: skip
"""Schemas and their rules, and so every `config` of a mixer. They hold no number of a run: `plan` lists the values in use."""


def code_digest(modules: Iterable[str]) -> str:
    """The digest of all code that `modules` run."""
    return _sha256("\n".join(sorted(map(module_digest, modules))))


@functools.cache
def module_digest(module: str) -> str:
    """The digest of one module: its own code, and the digest of each project module that it imports."""
    own, imports = _read(module)
    lines = (f"{'' if is_declaration(imported) else module_digest(imported)} {names}" for imported, names in imports)
    return _sha256("\n".join([*sorted(lines), own]))


def modules_reached(modules: Iterable[str]) -> set[str]:
    """The `modules` and every project module that they import, directly or not."""
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in reached and not is_declaration(module):
            reached.add(module)
            waiting += (imported for imported, _ in _read(module)[1])
    return reached


def is_declaration(module: str) -> bool:
    """Whether a module holds no number of a run."""
    return module in DECLARATIONS or (module.startswith("cat.mixers.") and module.endswith(".config"))


def _read(module: str) -> tuple[str, list[tuple[str, str]]]:
    return read_source((ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


def read_source(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The code without what does not count, and its project imports: (module, `name as local name`)."""
    tree = ast.parse(text)
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    imports: list[tuple[str, str]] = []
    for node in _run(tree):
        found = list(_project_imports(node))
        imports += found
        if found or _is_docstring(node) or _is_for_types(node):
            first, last = node.lineno, node.end_lineno or node.lineno  # type: ignore[attr-defined]
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line for line in map(str.rstrip, lines) if line), imports


def _run(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker reads."""
    yield tree
    if not _is_for_types(tree):
        for child in ast.iter_child_nodes(tree):
            yield from _run(child)


def _project_imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
        for alias in node.names:
            names = f"{alias.name} as {alias.asname or alias.name}"
            module = f"{node.module}.{alias.name}"
            if (ROOT / f"{module.replace('.', '/')}.py").is_file():
                yield module, f"module as {alias.asname or alias.name}"
            else:
                yield node.module, names


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
