"""Example configurations of gated linear attention."""

from cat.mixers.examples import CONVOLUTIONS, GENERATED
from cat.mixers.gla.config import GLAConfig

BASELINE = GLAConfig(heads=1, gate_rank=16)
EXAMPLES = {
    "plain": GLAConfig(heads=3, gate_rank=5),
    "q": GLAConfig(heads=3, gate_rank=1, output_gate=True, conv_q=3),
    "k": GLAConfig(heads=3, gate_rank=7, conv_k="full"),
    "all": GLAConfig(heads=3, gate_rank=18, output_gate=True, **CONVOLUTIONS),
    "state": GLAConfig(heads=3, gate_rank=3, **GENERATED),
}
