"""Example configurations of Mamba."""

from cat.mixers.mamba.config import MambaConfig

BASELINE = MambaConfig(expand=1)
EXAMPLES = {
    "plain": MambaConfig(),
    "small": MambaConfig(expand=1, state=3, conv_size=2),
    "single": MambaConfig(state=1, conv_size=1),
}
