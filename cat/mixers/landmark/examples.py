"""Example configurations of landmark attention."""

from cat.mixers.examples import CONVOLUTIONS, GENERATED
from cat.mixers.landmark.config import LandmarkConfig

BASELINE = LandmarkConfig(heads=1, block=16, top=4, conv_summary=16)
EXAMPLES = {
    "plain": LandmarkConfig(heads=3, block=5, top=2),
    "q": LandmarkConfig(heads=3, block=5, top=1, conv_q=3, position="rotary"),
    "k": LandmarkConfig(heads=3, block=3, top=2, conv_k="full"),
    "all": LandmarkConfig(heads=3, block=7, top=2, qk_norm=True, **CONVOLUTIONS),
    "state": LandmarkConfig(heads=3, block=5, top=2, temperature=True, **GENERATED),
    "summary": LandmarkConfig(heads=3, block=5, top=1, conv_k=2, conv_summary=7, qk_norm=True, sharing="mixing"),
    "summary_state": LandmarkConfig(heads=3, block=5, top=1, conv_summary="state", filter_size=2),
    "soft": LandmarkConfig(heads=3, block=5, top=1, train_on="all", conv_q=2, conv_k=3, conv_v=3, conv_activation="silu"),
    "every_block": LandmarkConfig(heads=3, block=5, top=100),
}
