"""Causal convolution by FFT: y = irfft(rfft(x) rfft(F)), padded to at least L + W - 1 so that nothing wraps around."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from cat.ops.common import Operation, merge_vmap_dim
from cat.types import ChannelKernel, HeadMixingKernel, Heads, InputHeads


def filter_fft(x: Heads, kernel: ChannelKernel) -> Heads:
    if x.numel() == 0:  # MKL rejects empty tensors
        return x * kernel.sum()
    dtype = torch.promote_types(x.dtype, kernel.dtype)
    if torch.compiler.is_compiling():  # which cannot trace autograd functions of any length
        length = x.shape[2]
        size = _padded_size(length, kernel.shape[2])
        return _inverse(_spectrum(kernel, size, dim=2).mT * _spectrum(x, size, dim=2), size, length).to(dtype)
    fft_dtype = torch.promote_types(dtype, torch.float32)  # there is no FFT of bfloat16
    return _FFTConvolution.apply(x.to(fft_dtype), kernel.to(fft_dtype))[0].to(dtype)


class _FFTConvolution(Operation):
    """Product of spectra. Keeping them, the gradient takes three real transforms; PyTorch's takes complex ones."""

    @staticmethod
    def forward(x: Heads, kernel: ChannelKernel) -> tuple[Heads, Tensor, Tensor]:
        """Return the outputs and the conjugate spectra of x and of the kernel."""
        size = _padded_size(x.shape[2], kernel.shape[2])
        x_spectrum, kernel_spectrum = torch.fft.rfft(x.mT, n=size), torch.fft.rfft(kernel, n=size)
        y = torch.fft.irfft(x_spectrum * kernel_spectrum, n=size)[..., : x.shape[2]].mT
        return y.contiguous(), x_spectrum.conj_physical_(), kernel_spectrum.conj_physical_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Heads, ChannelKernel], output: tuple[Heads, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])
        ctx.kernel_size = inputs[1].shape[2]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Heads | None, *_: None) -> tuple[Heads | None, ChannelKernel | None]:
        if gradient is None:
            return None, None
        x_spectrum, kernel_spectrum = ctx.saved_tensors
        length = gradient.shape[2]
        size = _padded_size(length, ctx.kernel_size)
        spectrum = torch.fft.rfft(gradient.mT, n=size)
        grad_x = torch.fft.irfft(spectrum * kernel_spectrum, n=size)[..., :length].mT
        correlation = spectrum.mul_(x_spectrum).sum_to_size(kernel_spectrum.shape)
        return grad_x, torch.fft.irfft(correlation, n=size)[..., : ctx.kernel_size]

    @staticmethod
    def vmap(info: Any, mapped: tuple[int | None, ...], x: Tensor, kernel: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        heads = merge_vmap_dim(x, mapped[0], info.batch_size, into=1), merge_vmap_dim(kernel, mapped[1], info.batch_size, into=0)
        y, x_spectrum, kernel_spectrum = _FFTConvolution.apply(*heads)
        unfolded = y.unflatten(1, (info.batch_size, -1)), x_spectrum.unflatten(1, (info.batch_size, -1))
        return (*unfolded, kernel_spectrum.unflatten(0, (info.batch_size, -1))), (1, 1, 0)


def mix_fft(x: InputHeads, kernel: HeadMixingKernel) -> Heads:
    if x.numel() == 0:  # MKL rejects empty tensors
        return x[:, :1].expand(-1, len(kernel), -1, -1) * kernel.sum()
    length = x.shape[2]
    size = _padded_size(length, kernel.shape[2])
    spectrum = torch.einsum("hgf,bgfc->bhfc", _spectrum(kernel, size, dim=-1), _spectrum(x, size, dim=2))
    return _inverse(spectrum, size, length).to(torch.promote_types(x.dtype, kernel.dtype))


def _padded_size(length: int, kernel_size: int) -> int:
    """Return a transform size in which nothing wraps around."""
    if torch.compiler.is_compiling():  # a fast size would need a graph per length, and the kernel is at most as long
        return 2 * length
    return _fast_size(length + kernel_size - 1)


def _fast_size(size: int) -> int:
    """Round `size` up to a power of two times 1, 3, 5, 9 or 15: transforms of prime sizes are slow."""
    return min(odd << (-(-size // odd) - 1).bit_length() for odd in (1, 3, 5, 9, 15))


def _spectrum(x: Float[Tensor, "*shape"], size: int, *, dim: int) -> Tensor:
    # At least float32: there is no FFT of bfloat16, and autocast does not cast its input on a GPU.
    return torch.fft.rfft(x.to(torch.promote_types(x.dtype, torch.float32)), n=size, dim=dim)


def _inverse(spectrum: Tensor, size: int, length: int) -> Tensor:
    """Return the first `length` tokens of the inverse transform along axis 2."""
    # The transform leaves the tokens of a channel adjacent in memory, for which attention has no fast kernel.
    return torch.fft.irfft(spectrum, n=size, dim=2)[:, :, :length].contiguous()
