"""`python -m pipeline export`: the folder has the trained model and its tokenizer, and continues a prompt as `sample` does."""

import importlib
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.config.grid import seeds_of, variants_on
from pipeline.config.load import load_study
from pipeline.stages import train
from pipeline.storage import runs
from tests.helpers.study import edit, stage, tiny_study

PROMPT = "Line 3 of the"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A study of a text of BPE pieces and a synthetic task, one variant trained on each."""
    folder = tmp_path_factory.mktemp("export")
    (folder / "lines.txt").write_text(
        "".join(f"Line {i} of the têxt , with {'new' if i > 160 else 'old'}{i % 13}\n" for i in range(400))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "_splits", train._splits.__wrapped__)  # its cache is by task name, not by folder
        tiny_study(folder, tasks=["copying", "text"])
        edit(**{"tasks.text.data.source": str(folder / "lines.txt"), "tasks.text.data.tokens": "bpe"})
        edit(**{"tasks.text.data.vocabulary_size": 270, "defaults.training.seeds": [4, 5], "variants.k.tied": True})
        edit(**{"tasks.text.data.test_examples": 4})
        for task in ("text", "copying"):
            stage("generate", task)
        stage("train", "text", "k")
        stage("train", "copying", variants_on(load_study(), "copying")[0])
    return folder


@pytest.fixture
def study(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return load_study()


def invoke(*arguments):
    result = CliRunner().invoke(main, ["export", *map(str, arguments)])
    return result.exit_code, result.stderr


def test_a_language_model_continues_text_as_sample_does(study, tmp_path):
    code, err = invoke("text", "k", tmp_path / "model", "--seed", 5)
    assert code == 0, err
    hf = importlib.import_module("cat.hf")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert len({path.stat().st_mode for path in (tmp_path / "model").iterdir()}) == 1  # all can be read by the same people
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(tmp_path / "model")
    trained = runs.load_model(runs.weights_path("text", "k", 5))
    inputs = tokenizer(PROMPT, return_tensors="pt")
    assert torch.equal(model(inputs["input_ids"]).logits, trained(inputs["input_ids"]))
    found = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    sampled = CliRunner().invoke(
        main, ["sample", "text", "k", "--prompt", PROMPT, "--tokens", "12", "--temperature", "0", "--model-seed", "5"]
    )
    assert f"{tokenizer.decode(found[0])}\n" == PROMPT + sampled.stdout
    assert tokenizer.decode(model.generate(max_new_tokens=1, do_sample=False)[0]).startswith("\n")


def test_a_model_of_a_synthetic_task_reads_numbers(study, tmp_path):
    variant = variants_on(study, "copying")[0]
    code, err = invoke("copying", variant, tmp_path / "new" / "model")
    assert code == 0, err
    hf = importlib.import_module("cat.hf")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "new" / "model")
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(tmp_path / "new" / "model")
    trained = runs.load_model(runs.weights_path("copying", variant, seeds_of(study, "copying", variant)[0]))
    inputs = tokenizer("1 0 2 2", return_tensors="pt")["input_ids"]
    assert inputs.tolist() == [[1, 0, 2, 2]]
    assert torch.equal(model(inputs).logits, trained(inputs))


def test_an_empty_folder_is_filled_and_another_refused(study, tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("old", "file"):
        assert invoke("text", "k", tmp_path / name) == (
            2,
            f"export: {tmp_path / name}: exists. Fix: choose a new folder, or remove it\n",
        )
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["notes.txt"]
    hf = importlib.import_module("cat.hf")

    def fail(model, folder, tokenizer):
        folder.mkdir()
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hf, "save", fail)
        code, err = invoke("text", "k", tmp_path / "model")
        assert (code, err) == (2, f"export: {tmp_path / 'model'}: No space left on device\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old"]
    (tmp_path / "empty").mkdir()
    assert invoke("text", "k", tmp_path / "empty")[0] == 0
    assert (tmp_path / "empty" / "config.json").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("text", "kk"), "params.yaml: variants.kk: is missing; did you mean 'k'?"),
        (("texts", "k"), "params.yaml: tasks.texts: is missing; did you mean 'text'?"),
        (("text", "k", "--seed", "6"), "export: runs/text/k/seed_6.safetensors: is missing"),
        (("text", "none"), "export: runs/text/none/seed_4.safetensors: is missing"),
    ],
)
def test_errors_are_one_line(study, tmp_path, arguments, line):
    code, err = invoke(*arguments[:2], tmp_path / "model", *arguments[2:])
    (error,) = err.splitlines()
    assert (code, error[: len(line)]) == (2, line)
    assert not (tmp_path / "model").exists()


def test_missing_data_are_refused(study, tmp_path, monkeypatch):
    shutil.copytree(Path(), tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    shutil.rmtree("data/text")
    assert invoke("text", "k", "model") == (2, "export: data/text: is missing. Fix: run `dvc repro generate@text`\n")


def test_without_transformers_the_error_names_the_fix(study, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cat.hf", raising=False)
    problem = "cat.hf needs the package transformers, 5.24 or newer. Fix: pip install 'cat-study[hf]'"
    assert invoke("text", "k", tmp_path / "model") == (2, f"export: {problem}\n")
