"""Tests of multi-token attention: its operation, its relations to attention and CAT, and its configuration."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cat.mixers.base import Cache
from cat.mixers.multi_token.op import ROWS, TILE, multi_token_attend, multi_token_logits, naive_multi_token_attend
from cat.ops.conv.causal import filter_heads
from tests.helpers.mixers import HEADS, QKV, WIDTH, build, configure, hidden
from tests.helpers.reference import assert_matches_reference, close, normal

MULTI_TOKEN = {"mixer": "multi_token", **QKV}
SCALE = 0.4
KERNELS = pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5), (4, 1), (3, 5), (6, 11), (20, 3)])


def inputs(length: int, queries: int, keys: int) -> list[Tensor]:
    """q, k, v, the kernel, and the weights that mix two groups of two heads."""
    q, k, v = (normal(2, 4, length, channels, seed=seed) for seed, channels in enumerate((3, 3, 5)))
    return [q, k, v, normal(4, queries, keys, seed=3), normal(2, 2, 2, seed=4)]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("length", [1, 5, TILE + 1])
@KERNELS
def test_multi_token_attention_matches_its_reference_implementation(queries, keys, length, mixed):
    forms = (partial(form, scale=SCALE) for form in (multi_token_attend, naive_multi_token_attend))
    assert_matches_reference(*forms, *inputs(length, queries, keys)[: 5 if mixed else 4])


def test_queries_are_computed_in_blocks():
    forms = (partial(form, scale=SCALE) for form in (multi_token_attend, naive_multi_token_attend))
    assert_matches_reference(*forms, *inputs(ROWS + 5, 6, 11))


@pytest.mark.parametrize("positions", [[[4], [36]], [[0, 2], [30, 36]], [[*range(0, 37, 2)], [*range(1, 37, 2), 36]]], ids=len)
def test_outputs_at_positions_match_the_reference_implementation(positions):
    options = {"scale": SCALE, "positions": torch.tensor(positions)}
    forms = (partial(form, **options) for form in (multi_token_attend, naive_multi_token_attend))
    assert_matches_reference(*forms, *inputs(37, 3, 5))


@pytest.mark.parametrize("padding", [None, [0, 7], [19, 2]], ids=str)
@pytest.mark.parametrize("cached", [0, 2, 18])
@KERNELS
def test_the_last_tokens_match_the_reference_implementation(queries, keys, cached, padding):
    q, k, v, kernel, mixing = inputs(TILE + 5, queries, keys)
    before = q[:, :, max(0, cached - queries + 1) : cached]
    options = {"scale": SCALE, "padding": None if padding is None else torch.tensor(padding)}

    def last(form, q, before, *others):
        return form(q, *others, before=before, **options)

    forms = (partial(last, form) for form in (multi_token_attend, naive_multi_token_attend))
    assert_matches_reference(*forms, q[:, :, cached:], before, k, v, kernel, mixing)


def test_memory_is_linear_in_the_length():
    """No tensor has the logits of many queries, and none that is kept for the backward pass has those of any."""
    length = 8 * ROWS
    sizes, kept = [], {}

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, Tensor))
            return result

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    q, k, v = (torch.zeros(1, 1, length, 4, requires_grad=True) for _ in range(3))
    kernel = torch.ones(1, 6, 11, requires_grad=True)
    with Sizes(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = multi_token_attend(q, k, v, kernel, scale=SCALE)
    with Sizes():
        out.sum().backward()
    assert ROWS * length / 2 < max(sizes) <= ROWS * (length + kernel.shape[2])
    assert 3 * q.numel() < sum(kept.values()) < 10 * q.numel()


@pytest.mark.parametrize(
    "options", [{}, {"position": "rotary", "qk_norm": True}, {"conv_q": 3, "conv_k": "full", "conv_v": 2}], ids=str
)
def test_the_start_without_norm_is_the_transformer(options):
    length = 23
    mixer = build({**MULTI_TOKEN, "head_norm": False, **options}, length)
    dense = build({"mixer": "attention", **QKV, **options}, length)
    dense.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if name != "kernel"})
    assert_matches_reference(mixer, dense, hidden(length))
    mixed = build({**MULTI_TOKEN, "head_norm": False, "head_groups": 3, **options}, length)
    mixed.load_state_dict(mixer.state_dict(), strict=False)
    close(mixed(hidden(length)), dense(hidden(length)))


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_separable_kernel_is_cat_with_convolutions_on_queries_and_keys(width):
    """Where no masked pair of tokens enters: the key is no later than the first query that the kernel reaches."""
    length = 2 * TILE + 3
    q, k = (normal(2, HEADS, length, 5, seed=seed) for seed in range(2))
    f_q, f_k = (normal(HEADS, width, seed=seed) for seed in (2, 3))
    kernel = torch.zeros(HEADS, width, 2 * width - 1).double()
    kernel[..., width - 1 :] = f_q[:, :, None] * f_k[:, None]
    expected = SCALE * filter_heads(q, f_q) @ filter_heads(k, f_k).mT
    actual = multi_token_logits(q, k, kernel, scale=SCALE)
    clear = torch.ones(length, length).tril(1 - width).bool()
    close(actual[..., clear], expected[..., clear])
    masked = ~clear & torch.ones(length, length).tril().bool()
    assert width == 1 or not torch.isclose(actual[..., masked], expected[..., masked]).all()


def test_the_logits_are_the_input_of_the_softmax():
    length = TILE + 3
    mixer = build({**MULTI_TOKEN, "head_norm": False, "position": "rotary"}, length)
    mixer.kernel.data = normal(*mixer.kernel.shape, seed=1)
    q, k, v = mixer.prepare(mixer.project(hidden(length)))
    close(mixer.attend(q, k, torch.eye(length).double().expand(*v.shape[:2], -1, -1)), mixer.logits(q, k).softmax(-1))


@pytest.mark.parametrize("scale", [0.8, 0.3])
def test_the_norm_gives_every_head_the_same_size(scale):
    mixer = build({**MULTI_TOKEN, "depth_scale": scale}, 13)
    heads = mixer.attend(*mixer.prepare(mixer.project(10 * hidden(13))))
    rms = heads.square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, scale), rtol=1e-3, atol=0)


def test_the_cache_has_the_queries_that_the_next_logit_depends_on():
    mixer = build({**MULTI_TOKEN, "query_kernel": 4}, 13)
    cache = Cache()
    lengths = []
    for part in mixer.project(hidden(9)).split([2, 1, 5, 1], dim=1):
        _, cache = mixer.step(part, cache)
        lengths.append({name: x.shape[2] for name, x in cache.state.items()})
    assert [sizes["queries"] for sizes in lengths] == [2, 3, 3, 3]
    assert [sizes["keys"] for sizes in lengths] == [sizes["values"] for sizes in lengths] == [2, 3, 8, 9]


def test_only_unmixed_weights_without_norm_are_a_mean_of_values():
    plain = {**MULTI_TOKEN, "head_norm": False}
    settings = [MULTI_TOKEN, plain, {**plain, "head_groups": 3}]
    assert [configure(**options).has_attention for options in settings] == [False, True, False]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"key_kernel": 4}, "key_kernel = 4 must be odd"),
        ({"head_groups": 2}, "head_groups = 2 does not divide heads = 3"),
        ({"head_norm": False, "depth_scale": 0.5}, "depth_scale = 0.5 needs head_norm = true"),
        ({"position": "alibi"}, "position = alibi needs"),
        ({"query_kernel": 14}, "query_kernel = 14 is longer than the training length of 13"),
        ({"key_kernel": 15}, "key_kernel = 15 is longer than the training length of 13"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(options, problem):
    with pytest.raises(ValueError, match=problem):
        configure(**MULTI_TOKEN, **options).check_length(13)


def test_a_kernel_may_be_as_long_as_the_training_length():
    configure(**MULTI_TOKEN, query_kernel=13, key_kernel=13).check_length(13)
    assert build({**MULTI_TOKEN, "query_kernel": 13, "key_kernel": 13}, 13)(hidden(13)).shape == (2, 13, WIDTH)
