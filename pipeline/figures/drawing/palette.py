"""The look of a variant: colour, dash and marker, by its family.

A variant looks the same in every figure, and no two variants of a figure look alike: a variant gets the first look of its family
that no earlier variant of the same figures has. So a look also stays when later variants are added.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from cat.mixers.registry import AnyVariant
from pipeline.config.grid import shown_variants
from pipeline.config.study import Study
from pipeline.reporting.families import ATTENTION, CAT, CONSTRUCTION, HYBRID, RECURRENT, family

COLOURS = {
    ATTENTION: ("#0072B2", "#56B4E9", "#14304F"),
    CAT: ("#FF8585", "#D55E00", "#F2A900", "#B00040", "#7F2704"),
    RECURRENT: ("#009E73", "#9BBF00", "#00543D", "#5CD1B0", "#7D7A00"),
    HYBRID: ("#8E3BAF", "#D98BE0", "#43196B"),
    CONSTRUCTION: ("#000000", "#5A5A5A", "#A0A0A0"),
}
"""Any two colours are at least 0.1 apart in OKLab. The number of colours has no common factor with that of dashes."""
DASHES = ("-", (0, (5, 1.5)), (0, (2.5, 1)), (0, (6, 1.5, 1.5, 1.5)))
DOTS = ((0, (1, 1.2)), (0, (1, 3)), (0, (1, 1.2, 1, 4)), (0, (1, 1.2, 1, 1.2, 1, 4)))
"""Lines of constructions."""
MARKERS = {ATTENTION: "osD^", CAT: "sDo^vPX", RECURRENT: "^vDosP*", HYBRID: "P*Xphd", CONSTRUCTION: "8H."}


def style(study: Study, variant: str) -> dict[str, Any]:
    """Colour, dash and marker of a variant: the same in every figure, and kept when later variants are added."""
    figures = tuple(tuple(shown_variants(ablation)) for ablation in study.ablations.values())
    name, number = _looks(tuple(study.variants.items()), figures)[variant]
    dashes = DOTS if name == CONSTRUCTION else DASHES
    return {
        "color": COLOURS[name][number % len(COLOURS[name])],
        "linestyle": dashes[number % len(dashes)],  # where lines coincide, both remain visible
        "marker": MARKERS[name][number % len(MARKERS[name])],
    }


@functools.lru_cache(maxsize=8)
def _looks(models: tuple[tuple[str, AnyVariant], ...], figures: tuple[tuple[str, ...], ...]) -> dict[str, tuple[str, int]]:
    """Variant -> its family, and the number of its look in the family."""
    looks: dict[str, tuple[str, int]] = {}
    for variant, model in models:
        beside = {other for shown in figures if variant in shown for other in shown}
        name = family(model)
        taken = Counter(number for other in beside if other in looks for kind, number in [looks[other]] if kind == name)
        looks[variant] = name, min(range(len(COLOURS[name]) * len(DASHES)), key=taken.__getitem__)
    return looks
