"""Settings that the examples of several mixers share.

A mixer's folder has an `examples.py` with `EXAMPLES`: small configurations by name, on which cat/mixers/checks.py runs. Together
they have at least two values of each key. They are built with 24 channels and a training length of 13.

It may also have `BASELINE`: the configuration that, with 64 channels, has about as many parameters as attention.
"""

from typing import Any

CONVOLUTIONS: dict[str, Any] = {
    "conv_q": 2,
    "conv_k": 4,
    "conv_v": 3,
    "filter_norm": True,
    "sharing": "channel",
    "dilation": 2,
    "filter_bias": True,
    "residual": True,
}
"""Three convolutions with a value other than the default for each of their settings."""
GENERATED: dict[str, Any] = {
    "conv_q": "network",
    "conv_k": "state",
    "conv_v": "decay",
    "filter_size": 3,
    "filter_init": "random",
    "token_shift": True,
}
"""A generated kernel of each kind."""
