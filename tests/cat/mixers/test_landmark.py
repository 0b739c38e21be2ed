"""Tests of landmark attention: its operation, its landmarks, and its mixer."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cat.mixers.landmark.op import block_ends, in_tiles, landmark_attend, naive_landmark_attend
from cat.ops.position import rotate
from tests.helpers.mixers import HEADS, QKV, WIDTH, build, hidden
from tests.helpers.reference import assert_matches_reference, close, normal

LANDMARK = {"mixer": "landmark", "heads": 3, "block": 5, "top": 2}


@pytest.mark.parametrize("ratio", [0, 100])  # queries sorted by window, and one product with all windows
@pytest.mark.parametrize(("top", "reach"), [(1, 2), (2, 0), (2, 2), (2, 5), (7, 5)])
@pytest.mark.parametrize("length", [6, 10, 23])  # a single block is dense attention
@pytest.mark.parametrize("at_positions", [False, True])
def test_landmark_attention_matches_its_reference_implementation(length, top, reach, ratio, at_positions, monkeypatch):
    monkeypatch.setattr("cat.mixers.landmark.op.DENSE_RATIO", {"all": ratio, "positions": ratio})
    lengths = 3 if at_positions else length, length, length, length // 5
    inputs = [normal(2, 3, tokens, 7, seed=s) for s, tokens in enumerate(lengths)]
    positions = torch.tensor([[0, length // 2, length - 1], [length // 3, length // 2, length - 1]]) if at_positions else None
    options = {"scale": 0.7, "block": 5, "top": top, "reach": reach, "positions": positions}
    assert_matches_reference(partial(landmark_attend, **options), partial(naive_landmark_attend, **options), *inputs)


@pytest.mark.parametrize(("block", "top"), [(23, 1), (3, 7), (5, 100), (1, 22)])
@pytest.mark.parametrize("position", ["none", "rotary"])
def test_landmark_attention_to_every_block_is_dense(block, top, position):
    options = {**QKV, "position": position, "conv_q": 3, "conv_k": "full", "conv_v": 2, "qk_norm": position == "rotary"}
    landmark = build({"mixer": "landmark", **options, "block": block, "top": top, "conv_summary": 3}, 23)
    dense = build({"mixer": "attention", **options}, 23)
    dense.load_state_dict({name: weight for name, weight in landmark.state_dict().items() if "summary" not in name})
    assert_matches_reference(landmark, dense, hidden(23))


@pytest.mark.parametrize("top", [1, 3])
def test_a_query_attends_to_its_own_block_and_the_best_earlier_blocks(top):
    block, length = 5, 33
    q, k, v = (normal(1, 1, length, 7, seed=s).requires_grad_() for s in range(3))
    landmarks = normal(1, 1, length // block, 7, seed=3)
    out = landmark_attend(q, k, v, landmarks, scale=1.0, block=block, top=top, reach=0)[0, 0].sum(-1)
    for i in range(length):
        own = i // block
        matches = [(landmarks[0, 0, n] @ q[0, 0, i]).item() for n in range(own)]
        best = sorted(range(own), key=lambda n: -matches[n])[:top]
        expected = [j // block == own or j // block in best for j in range(i + 1)] + [False] * (length - i - 1)
        assert (torch.autograd.grad(out[i], v, retain_graph=True)[0][0, 0].abs().sum(-1) > 0).tolist() == expected


def test_soft_training_has_the_grouped_softmax_of_all_blocks_and_inference_chooses():
    block, length = 5, 23
    mixer = build({**LANDMARK, "train_on": "all", "top": 1}, length)
    q, k, v, landmarks = mixer.prepare(mixer.project(hidden(length)))
    scores, matches = mixer.scale * q @ k.mT, mixer.scale * q @ landmarks.mT
    expected = torch.zeros_like(scores)
    for i in range(length):
        start = i // block * block
        shares = torch.cat([scores[:, :, i, start : i + 1], matches[:, :, i, : i // block]], dim=-1).softmax(-1)
        expected[:, :, i, start : i + 1] = shares[..., : i + 1 - start]
        for n, share in enumerate(shares[..., i + 1 - start :].unbind(-1)):
            tokens = slice(n * block, (n + 1) * block)
            expected[:, :, i, tokens] = share[..., None] * scores[:, :, i, tokens].softmax(-1)
    close(mixer.attend(q, k, v, landmarks), expected @ v)
    chosen = mixer.eval().attend(q, k, v, landmarks)
    close(chosen[:, :, : 2 * block], (expected @ v)[:, :, : 2 * block])  # there is at most one earlier block
    assert not torch.allclose(chosen[:, :, 2 * block :], (expected @ v)[:, :, 2 * block :])


def test_blocks_overlap_by_the_reach_of_the_longest_kernel_and_at_most_a_block():
    filters = [
        {},
        {"conv_q": 2, "conv_v": 4},
        {"conv_k": 6},
        {"conv_k": "full"},
        {"conv_k": 3, "dilation": 2},
        {"conv_summary": 7},
    ]
    filters.append({"conv_k": "state", "filter_size": 2})
    assert [build({**LANDMARK, **filter_}, 13).reach for filter_ in filters] == [0, 3, 5, 5, 4, 0, 5]


@pytest.mark.parametrize(("dilation", "in_block"), [(1, 5), (2, 3), (5, 1)])
@pytest.mark.parametrize("sharing", ["head", "channel", "mixing"])
def test_a_summary_starts_as_the_sum_of_the_keys_of_a_block(sharing, dilation, in_block):
    mixer = build({**LANDMARK, "conv_k": 2, "conv_summary": 9, "sharing": sharing, "dilation": dilation}, 13)
    kernel = mixer.filters["summary"].kernel
    identity = torch.eye(HEADS)[..., None] if sharing == "mixing" else torch.ones(1)
    assert ((kernel[..., :in_block] - identity).abs() < 0.2).all()
    assert (kernel[..., in_block:].abs() < 0.2).all()
    k = mixer.convolve(mixer.project(hidden(13)))[1]
    landmarks = mixer.prepare(mixer.project(hidden(13)))[3]
    close(landmarks, mixer.filters["summary"](k)[:, :, [4, 9]])


def test_a_sum_of_keys_does_not_show_which_tokens_are_adjacent():
    mixer = build({**LANDMARK, "conv_k": 2, "conv_summary": 5}, 13)
    with torch.no_grad():
        mixer.filters["summary"].kernel.fill_(1)
    x = hidden(13)
    swapped = x[:, [0, 1, 2, 3, 4, 5, 7, 6, 8, 9, 10, 11, 12]]  # inside the block of tokens 5 to 9
    landmarks = [mixer.prepare(mixer.project(tokens))[3][:, :, 1] for tokens in (x, swapped)]
    assert not torch.equal(mixer.prepare(mixer.project(x))[1], mixer.prepare(mixer.project(swapped))[1])
    close(*landmarks)


def test_a_summary_is_of_unscaled_keys_and_is_then_scaled():
    mixer = build({**LANDMARK, "conv_k": 2, "conv_summary": 5, "qk_norm": True}, 13)
    _, k, _ = mixer.convolve(mixer.project(hidden(13)))
    close(mixer.prepare(mixer.project(hidden(13)))[3], F.normalize(mixer.filters["summary"](k)[:, :, [4, 9]], dim=-1))
    plain = build({**LANDMARK, "conv_k": 2, "qk_norm": True}, 13)
    close(plain.prepare(plain.project(hidden(13)))[3], plain.prepare(plain.project(hidden(13)))[1][:, :, [4, 9]])


def test_landmarks_are_rotated_by_the_positions_of_the_last_tokens_of_their_blocks():
    mixer = build({**LANDMARK, "position": "rotary", "top": 1}, 23)
    q, k, v = (normal(1, HEADS, 23, WIDTH // HEADS, seed=s) for s in range(3))
    rotated = rotate(k)
    sizes = {"scale": mixer.scale, "block": mixer.block, "top": 1, "reach": 0}
    close(mixer.attend(q, k, v), naive_landmark_attend(rotate(q), rotated, v, block_ends(rotated, mixer.block), **sizes))


def test_a_better_matching_landmark_gives_its_block_more_attention():
    q, k, v = torch.zeros(3, 1, 1, 7, 2).double()
    q[..., 6, 0], v[..., :2, 0] = 1, 1  # the last query chooses one of three blocks of two tokens; only block 0 has values
    shares = []
    for match in (1.0, 2.0):
        k[..., 1, 0] = match
        shares.append(landmark_attend(q, k, v, block_ends(k, 2), scale=1.0, block=2, top=1, reach=0)[0, 0, 6, 0].item())
    assert shares == pytest.approx([math.e / (math.e + 1), math.e**2 / (math.e**2 + 1)])


@pytest.mark.parametrize("group", [[0], [0] * 7, [2] * 21 + [4, 1], [4, 1, 4, 4, 0, 1, 4, 4, 3, 4, 4], [2, 2, 1]])
def test_each_row_has_its_own_place_in_a_tile_of_its_group(group):
    groups = 5
    place, owner, size = in_tiles(torch.tensor(group), groups)
    assert owner[place // size].tolist() == group
    assert len(set(place.tolist())) == len(group)
    assert len(owner) * size <= 4 / 3 * len(group) + groups
