"""Step sizes of recurrences that each token sets.

They start as in the code of Mamba (arXiv 2312.00752) and Mamba-2 (2405.21060).
"""

import math

import torch
from torch import nn

from cat.ops.common import set_values

MIN_STEP, MAX_STEP = 1e-3, 1e-1


class StepSize(nn.Linear):
    """Map to the inputs of a softplus; its outputs are the step sizes."""

    def reset_parameters(self) -> None:
        """Initialize the steps at zero input log-uniformly between MIN_STEP and MAX_STEP."""
        super().reset_parameters()
        steps = torch.empty(self.out_features).uniform_(math.log(MIN_STEP), math.log(MAX_STEP)).exp()
        set_values(self.bias, steps.expm1().log())  # the inverse of softplus
