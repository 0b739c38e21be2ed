"""The reference implementations of the causal convolutions."""

import torch

from cat.types import ChannelKernel, HeadKernel, HeadMixingKernel, Heads, Sources


def naive_filter_heads(x: Heads, kernel: HeadKernel, *, dilation: int = 1) -> Heads:
    """The definition, one output and one tap at a time; the twin that `filter_heads` is tested against."""
    return naive_mix_heads(x, torch.diag_embed(kernel.mT).movedim(0, -1), dilation=dilation)


def naive_filter_channels(x: Heads, kernel: ChannelKernel, *, dilation: int = 1) -> Heads:
    """The definition, a channel at a time."""
    channels = [naive_filter_heads(x[..., c : c + 1], kernel[:, c], dilation=dilation) for c in range(x.shape[3])]
    return torch.cat(channels, dim=3)


def naive_mix_heads(x: Sources, kernel: HeadMixingKernel, *, dilation: int = 1) -> Heads:
    """The definition, one output and one tap at a time."""
    outputs = []
    for i in range(x.shape[2]):
        reach = [j for j in range(kernel.shape[2]) if j * dilation <= i]
        outputs.append(torch.stack([kernel[:, :, j] @ x[:, :, i - j * dilation] for j in reach]).sum(0))
    return torch.stack(outputs, dim=2)
