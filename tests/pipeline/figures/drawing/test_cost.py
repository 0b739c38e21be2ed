"""Prices of a model: the state that it keeps, and its parameters."""

import math

import pandas as pd
import pytest

from cat.mixers.registry import model_config
from pipeline.config.load import load_study
from pipeline.figures.drawing import cost
from pipeline.figures.drawing.cost import _marks, parameters, state_size
from pipeline.reporting.families import ATTENTION, CAT
from tests.helpers.study import ROOT

WIDTH = {"width": 16, "layers": 1}
ATTEND = WIDTH | {"mixer": "attention", "heads": 1, "qk_norm": True}


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        (ATTEND, (2 * 16 * 32, 2 * 16 * 64)),
        (ATTEND | {"conv_k": 4}, (2 * 16 * 32 + 3 * 16, 2 * 16 * 64 + 3 * 16)),
        (WIDTH | {"mixer": "mamba"}, (2 * 16 * (16 + 3), 2 * 16 * (16 + 3))),
        (ATTEND | {"position": "learned"}, (2 * 16 * 32, math.nan)),
    ],
)
def test_attention_keeps_every_token_and_a_recurrence_a_state(settings, sizes):
    assert [state_size(model_config(**settings), 32, length) for length in (32, 64)] == pytest.approx(sizes, nan_ok=True)


def test_a_mixer_that_needs_values_is_run(monkeypatch):
    config, run = model_config(**ATTEND, activation="gelu", norm="rms"), cost._state_size

    def needs_values(config, trained, length, device):
        if device == "meta":
            raise NotImplementedError("no values")
        return run(config, trained, length, device)

    monkeypatch.setattr(cost, "_state_size", needs_values)
    assert state_size(config, 32, 32) == 2 * 16 * 32


def test_parameters_do_not_depend_on_the_vocabulary_or_the_positions():
    plain, more = model_config(**ATTEND), model_config(**ATTEND, conv_k=4)
    assert parameters(more, 32) - parameters(plain, 32) == 4
    assert parameters(model_config(**ATTEND | {"position": "learned"}), 32) == parameters(plain, 32)
    assert parameters(plain, 32) == 4 * 16 * 16 + 4 * 16 + 1  # projections, two norms with biases, a temperature


def test_variants_of_a_family_at_the_same_place_share_a_mark():
    table = pd.DataFrame({"state size": [100, 101, 102, 300], "value": [0.5, 0.5, 0.51, 0.5]}, index=["none", "k", "qk", "qkv"])
    marks = _marks(load_study(ROOT / "params.yaml"), table, "state size")
    assert [(mark.family, mark.variants) for mark in marks] == [(ATTENTION, ["none"]), (CAT, ["k", "qk"]), (CAT, ["qkv"])]
