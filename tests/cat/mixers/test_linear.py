"""Tests of linear attention: its operation, its features, and its mixer."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cat.mixers.linear.op import features, linear_attend, naive_linear_attend
from cat.ops.position import rotate
from tests.helpers.mixers import BATCH, EXAMPLES, WIDTH, build, hidden
from tests.helpers.reference import assert_matches_reference, close, normal


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 131])
def test_linear_attention_matches_its_reference_implementation(length, rotary):
    q, k, v = (normal(2, 3, length, 4, seed=s) for s in range(3))
    assert_matches_reference(partial(linear_attend, rotary=rotary), partial(naive_linear_attend, rotary=rotary), q, k, v)


def test_linear_attention_without_convolutions_matches_its_paper():
    mixer = build(EXAMPLES["linear"], 13)
    q, k, v = mixer.prepare(mixer.project(hidden(13)))
    weights = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril()
    heads = weights / weights.sum(-1, keepdim=True) @ v
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.o_proj.weight.T)


def test_linear_attention_rotates_its_features():
    mixer = build({**EXAMPLES["linear"], "position": "rotary"}, 13)
    q, k, v = mixer.prepare(mixer.project(hidden(13)))
    weights = (rotate(F.elu(q) + 1) @ rotate(F.elu(k) + 1).mT).tril()
    total = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT).tril().sum(-1, keepdim=True)
    heads = weights / total @ v
    close(mixer(hidden(13)), heads.permute(0, 2, 1, 3).reshape(BATCH, 13, WIDTH) @ mixer.o_proj.weight.T)


def test_features_stay_positive_if_elu_rounds_to_zero():
    x = torch.tensor([-50.0, -1.0, 0.0, 2.0, 200.0]).view(1, 1, 1, 5).requires_grad_()
    slopes = torch.autograd.grad(features(x).sum(), x)[0]
    assert features(x).flatten().tolist() == pytest.approx([math.exp(-50), math.exp(-1), 1, 3, 201], rel=1e-6, abs=0)
    assert slopes.flatten().tolist() == pytest.approx([math.exp(-50), math.exp(-1), 1, 1, 1], rel=1e-6, abs=0)
