"""Axis letters, and names for the tensor shapes that use them.

    B  sequences of a batch           H  heads
    L  tokens of a sequence           C  channels per head
    A  target positions per sequence  E  channels per head of the values
    D  width of the residual stream   W  kernel size
    V  vocabulary size                G  input heads of a mixing convolution; or groups, each with its own kernel
    R  members of an ensemble that is trained as one model
    K  heads of keys and values; K divides H, and K = H unless queries are grouped

In a shape, `#C` is C or 1, and `_` is any size.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "B L"]
Positions = Int[Tensor, "B A"]
"""Target positions of each sequence, in ascending order. Outputs are computed only there."""
Hidden = Float[Tensor, "B L D"]
Heads = Float[Tensor, "B H L C"]
Queries = Float[Tensor, "B H _ C"]
"""Queries at every position, or only at the target positions."""
InputHeads = Float[Tensor, "B G L C"]
"""Inputs of a convolution that mixes heads. As a rule G = H."""
Values = Float[Tensor, "B H L E"]
"""E = C in most mixers. Based and GLA have narrower queries and keys, and the diagnostics pass values of another width."""
KeyHeads = Float[Tensor, "B K L C"]
ValueHeads = Float[Tensor, "B K L E"]
Valid = Bool[Tensor, "B L"]
"""False for tokens that no other token sees, such as padding."""
State = Float[Tensor, "B H C E"]
"""State of a recurrence: a sum over the tokens so far of key times value. Its size does not depend on their number."""
HeadKernel = Float[Tensor, "H W"]
ChannelKernel = Float[Tensor, "H #C W"]
"""One kernel per channel. The axis C has size 1 if the channels of a head share a kernel."""
HeadMixingKernel = Float[Tensor, "H G W"]
"""One kernel for each pair of output head and input head."""
GroupedHeads = Float[Tensor, "G B H L C"]
GroupedKernel = Float[Tensor, "G H #C W"]
MemberHeads = Float[Tensor, "R B H L C"]
"""Heads of one group, for each ensemble member."""
StackedHeads = Float[Tensor, "R G B H L C"]
"""Heads of all groups, for each ensemble member."""
StackedKernel = Float[Tensor, "R G H #C W"]
