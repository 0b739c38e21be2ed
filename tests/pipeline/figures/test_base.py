"""Plots with keys of the variants on their axis: one key, or several with the same value."""

import pytest

from pipeline.config.load import study_of
from pipeline.figures.base import axis_value
from pipeline.figures.drawing.axes import axis_label
from tests.pipeline.config.test_study import edited, errors_of


def test_keys_with_the_same_value_are_one_axis():
    study = study_of(edited({"ablations.width.x": ["conv_q", "conv_k"]}), "params.yaml")
    assert [axis_value(study, study.ablations["width"], variant) for variant in ("qk", "qk_full")] == [3, "full"]


@pytest.mark.parametrize(
    ("edits", "problem"),
    [
        (
            {"variants.qk.conv_k": 2},
            "variant 'qk' must have the same value in all of these keys, but has conv_q = 3, conv_k = 2",
        ),
        (
            {"variants.qk_full": {"mixer": "attention", "width": 16, "layers": 1, "heads": 2, "position": "none", "conv_q": 5}},
            "variant 'qk_full' must have the same value in all of these keys, but has conv_q = 5, conv_k = null",
        ),
        ({"variants.qk_full.conv_q": 3, "variants.qk_full.conv_k": 3}, "has the same value for variants 'qk' and 'qk_full'"),
    ],
)
def test_a_variant_has_one_value_for_all_keys(edits, problem):
    (line,) = errors_of({"ablations.width.x": ["conv_q", "conv_k"], **edits})
    assert line == f'ablations.width: x = ["conv_q", "conv_k"]: {problem}'


def test_every_key_must_exist():
    lines = errors_of({"ablations.width.x": ["conv_q", "conv_g", "conv_k"]})
    assert lines == [
        f'ablations.width: x = ["conv_q", "conv_g", "conv_k"]: variant {v!r} has no key \'conv_g\'; did you mean \'conv_v\'?'
        for v in ("qk", "qk_full")
    ]


def test_a_variant_without_the_keys_is_no_point_of_a_sweep():
    (line,) = errors_of({"ablations.width.x": ["conv_v", "filter_size"], "ablations.width.reference_variants": ["construction"]})
    assert line.endswith(
        "variant 'qk_full' does not set it."
        " Fix: set variants.qk_full.conv_v and variants.qk_full.filter_size, or remove it from variants"
    )


@pytest.mark.parametrize(
    ("x", "line"),
    [
        ([], "ablations.width.x = []: must be a valid string or must have at least 1 item"),
        (["conv_q", "conv_q"], "ablations.width: x contains 'conv_q' twice"),
        (["conv_q", 1], "ablations.width.x.1 = 1: must be a valid string"),
    ],
)
def test_a_list_of_keys_is_checked(x, line):
    assert errors_of({"ablations.width.x": x}) == [line]


@pytest.mark.parametrize(
    ("keys", "label"),
    [
        (["conv_q"], "kernel size of Q"),
        (["conv_q", "conv_k"], "kernel size of Q and K"),
        (["conv_q", "conv_k", "conv_v"], "kernel size of Q, K and V"),
        (["position"], "positional encoding"),
        (["filter_size", "conv_v"], "filter size and conv v"),
    ],
)
def test_the_label_names_all_keys(keys, label):
    assert axis_label(keys) == label
