"""Example configurations of linear attention."""

from cat.mixers.examples import CONVOLUTIONS, GENERATED
from cat.mixers.linear.config import LinearConfig

BASELINE = LinearConfig(heads=1)
EXAMPLES = {
    "plain": LinearConfig(heads=3),
    "q": LinearConfig(heads=3, conv_q=3, position="rotary"),
    "k": LinearConfig(heads=3, conv_k="full", conv_activation="silu"),
    "all": LinearConfig(heads=3, qk_norm=True, **CONVOLUTIONS),
    "state": LinearConfig(heads=3, temperature=True, **GENERATED),
}
