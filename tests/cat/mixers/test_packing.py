"""Documents as rows: which rows, how many calls, gradients, and the masks that are refused. Every mixer: test_mixers.py."""

import pytest
import torch

from cat.mixers.packing import MAX_PADDING, MIN_PADDING, align_prompts, pack
from tests.helpers.mixers import EXAMPLES, WIDTH, build
from tests.helpers.reference import close, normal

LENGTH = 13


@pytest.fixture
def no_waste(monkeypatch):
    """Little padding also in small batches."""
    monkeypatch.setattr("cat.mixers.packing.MIN_PADDING", 0)


def ids_of(*rows):
    """The segment ids of documents with these lengths."""
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])


def sums(projected, positions=None):
    """The simplest `mix`."""
    assert positions is None
    return projected.cumsum(1)


def tokens_of(packing):
    """The tokens of each row of a packing, without its padding."""
    is_own = torch.ones(len(packing.rows.token), dtype=torch.bool).index_fill(0, packing.rows.unused, False)
    sizes = [length for rows, length in packing.rows.groups for _ in range(rows)]
    both = zip(packing.rows.token.split(sizes), is_own.split(sizes), strict=True)
    return [token[own].tolist() for token, own in both]


@pytest.mark.parametrize(
    ("mask", "groups"),
    [
        ([[1, 1, 1, 1], [1, 1, 1, 1]], "none"),
        ([[1, 1, 0, 0], [0, 0, 0, 0]], "in place"),
        ([[0, 1, 1, 1], [1, 1, 1, 1]], [(2, 4)]),
        ([[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]], [(2, 2)]),
        ([[0, 0, 0, 1], [1, 1, 1, 0]], [(1, 3), (1, 1)]),
    ],
)
def test_a_padded_batch_is_moved_only_if_padding_is_on_the_left(mask, groups, no_waste):
    packing = pack(torch.zeros(len(mask), 4, 3), torch.tensor(mask), None)
    if groups == "none":
        assert packing is None
    elif groups == "in place":
        assert packing.rows is None
    else:
        assert packing.rows.groups == groups


def test_one_document_per_row_is_no_packing():
    assert pack(torch.zeros(3, 5, 2), None, torch.tensor([7, 7, -1])[:, None].expand(-1, 5)) is None
    assert pack(torch.zeros(0, 5, 2), None, torch.zeros(0, 5, dtype=torch.long)) is None


def test_each_document_is_the_start_of_a_row_and_longer_ones_come_first():
    packing = pack(torch.zeros(2, 6, 1), None, ids_of([2, 3, 1], [4, 2]))
    assert tokens_of(packing) == [[6, 7, 8, 9], [2, 3, 4], [0, 1], [10, 11], [5]]
    assert packing.positions.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    assert packing.longest == 4


def test_equal_lengths_need_no_padding_and_unequal_ones_little():
    assert pack(torch.zeros(2, 12, 1), None, ids_of([4, 4, 4], [4, 4, 4])).rows.groups == [(6, 4)]
    lengths = torch.randint(1, 50, (2, 40), generator=torch.Generator().manual_seed(0))
    ids = [row.repeat_interleave(size)[:800] for row, size in zip(torch.arange(40).expand(2, -1), lengths, strict=True)]
    packing = pack(torch.zeros(2, 800, 1), None, torch.stack(ids))
    rows = tokens_of(packing)
    assert sorted(token for row in rows for token in row) == list(range(1600))
    first = 0
    for count, length in packing.rows.groups:
        used = sum(map(len, rows[first : first + count]))
        assert count * length - used <= max(MAX_PADDING * count * length, MIN_PADDING)
        assert length == len(rows[first])
        first += count
    assert 1 < len(packing.rows.groups) < 12


def test_a_group_is_one_call(no_waste):
    calls = []

    def mix(projected, positions):
        calls.append(tuple(projected.shape))
        return sums(projected)

    packing = pack(torch.zeros(2, 7, 1), None, ids_of([2, 5], [6, 1]))
    packing.mix(mix, torch.zeros(2, 7, 4))
    assert calls == [(2, 6, 4), (1, 2, 4), (1, 1, 4)]


@pytest.mark.parametrize("where", ["segment_ids", "attention_mask"])
def test_moves_have_first_and_second_gradients(where, no_waste):
    ids = ids_of([2, 3, 1], [5, 1])
    options = {where: ids if where == "segment_ids" else ids == 1}
    packing = pack(ids, options.get("attention_mask"), options.get("segment_ids"))
    x = normal(2, 6, 2).requires_grad_()

    def mixed(x):
        return packing.mix(lambda rows, positions: sums(rows.square()), x)

    torch.autograd.gradcheck(mixed, x)
    torch.autograd.gradgradcheck(mixed, x)


def test_vmap_moves_every_batch(no_waste):
    packing, x = pack(torch.zeros(2, 6), None, ids_of([2, 3, 1], [5, 1])), normal(3, 2, 6, 2)
    close(torch.vmap(lambda part: packing.mix(sums, part))(x), torch.stack([packing.mix(sums, part) for part in x]))


@pytest.mark.parametrize("mask", ["left", "right", "packed"])
def test_outputs_at_positions_are_those_of_all(mask):
    mixer, x = build(EXAMPLES["attention_all"], LENGTH), normal(2, 9, WIDTH)
    options = {
        "left": {"attention_mask": torch.tensor([[0] * 4 + [1] * 5, [1] * 9])},
        "right": {"attention_mask": torch.tensor([[1] * 4 + [0] * 5, [1] * 9])},
        "packed": {"segment_ids": ids_of([3, 6], [8, 1])},
    }[mask]
    positions = torch.tensor([[0, 2, 5, 8], [1, 3, 4, 8]])
    close(mixer(x, positions, **options), mixer(x, **options)[torch.arange(2)[:, None], positions])


def test_padding_on_either_side_and_integers_of_any_dtype(no_waste):
    mixer, x = build(EXAMPLES["attention_all"], LENGTH), normal(3, 9, WIDTH)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1, 1]])
    expected = torch.zeros_like(x)
    for row, part in enumerate([slice(2, 6), slice(2), slice(6, 9)]):
        expected[row, part] = mixer(x[row : row + 1, part])[0]
    for dtype in (torch.bool, torch.uint8, torch.int32, torch.int64):
        close(mixer(x, attention_mask=mask.to(dtype)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention_mask": [[1, 1, 1]]}, r"attention_mask has shape \(1, 3\), not \(2, 3\)"),
        ({"attention_mask": [[[[1, 1, 1]]]]}, r"attention_mask has shape \(1, 1, 1, 3\), not \(2, 3\)"),
        ({"segment_ids": [[1, 1], [1, 1]]}, r"segment_ids has shape \(2, 2\), not \(2, 3\)"),
        ({"attention_mask": [[1.0, 1, 1]] * 2}, "attention_mask has dtype torch.float32, not bool or an integer"),
        ({"segment_ids": [[1j, 1, 1]] * 2}, "segment_ids has dtype torch.complex64, not bool or an integer"),
        ({"attention_mask": [[1, 1, 1], [0, -1, 1]]}, "attention_mask has other values than 0 and 1"),
        ({"attention_mask": [[1, 1, 1], [1, 0, 1]]}, "attention_mask has padding between the tokens of row 1"),
        ({"segment_ids": [[1, 1, 1], [5, 0, 5]]}, "segment_ids has 5 again after another id in row 1"),
        (
            {"attention_mask": [[1] * 3] * 2, "segment_ids": [[1] * 3] * 2},
            "attention_mask and segment_ids are both given. Fix: give segment_ids only",
        ),
    ],
)
def test_an_invalid_mask_is_an_error_that_names_it(options, message):
    mixer = build(EXAMPLES["attention"], LENGTH)
    with pytest.raises(ValueError, match=message):
        mixer(normal(2, 3, WIDTH), **{name: torch.tensor(value) for name, value in options.items()})


def test_prompts_move_to_the_right_and_back():
    x = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    prompts = align_prompts(x, torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [0, 1, 1, 0]]))
    assert prompts.padding.tolist() == [2, 1, 2]
    assert prompts.align(x).tolist() == [[0, 0, 1, 2], [0, 6, 7, 8], [0, 0, 10, 11]]
    moved = prompts.align(x).double()[..., None]
    assert prompts.restore(moved)[..., 0].tolist() == [[1, 2, 0, 0], [0, 6, 7, 8], [0, 10, 11, 0]]
    assert align_prompts(x, torch.ones(3, 4, dtype=torch.long)) is None
    with pytest.raises(ValueError, match="attention_mask has no token in row 1"):
        align_prompts(x, torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 0]]))
