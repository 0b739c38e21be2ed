"""Run the checks of a mixer on the examples in its folder."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch

from cat.config import MixerConfig
from cat.mixers.build import mixer_layer
from cat.mixers.checks import CHECKS, FOLDER_CHECKS
from cat.mixers.registry import UnknownMixerError, mixer_examples
from pipeline.config.errors import ParamsError, printable


class Result(NamedTuple):
    """The result of one check."""

    passed: bool
    line: str


def check_mixer(name: str) -> Iterator[Result]:
    """Run every check of a mixer on all its examples.

    `name` is that of a folder in cat/mixers/, or the import path of a package.

    Raises ParamsError if there is no such mixer, or if its configuration, layer or examples cannot be loaded.
    """
    torch.set_num_threads(1)  # the examples are tiny
    examples = _load(name)
    for check in CHECKS.values():
        yield _run(check.__name__, {example: partial(check, config) for example, config in examples.items()})
    for folder_check in FOLDER_CHECKS.values():
        yield _run(folder_check.__name__, {"": partial(folder_check, name)})


def summary(name: str, results: Iterable[Result]) -> str:
    passed = [result.passed for result in results]
    return f"{name} passes {'all' if all(passed) else f'{sum(passed)} of'} {len(passed)} checks"


def _load(name: str) -> dict[str, MixerConfig]:
    try:
        examples = mixer_examples(name)
        mixer_layer(name)
    except UnknownMixerError as error:
        near = difflib.get_close_matches(name, error.known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ParamsError([f"{name}: {error}{hint}"]) from None
    except Exception as error:  # the code in the folder is somebody's own
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ParamsError([f"{name}: {kind}{_one_line(error)}"]) from error
    return examples


def _run(title: str, calls: dict[str, Callable[[], None]]) -> Result:
    """Run a check on every example; the line has the first failure and the number of the others."""
    failures = []
    for example, call in calls.items():
        try:
            call()
        except AssertionError as failure:
            failures.append(f"{example}: {_one_line(failure)}" if example else _one_line(failure))
        except Exception as error:  # a fault of the mixer
            failures.append(f"{example}: {type(error).__name__}: {_one_line(error)}".removeprefix(": "))
    title = title.replace("_", " ")
    if not failures:
        return Result(True, f"ok      {title}")
    others = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
    return Result(False, f"FAILED  {title}: {failures[0]}{others}")


def _one_line(error: Exception) -> str:
    return printable(" ".join(str(error).split()))[:300]
