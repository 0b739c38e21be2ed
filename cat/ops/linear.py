"""Several linear layers of the same input, computed as one matrix product if possible."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def apply_linear(x: Float[Tensor, "*tokens D"], layers: Sequence[nn.Module]) -> Float[Tensor, "*tokens P"]:
    """Return the concatenated outputs of `layers`; all have a bias or none has.

    One product for plain layers. Wrapped, quantized or sharded layers, and layers with hooks, are called one by one.
    """
    if not all(is_plain(layer) for layer in layers):
        return torch.cat([layer(x) for layer in layers], dim=-1)
    linear = [cast(nn.Linear, layer) for layer in layers]
    weight = torch.cat(tuple(layer.weight for layer in linear))
    bias = None if linear[0].bias is None else torch.cat(tuple(layer.bias for layer in linear))
    return F.linear(x, weight, bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether a call of `layer` is no more than a product with `layer.weight`, a tensor, and the addition of the bias."""
    return type(layer) is nn.Linear and type(layer.weight) in (Tensor, nn.Parameter) and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    """Whether something must happen around each call of `module`; a sharded one, for example, gathers its weights."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(found) > 0 for found in hooks)
