"""Causal filters: y_i = sum_{j < W} F_j x_{i - j dilation}, with zeros before the first token (arXiv 2407.05591, section 2).

One filter a head has the same taps for every channel of it, so that filtering commutes with the projection of the head. One
filter a channel is the depthwise convolution; filters from every head to every head are those of multi-head CAT.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation, fold, operand
from cat.ops.conv import torch_backend
from cat.types import (
    Asked,
    ChannelFilter,
    GroupedFilter,
    GroupedHeads,
    HeadFilter,
    HeadMixingFilter,
    Heads,
    Queries,
    Replicated,
    Sources,
    StackedFilter,
    StackedHeads,
)


class Limits(NamedTuple):
    """Which of three algorithms applies a filter. They agree to rounding; that of the FFT, unlike the others', is not causal.

    At most `taps` taps are summed as shifted copies, unless the sequence has at most `tokens` tokens and either fewer than `part`
    of them a tap, or numbers times tokens below `work`. Any other filter is a Toeplitz matrix up to `tokens` tokens, and applied
    by FFT beyond.
    """

    taps: int
    tokens: int
    part: int = 0
    work: int = 0


class Tuning(NamedTuple):
    """The limits where shifted copies are summed by PyTorch and where by loops: measured on one CPU thread, with gradients."""

    passes: Limits
    loops: Limits

    def here(self, x: Tensor) -> Limits:
        """Those where `x` is; a kernel sums the taps of short sequences as well."""
        if _looped(x):
            return self.loops
        return self.passes if _of(x) is torch_backend else self.passes._replace(part=0)


MATRIX = 1024
"""The longest sequence for which the matrix of a filter is written out to take some of its rows."""
OF_HEADS = Tuning(Limits(12, 128, part=24), Limits(32, 128, work=12 << 20))
OF_CHANNELS = Tuning(Limits(12, 96, part=2), Limits(32, 96))
OF_MIXING = Limits(12, 96, part=16)


def filter_heads(x: Heads, taps: HeadFilter, *, dilation: int = 1) -> Heads:
    """Filters head h of `x` (B, H, L, C) along L with row h of `taps` (H, W); any W >= 1, longer than L too."""
    return _filter(x, taps[:, None], dilation, OF_HEADS.here(x), _by_shifts, _by_matrix_a_head, _by_fft)


def filter_heads_at(x: Heads, taps: HeadFilter, at: Asked, *, dilation: int = 1) -> Queries:
    """`filter_heads` at positions `at` alone: these rows of the filter's matrix times `x`."""
    length = x.shape[2]
    matrix = toeplitz(_reaching(taps, length, dilation), length)
    rows = F.embedding(at, matrix.transpose(0, 1).flatten(1)).unflatten(2, (len(taps), length))
    return rows.transpose(1, 2) @ x


def few(x: Heads, at: Asked) -> bool:
    """Whether `filter_heads_at` is faster than the filter at every position: its matrix must be small beside `x`."""
    return x.shape[2] <= MATRIX and 2 * at.shape[1] <= x.shape[2]


def filter_channels(x: Heads, taps: ChannelFilter, *, dilation: int = 1) -> Heads:
    """Filters channel c of head h of `x` (B, H, L, C) along L with `taps[h, c]`."""
    # Loops are faster than a small product a channel, however many the taps.
    by_matrix = functools.partial(_by_shifts, dilation=1) if _looped(x) else _by_matrix_a_channel
    return _filter(x, taps, dilation, OF_CHANNELS.here(x), _by_shifts, by_matrix, _by_fft)


def filter_groups(x: GroupedHeads, taps: GroupedFilter, *, dilation: int = 1) -> tuple[Heads, ...]:
    """`filter_heads`, or `filter_channels`, of each of up to three groups, at once: faster if `few_taps`."""
    return tuple(y.squeeze(0) for y in _Shifts.apply(operand(x)[None], operand(taps)[None], dilation))


def few_taps(x: Float[Tensor, "B L _"], taps: Tensor, channels: int, *, dilation: int = 1) -> bool:
    """Whether taps (H, W) or (H, C, W) are so few that they are summed, for tokens of so many `channels` in all heads."""
    numbers = x.shape[0] * x.shape[1] * channels
    return _short(taps, x.shape[1], numbers, dilation, (OF_HEADS if taps.dim() == 2 else OF_CHANNELS).here(x))


def mix_heads(x: Sources, taps: HeadMixingFilter, *, dilation: int = 1) -> Heads:
    """Head h of the outcome is the sum over heads g of `x` (B, G, L, C), filtered with `taps[h, g]`."""
    return _filter(x, taps, dilation, OF_MIXING, _mix_by_shifts, _mix_by_matrix, _mix_by_fft)


def naive_filter_heads(x: Heads, taps: HeadFilter, *, dilation: int = 1) -> Heads:
    """The definition, one output and one tap at a time; the twin that `filter_heads` is tested against."""
    return naive_mix_heads(x, torch.diag_embed(taps.mT).movedim(0, -1), dilation=dilation)


def naive_filter_channels(x: Heads, taps: ChannelFilter, *, dilation: int = 1) -> Heads:
    """The definition, a channel at a time."""
    channels = [naive_filter_heads(x[..., c : c + 1], taps[:, c], dilation=dilation) for c in range(x.shape[3])]
    return torch.cat(channels, dim=3)


def naive_mix_heads(x: Sources, taps: HeadMixingFilter, *, dilation: int = 1) -> Heads:
    """The definition, one output and one tap at a time."""
    outputs = []
    for i in range(x.shape[2]):
        reach = [j for j in range(taps.shape[2]) if j * dilation <= i]
        outputs.append(torch.stack([taps[:, :, j] @ x[:, :, i - j * dilation] for j in reach]).sum(0))
    return torch.stack(outputs, dim=2)


def toeplitz(taps: Float[Tensor, "*rows W"], length: int) -> Float[Tensor, "*rows L L"]:
    """The matrices T with T[..., i, i - j] = taps[..., j]: filters as causal linear maps."""
    # Windows of [0 .. 0, F_0 .. F_{W-1}, 0 .. 0], each one step further than the last; reversed, they are the rows of T.
    padded = F.pad(taps, (length - 1, length - taps.shape[-1]))
    return padded.unfold(-1, length, 1).flip(-1)


def spaced(taps: Tensor, dilation: int) -> Tensor:
    """The same filter with every tap written out, those between two taps zero."""
    if dilation == 1:
        return taps
    return F.pad(taps[..., None], (0, dilation - 1)).flatten(-2)[..., : 1 - dilation]


def _filter(
    x: Sources,
    taps: Tensor,
    dilation: int,
    limits: Limits,
    by_shifts: Callable[[Sources, Tensor, int], Heads],
    by_matrix: Callable[[Sources, Tensor], Heads],
    by_fft: Callable[[Sources, Tensor], Heads],
) -> Heads:
    x, taps, length = operand(x), operand(taps), x.shape[2]
    if _short(taps, length, x.numel(), dilation, limits):
        return by_shifts(x, taps, dilation)
    taps = _reaching(taps, length, dilation)
    return by_matrix(x, taps) if length <= limits.tokens else by_fft(x, taps)


def _reaching(taps: Tensor, length: int, dilation: int) -> Tensor:
    """Every tap written out, but those that reach back beyond the first token."""
    return spaced(taps[..., : -(-length // dilation)], dilation)


def _short(taps: Tensor, length: int, numbers: int, dilation: int, limits: Limits) -> bool:
    """Whether they are summed as shifted copies."""
    width = taps.shape[-1]
    by_matrix = length <= limits.tokens and (width * limits.part > length or numbers * length < limits.work)
    return width <= min(limits.taps, -(-length // dilation)) and not by_matrix


def _by_shifts(x: Heads, taps: ChannelFilter, dilation: int) -> Heads:
    return _Shifts.apply(x[None, None], taps[None, None], dilation)[0].squeeze(0)


class _Shifts(Operation):
    """The sum of a few shifted copies, of each of the groups. What vmap maps over are replicas."""

    @staticmethod
    def forward(x: StackedHeads, taps: StackedFilter, dilation: int) -> tuple[Replicated, ...]:
        return _of(x).filter_stacks(x, taps, dilation).unbind(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[StackedHeads, StackedFilter, int], output: tuple[Replicated, ...]) -> None:
        x, taps, ctx.dilation = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Replicated) -> tuple[StackedHeads, StackedFilter, None]:
        return *_ShiftGradients.apply(*ctx.saved_tensors, ctx.dilation, *gradients), None

    @staticmethod
    def vmap(
        info: Any, mapped: tuple[int | None, ...], x: Tensor, taps: Tensor, dilation: int
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        stacks, rows = (fold(t, axis, info.batch_size, into=0) for t, axis in zip((x, taps), mapped, strict=False))
        outputs = _Shifts.apply(stacks, rows, dilation)
        return tuple(y.unflatten(0, (info.batch_size, -1)) for y in outputs), (0,) * len(outputs)


class _ShiftGradients(Operation):
    """Those of `_Shifts`; an operation too, or torch.vmap would not take gradients of one sequence after the other."""

    @staticmethod
    def forward(
        x: StackedHeads, taps: StackedFilter, dilation: int, *gradients: Replicated
    ) -> tuple[StackedHeads, StackedFilter]:
        return _of(x).filter_gradients(x, taps, gradients, dilation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, mapped: tuple[int | None, ...], x: Tensor, taps: Tensor, dilation: int, *gradients: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        tensors, axes = (x, taps, *gradients), (*mapped[:2], *mapped[3:])
        x, taps, *others = (fold(t, axis, info.batch_size, into=0) for t, axis in zip(tensors, axes, strict=True))
        of_x, of_taps = _ShiftGradients.apply(x, taps, dilation, *others)
        return (of_x.unflatten(0, (info.batch_size, -1)), of_taps.unflatten(0, (info.batch_size, -1))), (0, 0)


def _of(x: Tensor) -> ModuleType:
    """The module that sums shifted copies where `x` is. Numba takes time to import, and many models have no filters."""
    if _looped(x):
        from cat.ops.conv import numba_backend

        return numba_backend
    return _kernels() if x.is_cuda else torch_backend


def _looped(x: Tensor) -> bool:
    """Whether loops do that; torch.compile sees through none of Numba's."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


@functools.cache
def _kernels() -> ModuleType:
    """cat.kernels; cat.shifts where there is no Triton, which comes with PyTorch for a GPU on Linux."""
    try:
        return importlib.import_module("cat.ops.conv.triton_backend")
    except ImportError:
        return torch_backend


def _by_matrix_a_head(x: Heads, taps: ChannelFilter) -> Heads:
    return toeplitz(taps[:, 0], x.shape[2]) @ x


def _by_matrix_a_channel(x: Heads, taps: ChannelFilter) -> Heads:
    return (toeplitz(taps, x.shape[2]) @ x.permute(1, 3, 2, 0)).permute(3, 0, 2, 1)


def _by_fft(x: Heads, taps: ChannelFilter) -> Heads:
    if x.numel() == 0:  # MKL takes none
        return x * taps.sum()
    narrow = torch.promote_types(x.dtype, taps.dtype)
    wide = torch.promote_types(narrow, torch.float32)  # there is no FFT of bfloat16
    return _Fourier.apply(x.to(wide), taps.to(wide))[0].to(narrow)


class _Fourier(Operation):
    """Products of spectra, which are kept: the gradient takes three real transforms, where PyTorch's own takes complex ones."""

    @staticmethod
    def forward(x: Heads, taps: ChannelFilter) -> tuple[Heads, Tensor, Tensor]:
        """The outputs, and the conjugate spectra of both."""
        size = _fast_size(x.shape[2] + taps.shape[2] - 1)
        of_x, of_taps = torch.fft.rfft(x.mT, n=size), torch.fft.rfft(taps, n=size)
        y = torch.fft.irfft(of_x * of_taps, n=size)[..., : x.shape[2]].mT
        return y.contiguous(), of_x.conj_physical_(), of_taps.conj_physical_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Heads, ChannelFilter], output: tuple[Heads, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])
        ctx.width = inputs[1].shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Heads, *_: None) -> tuple[Heads, ChannelFilter]:
        of_x, of_taps = ctx.saved_tensors
        length = gradient.shape[2]
        size = _fast_size(length + ctx.width - 1)
        spectrum = torch.fft.rfft(gradient.mT, n=size)
        back = torch.fft.irfft(spectrum * of_taps, n=size)[..., :length].mT
        correlation = spectrum.mul_(of_x).sum_to_size(of_taps.shape)
        return back, torch.fft.irfft(correlation, n=size)[..., : ctx.width]

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], x: Tensor, taps: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        heads = fold(x, mapped[0], info.batch_size, into=1), fold(taps, mapped[1], info.batch_size, into=0)
        y, of_x, of_taps = _Fourier.apply(*heads)
        unfolded = y.unflatten(1, (info.batch_size, -1)), of_x.unflatten(1, (info.batch_size, -1))
        return (*unfolded, of_taps.unflatten(0, (info.batch_size, -1))), (1, 1, 0)


def _mix_by_shifts(x: Sources, taps: HeadMixingFilter, dilation: int) -> Heads:
    return _MixedShifts.apply(x, taps, dilation)


class _MixedShifts(Operation):
    """One product with the shifted copies of all heads, forwards and for each gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Sources, taps: HeadMixingFilter, dilation: int) -> Heads:
        span = (taps.shape[2] - 1) * dilation
        return (taps.flip(2).flatten(1) @ _shifted(F.pad(x, (0, 0, span, 0)), taps, dilation)).unflatten(2, x.shape[2:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Sources, HeadMixingFilter, int], output: Heads) -> None:
        x, taps, ctx.dilation = inputs
        ctx.save_for_backward(x, taps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Heads) -> tuple[Sources, HeadMixingFilter, None]:
        x, taps = (saved.to(gradient.dtype) for saved in ctx.saved_tensors)  # as autocast did
        span = (taps.shape[2] - 1) * ctx.dilation
        later = _shifted(F.pad(gradient, (0, 0, 0, span)), taps, ctx.dilation)
        of_x = (taps.transpose(0, 1).flatten(1) @ later).unflatten(2, x.shape[2:])
        of_taps = (x.flatten(2) @ later.mT).sum(0).unflatten(1, (len(taps), -1)).transpose(0, 1)
        return of_x, of_taps, None


def _shifted(padded: Float[Tensor, "B N P C"], taps: HeadMixingFilter, dilation: int) -> Float[Tensor, "B NW LC"]:
    """Of each head as many copies as there are taps, each begun `dilation` tokens later."""
    rows, step = padded.flatten(2), dilation * padded.shape[3]
    return rows.unfold(2, rows.shape[2] - (taps.shape[2] - 1) * step, step).flatten(1, 2)


def _mix_by_matrix(x: Sources, taps: HeadMixingFilter) -> Heads:
    # One matrix over heads and tokens: (H L) x (G L).
    matrix = toeplitz(taps, x.shape[2]).transpose(1, 2).flatten(2).flatten(0, 1)
    return (matrix @ x.flatten(1, 2)).unflatten(1, (-1, x.shape[2]))


def _mix_by_fft(x: Sources, taps: HeadMixingFilter) -> Heads:
    if x.numel() == 0:  # MKL takes none
        return x[:, :1].expand(-1, len(taps), -1, -1) * taps.sum()
    length = x.shape[2]
    size = _fast_size(length + taps.shape[2] - 1)
    spectrum = torch.einsum("hgf,bgfc->bhfc", _spectrum(taps, size, dim=-1), _spectrum(x, size, dim=2))
    return _tokens(spectrum, size, length).to(torch.promote_types(x.dtype, taps.dtype))


def _fast_size(size: int) -> int:
    """The smallest number from `size` on that is a power of two times 1, 3, 5, 9 or 15: transforms of primes are slow."""
    return min(odd << (-(-size // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


def _spectrum(x: Float[Tensor, "*shape"], size: int, *, dim: int) -> Tensor:
    """In float32 at least: there is no FFT of bfloat16, and on a GPU autocast leaves it as it is."""
    return torch.fft.rfft(x.to(torch.promote_types(x.dtype, torch.float32)), n=size, dim=dim)


def _tokens(spectrum: Tensor, size: int, length: int) -> Tensor:
    """The first `length` tokens of what has this spectrum along axis 2."""
    # The transform leaves the tokens of a channel side by side in memory: attention has no fast kernel for that.
    return torch.fft.irfft(spectrum, n=size, dim=2)[:, :, :length].contiguous()
