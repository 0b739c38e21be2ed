"""The API reference: `python -m docs.reference` writes docs/api/ from the docstrings. What pdoc warns of is an error."""

from __future__ import annotations

import functools
import pkgutil
import re
import typing
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pdoc
from markdown2 import markdown
from pdoc.doc_ast import walk_tree
from pdoc.render_helpers import markdown_extensions, markdown_link_patterns
from pydantic.fields import FieldInfo
from torch import nn

from pipeline.storage.files import atomic_write

PACKAGES = ("cat", "pipeline")
NEEDS_TRITON = "cat.ops.conv.triton_backend"
FOLDER = Path(__file__).parent / "api"


def write(folder: Path = FOLDER, packages: tuple[str, ...] = PACKAGES) -> None:
    """A page a module, an index and a search over both, in `folder`. Raises what pdoc warns of."""
    _fewer_words()
    for package in packages:
        _prepare(import_module(package))
    with warnings.catch_warnings(action="error"), atomic_write(folder) as pages:
        pdoc.pdoc(*packages, *(f"!{name}" for name in _left_out()), output_directory=pages)
        for page in pages.rglob("*.html"):
            page.write_text(_tidied(page.read_text(encoding="utf-8")), encoding="utf-8")


def _prepare(module: ModuleType) -> None:
    """Tells pdoc what it does not see: what a package has from its modules, and the types of a NamedTuple's fields."""
    names = getattr(module, "__all__", [])
    vars(module).update({name: getattr(module, name) for name in names})  # some are imported when they are asked for
    for kind in vars(module).values():
        if isinstance(kind, type) and hasattr(kind, "_fields") and kind.__module__ == module.__name__:
            kind.__new__.__annotations__ = typing.get_type_hints(kind, include_extras=True)
            for part in (kind.__new__, *(vars(kind)[field] for field in kind._fields)):
                part.__doc__ = None  # it says which field of a tuple it is
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if found.name == "__main__" or f"{module.__name__}.{found.name}" in _left_out():
            continue
        below = import_module(f"{module.__name__}.{found.name}")
        _prepare(below)
        if names:
            docstrings = walk_tree(below).var_docstrings
            walk_tree(module).var_docstrings.update({name: docstrings[name] for name in names if name in docstrings})
            names.append(found.name)


def _left_out() -> list[str]:
    """What cannot be imported here."""
    return [] if find_spec("triton") else [NEEDS_TRITON]


def _fewer_words() -> None:
    """Docstrings have no HTML, but formulas that look like it; what torch says of every module is no description of ours."""
    pdoc.render.env.filters["to_html"] = functools.partial(
        markdown, safe_mode="escape", extras=markdown_extensions, link_patterns=markdown_link_patterns
    )
    nn.Module.__init__.__doc__ = nn.Module.forward.__doc__ = None
    walk_tree(nn.Module).func_docstrings.clear()
    FieldInfo.__repr__ = lambda field: ", ".join(map(repr, field.metadata)) or f"discriminator={field.discriminator!r}"


def _tidied(page: str) -> str:
    """Without the defaults of fields that have none; a shape as it is written."""
    page = re.sub(r'=\s*<span class="default_value">PydanticUndefined</span>', "", page)
    return re.sub(r"&lt;class &#39;(jaxtyping\..*?)&#39;&gt;", r"\1", page)


if __name__ == "__main__":
    write()
