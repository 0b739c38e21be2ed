"""Write the API reference: `python -m docs.reference` turns the docstrings into docs/api/. Warnings of pdoc are errors."""

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
from pydantic import BeforeValidator, WrapValidator
from pydantic.fields import FieldInfo
from torch import nn

from cat.tasks.tokenizer import Tokenizer
from pipeline.storage.files import atomic_write

PACKAGES = ("cat", "pipeline")
NEEDS_TRITON = "cat.ops.conv.triton_backend"
INHERITS = "cat.hf"
"""Its classes have hundreds of names from transformers, with types that pdoc cannot read. docs/layer.md describes it."""
TYPES = {"Tokenizer": Tokenizer}
"""Types that modules import only for type checkers."""
FOLDER = Path(__file__).parent / "api"


def write(folder: Path = FOLDER, packages: tuple[str, ...] = PACKAGES) -> None:
    """Write a page per module, an index and a search into `folder`."""
    _configure_pdoc()
    for package in packages:
        _prepare(import_module(package))
    with warnings.catch_warnings(action="error"), atomic_write(folder) as pages:
        for name in _excluded_modules():
            warnings.filterwarnings("ignore", f"Couldn't import {name}")
        pdoc.pdoc(*packages, *(f"!{name}" for name in _excluded_modules()), output_directory=pages)
        for page in pages.rglob("*.html"):
            page.write_text(_clean(page.read_text(encoding="utf-8")), encoding="utf-8")


def _prepare(module: ModuleType) -> dict[str, str]:
    """Show pdoc the names that a package exports and the types of NamedTuple fields; return the docstrings of variables."""
    names, docstrings = getattr(module, "__all__", []), {}
    vars(module).update({name: getattr(module, name) for name in names})  # some are imported lazily
    for kind in vars(module).values():
        if isinstance(kind, type) and hasattr(kind, "_fields") and kind.__module__ == module.__name__:
            kind.__new__.__annotations__ = typing.get_type_hints(kind, localns=TYPES, include_extras=True)
            for part in (kind.__new__, *(vars(kind)[field] for field in kind._fields)):
                part.__doc__ = None  # Python's own text, such as "Alias for field number 0"
    for found in pkgutil.iter_modules(getattr(module, "__path__", ())):
        if found.name == "__main__" or f"{module.__name__}.{found.name}" in _excluded_modules():
            continue
        docstrings |= _prepare(import_module(f"{module.__name__}.{found.name}"))
        if names:
            names.append(found.name)
    own = walk_tree(module).var_docstrings
    own.update({name: docstrings[name] for name in names if name in docstrings})
    return docstrings | own


def _excluded_modules() -> list[str]:
    return [INHERITS] if find_spec("triton") else [INHERITS, NEEDS_TRITON]


def _configure_pdoc() -> None:
    """Escape HTML in docstrings, because formulas look like it, and omit the docstrings that torch gives to every module."""
    pdoc.render.env.filters["to_html"] = functools.partial(
        markdown, safe_mode="escape", extras=markdown_extensions, link_patterns=markdown_link_patterns
    )
    nn.Module.__init__.__doc__ = nn.Module.forward.__doc__ = None
    walk_tree(nn.Module).func_docstrings.clear()
    BeforeValidator.__repr__ = WrapValidator.__repr__ = lambda validator: validator.func.__name__
    FieldInfo.__repr__ = lambda field: ", ".join(map(repr, field.metadata)) or f"discriminator={field.discriminator!r}"


def _clean(page: str) -> str:
    """Remove the defaults of fields that have none, and write shapes as in the code."""
    page = re.sub(r'=\s*<span class="default_value">PydanticUndefined</span>', "", page)
    return re.sub(r"&lt;class &#39;(jaxtyping\..*?)&#39;&gt;", r"\1", page)


if __name__ == "__main__":
    write()
