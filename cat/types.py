"""Axis letters and the tensors made of them.

B batch, L sequence length, H heads, C channels of a head, D channels of the residual stream, W filter taps, N answers,
V vocabulary.
"""

from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "B L"]
Hidden = Float[Tensor, "B L D"]
Heads = Float[Tensor, "B H L C"]
HeadFilter = Float[Tensor, "H W"]
