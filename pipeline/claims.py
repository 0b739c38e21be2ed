"""claims.yaml: what the study is asked to decide, its rules, and its errors, one line each. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cat.configuration import Configuration, Count
from pipeline.params import CELL, Name, checked, read

FILE = Path("claims.yaml")
Multiple = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]


class Claim(Configuration):
    """A sentence and what decides it: of every task, length and pair of variants the effect is beyond a threshold."""

    says: Annotated[str, Field(pattern=CELL)]
    source: Literal["paper", "ours"]
    tasks: Names
    multiples: Annotated[tuple[Multiple, ...], Field(min_length=1, strict=False)]
    metric: Name | None = None
    """As in results/<task>.csv; the metric that stands for the task for None."""
    variants: Names
    than: Names | float | None = None
    """The variants on the other side, or a number."""
    than_multiple: Multiple | None = None
    """Instead: the same variants at this length."""
    direction: Literal["higher", "lower", "not_lower", "not_higher"]
    by: Annotated[float, Field(ge=0)]
    """The smallest difference that matters, in units of the metric."""
    seeds: Annotated[Count, Field(ge=2)]
    """So many at least; fewer decide nothing."""
    figure: Name
    """The ablation whose figure shows it."""

    @model_validator(mode="after")
    def _one_other_side(self) -> Self:
        if (self.than is None) == (self.than_multiple is None):
            raise ValueError("needs either than, variants or a number, or than_multiple, a length")
        if isinstance(self.than, tuple) and (both := set(self.variants) & set(self.than)):
            raise ValueError(f"{min(both)!r} is under variants and under than")
        if self.than_multiple in self.multiples:
            raise ValueError(f"than_multiple = {self.than_multiple:g} is among multiples")
        for key in ("tasks", "multiples", "variants", "than"):
            values = getattr(self, key)
            if isinstance(values, tuple) and (twice := {value for value in values if values.count(value) > 1}):
                raise ValueError(f"{key} has {min(twice)!r} twice")
        return self

    @property
    def sign(self) -> int:
        """1 where the claim holds of effects above `threshold`, -1 where it holds of effects below."""
        return 1 if self.direction in ("higher", "not_lower") else -1

    @property
    def threshold(self) -> float:
        return {"higher": self.by, "lower": -self.by, "not_lower": -self.by, "not_higher": self.by}[self.direction]


def load(path: Path = FILE) -> dict[str, Claim]:
    """The claims by name, none where there is no such file. Raises ParamsError with every fault."""
    if not path.exists():
        return {}
    raw = read(path)
    claims: dict[str, Claim] = checked(dict[Name, Claim], {} if raw is None else raw, path)
    return claims
