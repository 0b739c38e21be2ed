"""Digests of code. DVC reruns a stage if the digest of its code changes.

The digest of a module covers its own code and, through its imports, the code of every project module that it uses. It ignores
comments, docstrings, blank lines and paths, so neither an edited comment nor a moved file retrains anything. Imports inside
functions count. Imports by a computed name do not: such a module is one of several alternatives, and `plan` names the chosen one.
Relative imports do not count either. Project modules are those of cat, of pipeline, and of packages in the working directory.
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
DECLARATIONS = {
    "cat.config", "cat.mixers.registry", "cat.tasks.registry",
    *(f"pipeline.config.{name}" for name in ("errors", "load", "names", "rules", "study", "yaml_file")),
}  # fmt: skip
"""Schemas and their rules; see also `is_declaration`. No result depends on their code, because `plan` lists the values in use."""


def code_digest(modules: Iterable[str]) -> str:
    """The digest of `modules` and all project code that they import."""
    return _sha256("\n".join(sorted(map(module_digest, modules))))


@functools.cache
def module_digest(module: str) -> str:
    """The digest of one module: of its own code and of the digest of each project module that it imports."""
    own_code, imports = _read(module)
    lines = (f"{'' if is_declaration(imported) else module_digest(imported)} {names}" for imported, names in imports)
    return _sha256("\n".join([*sorted(lines), own_code]))


def modules_reached(modules: Iterable[str]) -> set[str]:
    """`modules` and every project module that they import, directly or indirectly."""
    reached: set[str] = set()
    pending = list(modules)
    while pending:
        module = pending.pop()
        if module not in reached and not is_declaration(module):
            reached.add(module)
            pending += (imported for imported, _ in _read(module)[1])
    return reached


def is_declaration(module: str) -> bool:
    """Whether no result depends on the code of a module."""
    return module in DECLARATIONS or (module.startswith("cat.mixers.") and module.endswith(".config"))


def _read(module: str) -> tuple[str, list[tuple[str, str]]]:
    path = _file(module)
    if path is None:
        raise ValueError(f"{module}: has no file in this folder")
    return read_source(path.read_text(encoding="utf-8"))


def _file(module: str) -> Path | None:
    """The file of a project module; None for other modules."""
    files = (folder / f"{module.replace('.', '/')}.py" for folder in (ROOT, Path()))
    return next((file for file in files if file.is_file()), None)


def read_source(text: str) -> tuple[str, list[tuple[str, str]]]:
    """The code that counts for the digest, and the project imports: (module, `name as local name`)."""
    tree = ast.parse(text)
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    imports: list[tuple[str, str]] = []
    for node in _runtime_nodes(tree):
        own_imports = list(_project_imports(node))
        imports += own_imports
        if own_imports or _is_docstring(node) or _is_type_checking(node):
            first, last = node.lineno, node.end_lineno or node.lineno  # type: ignore[attr-defined]
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line for line in map(str.rstrip, lines) if line), imports


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes except those under `if TYPE_CHECKING`."""
    yield tree
    if not _is_type_checking(tree):
        for child in ast.iter_child_nodes(tree):
            yield from _runtime_nodes(child)


def _project_imports(node: ast.AST) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((alias.name, f"module as {alias.asname or alias.name}") for alias in node.names if _file(alias.name))
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        for alias in node.names:
            if _file(module := f"{node.module}.{alias.name}"):
                yield module, f"module as {alias.asname or alias.name}"
            elif _file(node.module):
                yield node.module, f"{alias.name} as {alias.asname or alias.name}"


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
