"""The code of a logged MLflow model. MLflow runs it where the model is loaded, so it uses nothing of `pipeline`."""

import json
from typing import Any

import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray
from safetensors import safe_open

from cat.mixers.registry import read_model
from cat.model import SequenceModel


class ServedModel(PythonModel):  # type: ignore[misc]
    """Tokens, N x L, to logits of the next token or answer, N x L x vocabulary."""

    def load_context(self, context: Any) -> None:
        """Load the weights, whose metadata holds the configuration."""
        with safe_open(context.artifacts["weights"], framework="pt") as file:
            model_info = json.loads(file.metadata()["model"])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        model = SequenceModel(read_model(model_info["config"]), vocabulary=model_info["vocabulary"], length=model_info["length"])
        model.load_state_dict(weights)
        self.model = model.eval()

    def predict(self, context: Any, model_input: NDArray[np.int64], params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Compute the logits."""
        with torch.inference_mode():
            return self.model(torch.from_numpy(np.asarray(model_input))).float().numpy()


set_model(ServedModel())
