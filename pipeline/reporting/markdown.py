"""Show text of params.yaml and claims.yaml in Markdown as it was written."""

from __future__ import annotations

import re

_SPECIAL = re.compile(
    r"""[\\`*\[\]|~$\#]  # code, emphasis, links and images, cells of tables, strikethrough, formulas, headings
    |(?<![^\W_])_|_(?![^\W_])  # emphasis; an underscore within a word is none
    """,
    re.VERBOSE,
)


def escape(text: str) -> str:
    """Escape what Markdown or HTML would interpret in one line of `text`."""
    # Not every reader of Markdown accepts a backslash before these two.
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return re.sub("<(?=[a-zA-Z/!?])", "&lt;", _SPECIAL.sub(r"\\\g<0>", text))
