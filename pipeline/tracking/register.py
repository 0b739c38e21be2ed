"""Log trained models as MLflow models, and register the best variant of each task.

Only the chosen seed is logged, because its run has the weights already and a model is a second copy of them. The model contains
the library, so that any folder with torch can load it: `mlflow.pyfunc.load_model("models:/<task>@best")`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cat.config import ModelConfig
from pipeline.config.study import Study
from pipeline.storage import runs
from pipeline.tracking.pages import KEY_TAG, Pages
from pipeline.tracking.store import explain_error, store_errors, tracking_uri
from pipeline.tracking.sync import connect

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

ALIAS = "best"
ROOT = Path(__file__).parents[2]


def register(study: Study, task: str | None = None, variant: str | None = None) -> Iterator[str]:
    """Register a model per task, or of one task, and yield a line for each.

    It is the best seed of the best trained variant, or of `variant`. Raises ValueError if the store has no run of it.
    """
    try:
        client, pages, _ = connect(study)
        for name in [task] if task else pages.tasks:
            yield _register(client, pages, name, _best_run(client, pages, name, variant))
    except store_errors() as error:
        raise ValueError(explain_error(error)) from None


def _best_run(client: MlflowClient, pages: Pages, task: str, variant: str | None) -> Run:
    view = pages.views(task)[0]
    order = [f"{view.order} {'ASC' if view.ascending else 'DESC'}"]

    def search(kind: str) -> list[Run]:
        where = f"{pages.current} and tags.kind = '{kind}'"
        found = client.search_runs([pages.experiment_ids[task]], where, max_results=1000, order_by=order)
        trained = (name for name, model in pages.study.variants.items() if isinstance(model, ModelConfig))
        wanted = {variant} if variant else set(trained)
        return [run for run in found if run.data.tags["variant"] in wanted]

    variants = search("variant")
    seeds = [run for run in search("seed") if variants and run.data.tags["variant"] == variants[0].data.tags["variant"]]
    weights = [run for run in seeds if runs.weights_path(task, run.data.tags["variant"], int(run.data.tags["seed"])).exists()]
    if not weights:
        model = f"{variant} on {task}" if variant else f"a trained variant on {task}"
        raise ValueError(f"the store or runs/ has no model of {model}. Fix: run `dvc repro`, then `python -m pipeline track`")
    return weights[0]


def _register(client: MlflowClient, pages: Pages, task: str, run: Run) -> str:
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    variant, seed = run.data.tags["variant"], int(run.data.tags["seed"])
    name, key = f"{task}, {variant} seed {seed}", run.data.tags[KEY_TAG]
    for version in client.search_model_versions(f"name = '{task}'"):
        if version.tags.get(KEY_TAG) == key:
            client.set_registered_model_alias(task, ALIAS, version.version)
            return f"{name}: is version {version.version} of models:/{task}@{ALIAS}"
    weights = runs.weights_path(task, variant, seed)
    model = runs.load_model(weights)
    vocabulary = model.embedding.token.num_embeddings
    example = np.arange(8, dtype=np.int64)[None] % vocabulary
    mlflow.set_tracking_uri(tracking_uri())
    with mlflow.start_run(run_id=run.info.run_id):
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("served_model.py")),
            artifacts={"weights": str(weights)},
            code_paths=[str(ROOT / "cat")],
            signature=ModelSignature(
                Schema([TensorSpec(np.dtype(np.int64), (-1, -1))]),
                Schema([TensorSpec(np.dtype(np.float32), (-1, -1, vocabulary))]),
            ),
            input_example=example,
            pip_requirements=_requirements(),
            registered_model_name=task,
        )
    version = logged.registered_model_version
    client.set_model_version_tag(task, str(version), KEY_TAG, key)
    client.set_registered_model_alias(task, ALIAS, str(version))
    return f"{name}: registered as version {version} of models:/{task}@{ALIAS}"


def _requirements() -> list[str]:
    """The versions of the packages that the library needs."""
    names = ("torch", "numpy", "pydantic", "jaxtyping", "numba", "safetensors")
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in names]
