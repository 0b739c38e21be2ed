"""Text of the user is shown as it was written, in Markdown and in the page."""

import html
import random
import re

import pandas as pd
import pytest

from pipeline.reporting.html import page
from pipeline.reporting.markdown import escape
from tests.helpers.study import ROOT

TEXTS = [
    "![sketch](sketch.svg)", "[x](y.md)", "[x]: y", "<b>bold</b>", "<img src='x.svg'>", "<!-- x", "<https://x.org>", "</details>",
    "a | b", r"a \| b", "*x* **y** _z_ __w__", "`x`", "``` x", "x #", "# x", "~~x~~", "$x$", "&amp; &lt; &#35;", r"\[x\]", "x\\",
    '<a id="claims"></a>', "(([", "]) {", "1. x", "- x", "> x", "**supported**", "p < 0.05 & q > 1", "---",
]  # fmt: skip
PIECES = [*"\\`*_[]()<>&;#!|~$-+=.:\"'{}/?^% ax1", *TEXTS]


def shown(text):
    """Heading, cell and item with the text in a page."""
    table = pd.DataFrame({"claim": [f"{escape(text)} (ours)"]}).to_markdown(index=False, disable_numparse=True)
    written = page(f'# T\n\n{table}\n\n<a id="a"></a>\n\n## {escape(text)}\n\n* {"x"}: {escape(text)}\n', ROOT)
    patterns = ("<h2 id=.a.>(.*)</h2>", r"<td .*?>(.*) \(ours\)</td>", "<li>x: (.*)</li>")
    return [re.search(pattern, written).group(1) for pattern in patterns]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_no_markup(text):
    assert {html.unescape(found) for found in shown(text)} == {text}
    assert not any("<" in found for found in shown(text))


def test_random_text_is_no_markup():
    choose = random.Random(0)
    for _ in range(500):
        text = "".join(choose.choices(PIECES, k=choose.randint(1, 9))).strip() or "?"
        found = shown(text)
        assert {html.unescape(part) for part in found} == {text}
        assert not any("<" in part for part in found), text


def test_ordinary_text_stays_readable():
    text = 'Does "conv_k" (kernel size 4, p < 0.05 & more) help - or not? See a/b, 5 % at 8x!'
    assert escape(text) == text
