"""The family of a model."""

import pytest

from cat.mixers.registry import ConstructionConfig, model_config
from pipeline.reporting.families import ATTENTION, CAT, CONSTRUCTION, HYBRID, RECURRENT, family

ATTEND = {"mixer": "attention", "heads": 1, "qk_norm": True}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (ATTEND, ATTENTION),
        (ATTEND | {"conv_k": 4}, CAT),
        (ATTEND | {"token_shift": True}, CAT),
        (ATTEND | {"canon": "A"}, CAT),
        ({"mixer": "multi_token", "heads": 1}, CAT),
        ({"mixer": "linear", "heads": 1, "conv_k": 4}, RECURRENT),
        ({"mixer": "mamba"}, RECURRENT),
        ({"mixer": ["mamba", ATTEND | {"conv_k": 4}], "layers": 2}, HYBRID),
    ],
)
def test_family(settings, expected):
    assert family(model_config(**{"width": 16, "layers": 1} | settings)) == expected


def test_a_construction_is_a_family_of_its_own():
    assert family(ConstructionConfig(placement="k")) == CONSTRUCTION
