"""Digests of code. DVC reruns a stage if the digest of its code changes.

The digest of a module covers its own code and, through its imports, the code of every project module that it uses. It ignores
comments, docstrings, blank lines and paths, so neither an edited comment nor a moved file retrains anything. Imports inside
functions count. Imports by a computed name do not: such a module is one of several alternatives, and `plan` names the chosen one.

The project is `cat`, `pipeline`, and the modules in the working folder, where your own mixers, tasks and plots are. Of a mixer,
task or plot in an installed package, all Python files of its folder count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("cat", "pipeline")
DECLARATIONS = {
    "cat.config", "cat.mixers.registry", "cat.tasks.registry",
    *(f"pipeline.config.{name}" for name in ("errors", "load", "names", "resolve", "rules", "study", "yaml_file")),
}  # fmt: skip
"""Schemas and their rules; see also `is_declaration`. No result depends on their code, because `plan` lists the values in use."""


def code_digest(modules: Iterable[str]) -> str:
    """The digest of `modules` and all project code that they import."""
    return _sha256("\n".join(sorted(map(module_digest, modules))))


@functools.cache
def module_digest(module: str) -> str:
    """The digest of one module: of its own code and of the digest of each project module that it imports.

    Raises ValueError if a module of your own imports itself by way of others, or does not exist.
    """
    if is_installed(module):
        return _installed_digest(module)
    own_code, imports = _read(module)
    if is_own(module) and module in modules_reached(imported for imported, _ in imports):
        raise ValueError(f"{source_file(module)}: imports itself by way of other modules")
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
            if is_installed(module):
                continue
            pending += (imported for imported, _ in _read(module)[1])
    return reached


def own_digests(modules: Iterable[str]) -> dict[str, str]:
    """The digest of each module that `modules_reached` finds, without the code that it imports."""
    digests = {}
    for module in sorted(modules_reached(modules)):
        if is_installed(module):
            digests[module] = _installed_digest(module)
        else:
            code, imports = _read(module)
            digests[module] = _sha256("\n".join([*sorted(f"{imported} {names}" for imported, names in imports), code]))
    return digests


def is_declaration(module: str) -> bool:
    """Whether no result depends on the code of a module."""
    return module in DECLARATIONS or (module.startswith("cat.mixers.") and module.endswith(".config"))


def is_own(module: str) -> bool:
    """Whether a module is not part of this program."""
    return module.split(".")[0] not in PACKAGES


def is_installed(module: str) -> bool:
    """Whether a module that is not part of this program is not in the working folder either."""
    return is_own(module) and not source_file(module).is_file()


def source_file(module: str) -> Path:
    """The file of a module; it may not exist."""
    path = (Path() if is_own(module) else ROOT) / module.replace(".", "/")
    package = path / "__init__.py"
    return package if package.is_file() else path.with_name(f"{path.name}.py")


def _installed_digest(module: str) -> str:
    """The digest of the Python files in the folder of an installed module, without their imports."""
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise ValueError(f"{module}: there is no such module")
    files = sorted(Path(spec.origin).parent.glob("*.py"))
    return _sha256("\n".join(f"{path.name}\n{path.read_text(encoding='utf-8')}" for path in files))


def _read(module: str) -> tuple[str, list[tuple[str, str]]]:
    file = source_file(module)
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    return read_source(file.read_text(encoding="utf-8"), package)


@functools.cache
def read_source(text: str, package: str = "") -> tuple[str, list[tuple[str, str]]]:
    """The code that counts for the digest, and the project imports: (module, `name as local name`).

    Relative imports are those of a module in `package`.
    """
    tree = ast.parse(text)
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    imports: list[tuple[str, str]] = []
    for node in _runtime_nodes(tree):
        own_imports = list(_project_imports(node, package))
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


def _project_imports(node: ast.AST, package: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if source_file(alias.name).is_file():
                yield alias.name, f"module as {alias.asname or alias.name}"
    if isinstance(node, ast.ImportFrom):
        base = _imported_from(node, package)
        for alias in node.names:
            names = f"{alias.name} as {alias.asname or alias.name}"
            module = f"{base}.{alias.name}"
            if source_file(module).is_file():
                yield module, f"module as {alias.asname or alias.name}"
            elif source_file(base).is_file():
                yield base, names


def _imported_from(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names; each dot after the first is one package up."""
    if not node.level:
        return node.module or ""
    parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
