"""report.html is one file: it needs no other file, contains every figure, and has unique ids."""

import re
from html.parser import HTMLParser

import pytest

from pipeline.reporting.html import page

SVG = """<?xml version="1.0"?>
<!DOCTYPE svg>
<svg width="9pt"><defs><path id="a"/></defs><use xlink:href="#a"/><g clip-path="url(#b)"/></svg>"""
REPORT = """# Title & all

| claim | verdict |
|:--|:--|
| one `x` < 2 | **supported** |

<a id="one"></a>

## Which & why?

![one](figures/one.svg)

*What to see.*

<a id="two"></a>

## Which & why?

Numbers: [results/ar.csv](../results/ar.csv), see [one](#one).

![two "2"](two.svg)
"""


class Elements(HTMLParser):
    """Names and attributes of all elements."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture
def report(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in ("figures/one", "two"):
        (tmp_path / f"{name}.svg").write_text(SVG)
    return page(REPORT, tmp_path)


def test_figures_are_inlined_and_nothing_is_loaded(report):
    elements = Elements(report)
    assert [part["aria-label"] for part in elements.named("div") if part.get("role") == "img"] == ["one", 'two "2"']
    assert len(elements.named("svg")) == 2
    assert elements.named("img") + elements.named("script") + elements.named("link") == []
    assert "<?xml" not in report
    assert not re.search(r'(?:src|href)="(?!#)', report)


def test_ids_of_the_figures_are_unique(report):
    elements = Elements(report)
    names = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(set(names)) == len(names) == 4
    assert [use["xlink:href"] for use in elements.named("use")] == ["#one-a", "#two-a"]
    assert "url(#one-b)" in report


def test_sections_are_linked_and_verdicts_coloured(report):
    elements = Elements(report)
    assert [link["href"] for link in elements.named("a")] == ["#one"]
    assert [heading["id"] for heading in elements.named("h2")] == ["one", "two"]
    assert "Numbers: results/ar.csv, see" in report
    assert elements.named("strong") == [{"class": "supported"}]
    assert "<title>Title &amp; all</title>" in report
    assert "width=device-width" in report


def test_a_caption_is_part_of_its_figure(report):
    figures = report.split("<figure>")
    assert ["<figcaption>What to see.</figcaption></figure>" in figure for figure in figures] == [False, True, False]


def test_a_missing_figure_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"one\.svg"):
        page("![one](figures/one.svg)", tmp_path)
