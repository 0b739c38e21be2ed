"""Example configurations of Based."""

from cat.mixers.based.config import BasedConfig
from cat.mixers.examples import CONVOLUTIONS, GENERATED

BASELINE = BasedConfig(heads=1, window=8)
EXAMPLES = {
    "plain": BasedConfig(heads=3, window=4),
    "q": BasedConfig(heads=3, window=1, conv_q=3, position="rotary"),
    "k": BasedConfig(heads=3, window=12, conv_k="full"),
    "all": BasedConfig(heads=3, window=7, qk_norm=True, **CONVOLUTIONS),
    "state": BasedConfig(heads=3, window=2, temperature=True, **GENERATED),
}
