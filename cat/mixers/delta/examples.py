"""Example configurations of the delta rule."""

from cat.mixers.delta.config import DeltaConfig
from cat.mixers.examples import CONVOLUTIONS, GENERATED

BASELINE = DeltaConfig(heads=1, output_gate=False)
EXAMPLES = {
    "plain": DeltaConfig(heads=3),
    "q": DeltaConfig(heads=3, gate=False, conv_q=3, conv_k=None, conv_v=None, filter_init="identity"),
    "k": DeltaConfig(heads=3, gate=False, output_gate=False, conv_q=None, conv_k="full", conv_activation="none"),
    "all": DeltaConfig(heads=3, **CONVOLUTIONS),
    "state": DeltaConfig(heads=3, output_gate=False, sharing="head", **{**GENERATED, "filter_init": "identity"}),
    "none": DeltaConfig(heads=3, conv_q=None, conv_k=None, conv_v=None),
}
