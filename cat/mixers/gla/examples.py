"""Example configurations of gated linear attention."""

from cat.mixers.examples import CONVOLUTIONS, GENERATED
from cat.mixers.gla.config import GLAConfig

BASELINE = GLAConfig(heads=1)
EXAMPLES = {
    "plain": GLAConfig(heads=3, gate_rank=5),
    "q": GLAConfig(heads=3, gate_rank=1, conv_q=3),
    "k": GLAConfig(heads=3, gate_rank=7, key_width="full", output_gate=False, conv_k="full"),
    "all": GLAConfig(heads=3, gate_rank=18, conv_activation="silu", **CONVOLUTIONS),
    "state": GLAConfig(heads=3, gate_rank=3, key_width="full", **{**GENERATED, "filter_init": "identity"}),
    "short": GLAConfig(heads=3, gate_rank=3, output_gate=False, conv_q=3, conv_k=3, conv_v=3, filter_init="uniform"),
}
