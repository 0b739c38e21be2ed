"""Example configurations of Based."""

from cat.mixers.based.config import BasedConfig
from cat.mixers.examples import CONVOLUTIONS, GENERATED

BASELINE = BasedConfig(heads=1, feature_width=None)
EXAMPLES = {
    "plain": BasedConfig(heads=3),
    "q": BasedConfig(heads=3, window=1, conv_q=3, position="rotary"),
    "k": BasedConfig(heads=3, window=12, feature_width=None, conv_k="full"),
    "all": BasedConfig(heads=3, window=7, feature_width=5, qk_norm=True, conv_activation="silu", **CONVOLUTIONS),
    "state": BasedConfig(heads=3, feature_width=None, temperature=True, **GENERATED),
}
