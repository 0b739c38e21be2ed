"""Axis letters and the tensors made of them.

B batch, L sequence length, A positions asked of a sequence, H heads, C channels of a head, E of its values, D channels of the
residual stream, W filter taps, V vocabulary, G groups of heads, each with taps of its own.
"""

from jaxtyping import Float, Int
from torch import Tensor

Tokens = Int[Tensor, "B L"]
Positions = Int[Tensor, "B A"]
"""The positions of each sequence whose output is wanted, in rising order."""
Hidden = Float[Tensor, "B L D"]
Heads = Float[Tensor, "B H L C"]
Queries = Float[Tensor, "B H _ C"]
"""Of every position, or of those that are asked for."""
Sources = Float[Tensor, "B G L C"]
"""The heads that are mixed."""
Values = Float[Tensor, "B H L E"]
"""E is C in a model: only its diagnostics hand a mixer values of another width."""
State = Float[Tensor, "B H C E"]
"""What a head keeps of the tokens so far, however many they are: a sum over them of key times value."""
HeadKernel = Float[Tensor, "H W"]
ChannelKernel = Float[Tensor, "H #C W"]
"""C is 1 where the channels of a head share their taps."""
HeadMixingKernel = Float[Tensor, "H G W"]
"""From each of G heads, as a rule the same ones, to each of H."""
GroupedHeads = Float[Tensor, "G B H L C"]
GroupedKernel = Float[Tensor, "G H #C W"]
Replicated = Float[Tensor, "R B H L C"]
StackedHeads = Float[Tensor, "R G B H L C"]
StackedKernel = Float[Tensor, "R G H #C W"]
"""Those of R replicas."""
