"""Write a trained model as a folder of the Hugging Face library."""

from __future__ import annotations

from pathlib import Path

from pipeline.config.grid import seeds_of
from pipeline.config.study import Study
from pipeline.runtime import workers
from pipeline.storage import runs
from pipeline.storage.files import atomic_write


def export(study: Study, task: str, variant: str, folder: Path, *, seed: int | None) -> None:
    """Write the model of `variant`, `task` and `seed`, and its tokenizer, to `folder`.

    Without `seed`, it is the model of the cell's first seed. Raises ValueError if transformers is not installed, the model does
    not exist, or `folder` exists and is not an empty folder.
    """
    folder = folder.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder}: exists. Fix: choose a new folder, or remove it")
    try:
        from cat.hf import save
    except ImportError as error:
        raise ValueError(str(error)) from None
    seed = seeds_of(study, task, variant)[0] if seed is None else seed
    workers.prepare()
    if study.tasks[task].data.kind == "text":
        model, tokenizer = runs.load_text_model(task, variant, seed)
    else:
        model, tokenizer = runs.load_model(runs.weights_path(task, variant, seed)), None
    with atomic_write(folder) as part:
        save(model, part, tokenizer)
