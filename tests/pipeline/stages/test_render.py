"""Every figure can be read: its series look different, no panel is empty, and a variant looks the same everywhere."""

import itertools
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from pipeline.config.grid import shown_variants
from pipeline.config.load import load_study
from pipeline.figures.drawing.palette import COLOURS, DASHES, DOTS, style
from pipeline.figures.drawing.style import set_theme
from pipeline.reporting.families import FAMILIES, family
from pipeline.reporting.labels import variant_label, with_slug
from pipeline.stages.render import _pictures
from pipeline.storage.results import read_results
from tests.helpers.study import ROOT

MIN_DISTANCE = 0.1
"""Smallest distance of two series of a figure: that of their colours in OKLab, where black and white are 1 apart, and
MIN_DISTANCE if their dashes, or the marks of series without a line, differ."""
STUDIES = [ROOT / "params.yaml", *sorted((ROOT / "presets").glob("*.yaml"))]
CONES = [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806995, 0.10739696], [0.08830246, 0.28171884, 0.6299787]]
LAB = [[0.21045426, 0.79361779, -0.00407205], [1.9779985, -2.42859221, 0.45059371], [0.02590404, 0.78277177, -0.80867577]]


def oklab(colour):
    """The coordinates of a colour in OKLab (Ottosson 2020)."""
    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.array(LAB) @ np.cbrt(np.array(CONES) @ linear)


def distance(first, other):
    """Between two looks: (colour, dash)."""
    (colour, dash), (other_colour, other_dash) = first, other
    return np.linalg.norm(oklab(colour) - oklab(other_colour)) + (MIN_DISTANCE if dash != other_dash else 0)


def look(line):
    """The colour and the dash of a drawn series, or its mark if it has no line."""
    without_line = line.get_linestyle() in ("None", "none", "")
    return line.get_color(), line.get_marker() if without_line else str(line._unscaled_dash_pattern)


def series(figure):
    """Label -> look of each series of a figure."""
    pairs = [zip(*axes.get_legend_handles_labels(), strict=True) for axes in figure.axes]
    return {label: look(handle) for handle, label in itertools.chain(*pairs)}


def test_in_every_figure_all_series_differ_and_every_panel_shows_something(study):
    set_theme()
    drawn = {}
    for picture in _pictures(load_study(), read_results(load_study()), Path()):
        figure = picture.draw(load_study())
        drawn[picture.file.stem] = series(figure)
        assert [axes.get_title() for axes in figure.axes if not axes.has_data()] == [], picture.file
        plt.close(figure)
    near = [
        (name, pair)
        for name, looks in drawn.items()
        for pair in itertools.combinations(looks, 2)
        if distance(*(looks[label] for label in pair)) < MIN_DISTANCE
    ]
    assert near == []
    assert {"qkv_subsets_length", "width", "position", "positions", "cost"} <= set(drawn)
    assert max(map(len, drawn.values())) > 4


def test_the_curves_of_dvc_plots_have_names(study):
    template = (ROOT / ".dvc/plots/lengths.json").read_text()
    table = pd.read_csv("reports/lengths.csv")
    assert {*re.findall(r'"field": "(\w+)"', template)} - {"rev"} <= {*table.columns}
    names = table.drop_duplicates(["task", "variant"]).set_index(["task", "variant"])
    assert tuple(names.loc[("ar", "k"), ["task_name", "variant_name"]]) == (
        "associative recall (ar)",
        with_slug(variant_label(load_study(), "k"), "k"),
    )


@pytest.mark.parametrize("file", STUDIES, ids=lambda path: path.name)
def test_variants_of_a_figure_differ_and_have_the_colours_of_their_family(file):
    study = load_study(file)
    for name, ablation in study.ablations.items():
        looks = {v: (style(study, v)["color"], style(study, v)["linestyle"]) for v in shown_variants(ablation)}
        for pair in itertools.combinations(looks, 2):
            assert distance(*(looks[variant] for variant in pair)) >= MIN_DISTANCE, (name, pair)
        assert all(looks[v][0] in COLOURS[family(study.variants[v])] for v in looks)


def test_colours_of_all_families_differ():
    colours = [colour for of_family in COLOURS.values() for colour in of_family]
    assert min(distance((a, "-"), (b, "-")) for a, b in itertools.combinations(colours, 2)) >= MIN_DISTANCE
    assert set(COLOURS) == set(FAMILIES)
    for of_family in COLOURS.values():
        looks = {(number % len(of_family), number % len(DASHES)) for number in range(len(of_family) * len(DASHES))}
        assert len(looks) == len(of_family) * len(DASHES)
    assert len(DASHES) == len(DOTS)
