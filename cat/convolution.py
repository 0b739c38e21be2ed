"""Causal filters: y_i = sum_{j < W} F_j x_{i - j dilation}, with zeros before the first token (arXiv 2407.05591, section 2).

One filter a head has the same taps for every channel of it, so that filtering commutes with the projection of the head. One
filter a channel is the depthwise convolution; filters from every head to every head are those of multi-head CAT.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from cat.types import ChannelFilter, HeadFilter, HeadMixingFilter, Heads

SHORT, DENSE = 12, 256
"""Fewer taps than a 12th of the sequence are summed as shifted copies; up to 256 tokens, more of them are a Toeplitz matrix.

Beyond that they are applied by FFT, whose rounding, unlike the other two's, is not causal. The three agree to rounding; which one
runs depends on the shapes alone.
"""


def filter_heads(x: Heads, taps: HeadFilter, *, dilation: int = 1) -> Heads:
    """Filters head h of `x` (B, H, L, C) along L with row h of `taps` (H, W); any W >= 1, longer than L too."""
    length = x.shape[2]
    taps = _within(taps, length, dilation)
    if length > SHORT * taps.shape[1]:
        return _by_shifts(x, taps[:, None], dilation)
    taps = _spaced(taps, dilation)
    return toeplitz(taps, length) @ x if length <= DENSE else _by_fft(x, taps[:, None])


def filter_channels(x: Heads, taps: ChannelFilter, *, dilation: int = 1) -> Heads:
    """Filters channel c of head h of `x` (B, H, L, C) along L with `taps[h, c]`."""
    length = x.shape[2]
    taps = _within(taps, length, dilation)
    if length > SHORT * taps.shape[2]:
        return _by_shifts(x, taps, dilation)
    taps = _spaced(taps, dilation)
    return (toeplitz(taps, length) @ x.permute(1, 3, 2, 0)).permute(3, 0, 2, 1) if length <= DENSE else _by_fft(x, taps)


def mix_heads(x: Heads, taps: HeadMixingFilter, *, dilation: int = 1) -> Heads:
    """Head h of the outcome is the sum over heads g of `x` (B, H, L, C), filtered with `taps[h, g]`."""
    length = x.shape[2]
    taps = _within(taps, length, dilation)
    if length > SHORT * taps.shape[2]:
        return _mix_by_shifts(x, taps, dilation)
    taps = _spaced(taps, dilation)
    if length > DENSE:
        return _mix_by_fft(x, taps)
    # One matrix over heads and tokens: (H L) x (H L).
    matrix = toeplitz(taps, length).transpose(1, 2).flatten(2).flatten(0, 1)
    return (matrix @ x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def naive_filter_heads(x: Heads, taps: HeadFilter, *, dilation: int = 1) -> Heads:
    """The definition, one output and one tap at a time; the twin that `filter_heads` is tested against."""
    return naive_mix_heads(x, torch.diag_embed(taps.mT).movedim(0, -1), dilation=dilation)


def naive_filter_channels(x: Heads, taps: ChannelFilter, *, dilation: int = 1) -> Heads:
    """The definition, a channel at a time."""
    channels = [naive_filter_heads(x[..., [c]], taps[:, c], dilation=dilation) for c in range(x.shape[3])]
    return torch.cat(channels, dim=3)


def naive_mix_heads(x: Heads, taps: HeadMixingFilter, *, dilation: int = 1) -> Heads:
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


def _within(taps: Tensor, length: int, dilation: int) -> Tensor:
    """The taps that reach back no further than the first token."""
    return taps[..., : -(-length // dilation)]


def _spaced(taps: Tensor, dilation: int) -> Tensor:
    """The same filter with every tap written out, those between two taps zero."""
    if dilation == 1:
        return taps
    return F.pad(taps[..., None], (0, dilation - 1)).flatten(-2)[..., : 1 - dilation]


def _by_shifts(x: Heads, taps: ChannelFilter, dilation: int) -> Heads:
    y = x * taps[:, None, :, 0]
    for j in range(1, taps.shape[2]):
        shift = j * dilation
        y = y + F.pad(x[:, :, :-shift] * taps[:, None, :, j], (0, 0, shift, 0))
    return y


def _by_fft(x: Heads, taps: ChannelFilter) -> Heads:
    length = x.shape[2]
    size = length + taps.shape[2] - 1
    spectrum = torch.fft.rfft(x, n=size, dim=2) * torch.fft.rfft(taps, n=size).mT
    return torch.fft.irfft(spectrum, n=size, dim=2)[:, :, :length]


def _mix_by_shifts(x: Heads, taps: HeadMixingFilter, dilation: int) -> Heads:
    rows = x.flatten(2)
    y = taps[..., 0] @ rows
    for j in range(1, taps.shape[2]):
        shift = j * dilation * x.shape[3]
        y = y + F.pad(taps[..., j] @ rows[..., :-shift], (shift, 0))
    return y.view_as(x)


def _mix_by_fft(x: Heads, taps: HeadMixingFilter) -> Heads:
    length = x.shape[2]
    size = length + taps.shape[2] - 1
    spectrum = torch.einsum("hgf,bgfc->bhfc", torch.fft.rfft(taps, n=size), torch.fft.rfft(x, n=size, dim=2))
    return torch.fft.irfft(spectrum, n=size, dim=2)[:, :, :length]
