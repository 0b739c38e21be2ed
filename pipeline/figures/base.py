"""What plots share that have a key of the variants on their axis."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

from cat.mixers.registry import ConstructionConfig
from pipeline.config.errors import nearest
from pipeline.config.grid import shown_variants, variant_keys, variant_value
from pipeline.config.plots import Plot
from pipeline.config.study import Ablation, Study


class AxisPlot(Plot):
    """A plot with the value of the keys `x` on its axis. Each variant has a place of its own; others would be averaged."""

    takes_x = True
    shows_references = True

    @abstractmethod
    def place(self, study: Study, ablation: Ablation, variant: str) -> object:
        """What must differ between variants."""

    def check_value(self, study: Study, ablation: Ablation, variant: str) -> Iterator[str]:
        """Yield why the value of a variant has no place on the axis."""
        yield from ()

    def check(self, study: Study, ablation: Ablation) -> Iterator[str]:
        places: dict[object, str] = {}
        subject = f"x = {json.dumps(ablation.x)}"
        for variant in trained_variants(study, ablation):
            problems = [*_check_keys(study, ablation, variant)] or [*self.check_value(study, ablation, variant)]
            yield from (f"{subject}: {problem}" for problem in problems)
            if not problems:
                first = places.setdefault(self.place(study, ablation, variant), variant)
                if first != variant:
                    yield f"{subject}: has the same value for variants {first!r} and {variant!r}"


def trained_variants(study: Study, ablation: Ablation) -> list[str]:
    """The variants of the figure without constructions, which have no keys."""
    return [v for v in shown_variants(ablation) if not isinstance(study.variants[v], ConstructionConfig)]


def axis_value(study: Study, ablation: Ablation, variant: str) -> Any:
    """The value of a variant on the axis; it is the same for all keys of `x`."""
    return variant_value(study, variant, ablation.x_keys[0])


def _check_keys(study: Study, ablation: Ablation, variant: str) -> Iterator[str]:
    known = variant_keys(study, variant)
    if missing := [key for key in ablation.x_keys if key not in known]:
        yield from (f"variant {variant!r} has no key {key!r}" + nearest(key, known) for key in missing)
        return
    values = {key: json.dumps(variant_value(study, variant, key)) for key in ablation.x_keys}
    if len(set(values.values())) > 1:
        shown = ", ".join(f"{key} = {value}" for key, value in values.items())
        yield f"variant {variant!r} must have the same value in all of these keys, but has {shown}"
