"""The reference implementations of the causal convolutions."""

import torch

from cat.types import ChannelFilter, HeadFilter, HeadMixingFilter, Heads, Sources


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
