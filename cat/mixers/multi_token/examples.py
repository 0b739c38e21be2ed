"""Example configurations of multi-token attention."""

from cat.mixers.examples import CONVOLUTIONS, GENERATED
from cat.mixers.multi_token.config import MultiTokenConfig

BASELINE = MultiTokenConfig(heads=1)
EXAMPLES = {
    "plain": MultiTokenConfig(heads=3),
    "weights": MultiTokenConfig(heads=3, query_kernel=2, key_kernel=3, head_norm=False, position="rotary"),
    "mixed": MultiTokenConfig(heads=6, query_kernel=1, key_kernel=5, head_groups=3, depth_scale=0.5),
    "queries": MultiTokenConfig(heads=6, query_kernel=7, key_kernel=1, head_groups=2, head_norm=False, temperature=True),
    "all": MultiTokenConfig(heads=3, query_kernel=3, key_kernel=7, qk_norm=True, conv_activation="silu", **CONVOLUTIONS),
    "generated": MultiTokenConfig(heads=3, head_groups=3, position="rotary", **GENERATED),
}
