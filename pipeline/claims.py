"""claims.yaml: what the study is asked to decide, its rules, and its errors, one line each. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML, YAMLError

from cat.configuration import Configuration, Count
from pipeline.params import Name, ParamsError

FILE = Path("claims.yaml")
Multiple = Annotated[float, Field(gt=0)]
Names = Annotated[tuple[Name, ...], Field(min_length=1, strict=False)]


class Claim(Configuration):
    """A sentence and what decides it: of every task, length and pair of variants the effect is beyond a threshold."""

    says: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029|]+$")]
    source: Literal["paper", "ours"]
    tasks: Names
    multiples: Annotated[tuple[Multiple, ...], Field(min_length=1, strict=False)]
    metric: str | None = None
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
    try:
        raw: Any = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, RecursionError, YAMLError) as error:
        raise ParamsError([f"{path}: " + " ".join(str(error).split())]) from None
    try:
        return TypeAdapter(dict[Name, Claim]).validate_python({} if raw is None else raw)
    except ValidationError as error:
        lines = {_in_words(fault) for fault in error.errors()}
        raise ParamsError([f"{path}: {line}" for line in sorted(lines)]) from None


def _in_words(fault: Any) -> str:
    # pydantic names the branch of a union, too: `than` may be a list or a number.
    key = ".".join(str(step) for step in fault["loc"][:2]) or "the file"
    match fault["type"]:
        case "missing":
            return f"{key}: is missing"
        case "extra_forbidden":
            return f"{key}: unknown key; known are {', '.join(Claim.model_fields)}"
        case "value_error":
            return f"{key}: {fault['ctx']['error']}"
    return f"{key}: {fault['msg'].replace('Input should be', 'must be')}, not {fault['input']!r:.60}"
