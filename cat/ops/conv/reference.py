"""Reference implementations of the causal convolutions, written as the definition: y_i = sum_{j < W} F_j x_{i - j dilation}."""

import torch

from cat.types import ChannelKernel, HeadKernel, HeadMixingKernel, Heads, InputHeads


def naive_filter_heads(x: Heads, kernel: HeadKernel, *, dilation: int = 1) -> Heads:
    """Reference implementation of `filter_heads`: one output and one kernel value at a time."""
    return naive_mix_heads(x, torch.diag_embed(kernel.mT).movedim(0, -1), dilation=dilation)


def naive_filter_channels(x: Heads, kernel: ChannelKernel, *, dilation: int = 1) -> Heads:
    """Reference implementation of `filter_channels`: one channel at a time."""
    channels = [naive_filter_heads(x[..., c : c + 1], kernel[:, c], dilation=dilation) for c in range(x.shape[3])]
    return torch.cat(channels, dim=3)


def naive_mix_heads(x: InputHeads, kernel: HeadMixingKernel, *, dilation: int = 1) -> Heads:
    """Reference implementation of `mix_heads`: one output and one kernel value at a time."""
    outputs = []
    for i in range(x.shape[2]):
        offsets = [j for j in range(kernel.shape[2]) if j * dilation <= i]
        outputs.append(torch.stack([kernel[:, :, j] @ x[:, :, i - j * dilation] for j in offsets]).sum(0))
    return torch.stack(outputs, dim=2)
