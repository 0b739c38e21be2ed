"""Run code in new processes that need not import MLflow, which takes seconds: they are forked from a server that has."""

import multiprocessing
import os
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

PRELOADED = ["__main__", "pipeline.stages.train", "pipeline.tracking.sync", "mlflow.tracking", "mlflow.data.meta_dataset"]


def run_code(code):
    """Run Python code in a new process, with this working folder and environment; return its exit code, output and errors."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        streams = Path(folder, "output"), Path(folder, "errors")
        process = context.Process(target=_execute, args=(code, Path.cwd(), dict(os.environ), streams))
        process.start()
        process.join()
        return CompletedProcess(code, process.exitcode, *(path.read_text(encoding="utf-8") for path in streams))


def _execute(code, folder, environment, streams):
    for number, path in enumerate(streams, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    exec(code, {})
