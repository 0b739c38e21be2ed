"""Example configurations of the delta rule."""

from cat.mixers.delta.config import DeltaConfig
from cat.mixers.examples import CONVOLUTIONS, GENERATED

BASELINE = DeltaConfig(heads=1, gate=True, conv_q=4, conv_k=4, conv_v=4, sharing="channel")
EXAMPLES = {
    "plain": DeltaConfig(heads=3),
    "q": DeltaConfig(heads=3, gate=True, conv_q=3),
    "k": DeltaConfig(heads=3, conv_k="full"),
    "all": DeltaConfig(heads=3, gate=True, **CONVOLUTIONS),
    "state": DeltaConfig(heads=3, **GENERATED),
}
