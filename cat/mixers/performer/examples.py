"""Example configurations of Performer."""

from cat.mixers.examples import CONVOLUTIONS, GENERATED
from cat.mixers.performer.config import PerformerConfig

BASELINE = PerformerConfig(heads=1)
EXAMPLES = {
    "plain": PerformerConfig(heads=3),
    "q": PerformerConfig(heads=3, features=16, conv_q=3, position="rotary"),
    "k": PerformerConfig(heads=3, features=7, conv_k="full", conv_activation="silu"),
    "all": PerformerConfig(heads=3, features=6, qk_norm=True, **CONVOLUTIONS),
    "state": PerformerConfig(heads=3, features=6, temperature=True, **GENERATED),
}
