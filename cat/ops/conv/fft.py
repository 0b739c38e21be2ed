"""Causal convolution by FFT."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation, merge_vmap_dim
from cat.types import ChannelKernel, HeadMixingKernel, Heads, Sources


def filter_fft(x: Heads, kernel: ChannelKernel) -> Heads:
    if x.numel() == 0:  # MKL takes none
        return x * kernel.sum()
    narrow = torch.promote_types(x.dtype, kernel.dtype)
    wide = torch.promote_types(narrow, torch.float32)  # there is no FFT of bfloat16
    return _Fourier.apply(x.to(wide), kernel.to(wide))[0].to(narrow)


class _Fourier(Operation):
    """Products of spectra, which are kept: the gradient takes three real transforms, where PyTorch's own takes complex ones."""

    @staticmethod
    def forward(x: Heads, kernel: ChannelKernel) -> tuple[Heads, Tensor, Tensor]:
        """The outputs, and the conjugate spectra of both."""
        size = _fast_size(x.shape[2] + kernel.shape[2] - 1)
        of_x, of_taps = torch.fft.rfft(x.mT, n=size), torch.fft.rfft(kernel, n=size)
        y = torch.fft.irfft(of_x * of_taps, n=size)[..., : x.shape[2]].mT
        return y.contiguous(), of_x.conj_physical_(), of_taps.conj_physical_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Heads, ChannelKernel], output: tuple[Heads, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])
        ctx.width = inputs[1].shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Heads, *_: None) -> tuple[Heads, ChannelKernel]:
        of_x, of_taps = ctx.saved_tensors
        length = gradient.shape[2]
        size = _fast_size(length + ctx.width - 1)
        spectrum = torch.fft.rfft(gradient.mT, n=size)
        back = torch.fft.irfft(spectrum * of_taps, n=size)[..., :length].mT
        correlation = spectrum.mul_(of_x).sum_to_size(of_taps.shape)
        return back, torch.fft.irfft(correlation, n=size)[..., : ctx.width]

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], x: Tensor, kernel: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        heads = merge_vmap_dim(x, mapped[0], info.batch_size, into=1), merge_vmap_dim(kernel, mapped[1], info.batch_size, into=0)
        y, of_x, of_taps = _Fourier.apply(*heads)
        unfolded = y.unflatten(1, (info.batch_size, -1)), of_x.unflatten(1, (info.batch_size, -1))
        return (*unfolded, of_taps.unflatten(0, (info.batch_size, -1))), (1, 1, 0)


def mix_fft(x: Sources, kernel: HeadMixingKernel) -> Heads:
    if x.numel() == 0:  # MKL takes none
        return x[:, :1].expand(-1, len(kernel), -1, -1) * kernel.sum()
    length = x.shape[2]
    size = _fast_size(length + kernel.shape[2] - 1)
    spectrum = torch.einsum("hgf,bgfc->bhfc", _spectrum(kernel, size, dim=-1), _spectrum(x, size, dim=2))
    return _tokens(spectrum, size, length).to(torch.promote_types(x.dtype, kernel.dtype))


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
