"""`python -m pipeline sample`: the continuation of a prompt is the model's, decoded as text."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.commands.sample import SamplingOptions, sample
from pipeline.config.grid import variants_on
from pipeline.config.load import load_study
from pipeline.stages import train
from pipeline.storage import runs
from pipeline.storage.paths import DATA
from pipeline.storage.tokenizers import read_tokenizer
from tests.helpers.reference import naive_continuation
from tests.helpers.study import edit, stage, tiny_study

PROMPT = "Line 3 of the"
FOR_BYTES = pytest.mark.parametrize("trained", ["bytes"], indirect=True)
"""For tests in which the tokenizer does not matter."""


@pytest.fixture(scope="module", params=["bytes", "words"])
def trained(request, tmp_path_factory):
    """A study of two variants on a custom text, with byte or word tokens."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "lines.txt").write_text(
        "".join(f"Line {i} of the têxt , with {'new' if i > 160 else 'old'}{i % 13}\n" for i in range(400))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "_splits", train._splits.__wrapped__)  # its cache is by task name, not by folder
        tiny_study(folder, tasks=["copying", "text"])
        edit(**{"tasks.text.data.source": str(folder / "lines.txt"), "tasks.text.data.tokens": request.param})
        edit(**{"defaults.training.seeds": [4], "tasks.text.data.test_examples": 4})
        edit(**{"variants.none.position": "learned"})
        stage("generate", "text")
        for variant in ("k", "none"):
            stage("train", "text", variant)
    return folder


@pytest.fixture
def study(trained, monkeypatch):
    monkeypatch.chdir(trained)
    return trained.name.rstrip("0123456789")


def invoke(*arguments, prompt=PROMPT, variant="k"):
    result = CliRunner().invoke(main, ["sample", "text", variant, *arguments], input=prompt)
    return result.exit_code, result.stdout, result.stderr


def text(*arguments, **options):
    code, out, err = invoke(*arguments, **options)
    assert (code, err) == (0, "")
    return out


def test_the_most_likely_text_is_the_model_s_own_continuation(study):
    tokenizer = read_tokenizer("text")
    prompt = tokenizer.encode(np.frombuffer(PROMPT.encode(), np.uint8)).tolist()
    model = runs.load_model(runs.weights_path("text", "k", 4))
    expected = naive_continuation(model, torch.tensor([prompt]), 9)[0].tolist()
    found = text("--tokens", "9", "--temperature", "0")
    assert found == "".join(tokenizer.decode(expected, after=prompt[-1])) + "\n"
    assert text("--tokens", "9", "--temperature", "0", "--prompt", PROMPT, prompt=None) == found
    assert text("--tokens", "9", "--top-k", "1") == text("--tokens", "9", "--temperature", "0", "--model-seed", "4") == found


def test_samples_depend_only_on_the_seed(study):
    first, again, other = (text("--tokens", "20", "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again != other


def test_text_is_yielded_token_by_token(study):
    options = SamplingOptions(tokens=7, temperature=1.0, top_k=None, seed=0)
    parts = []
    for part in sample(load_study(), "text", "k", PROMPT.encode(), options, model_seed=4, device="cpu"):
        parts.append(part)
    assert len(parts) == 7 + 1
    if study == "words":
        assert all(part.startswith((" ", "\n")) for part in parts[: parts.index("\n") if "\n" in parts else 7])


def test_unknown_words_in_the_prompt_are_encoded(study):
    assert text("--tokens", "3", prompt="unheard-of wörds\n")


@FOR_BYTES
@pytest.mark.parametrize(
    ("arguments", "prompt", "line"),
    [
        (("text", "kk"), PROMPT, "params.yaml: variants.kk: is missing; did you mean 'k'?"),
        (("texts", "k"), PROMPT, "params.yaml: tasks.texts: is missing; did you mean 'text'?"),
        (("copying", "k"), PROMPT, "sample: copying is of kind copying"),
        (("text", "k"), "", "sample: the prompt is empty"),
        (("text", "k"), b"\xff\xfe", "sample: the prompt is not UTF-8"),
        (("text", "k", "--temperature", "nan"), PROMPT, "sample: temperature = nan"),
        (("text", "k", "--device", "cuda"), PROMPT, "params.yaml: device = cuda: "),
        (
            ("text", "k", "--model-seed", "5"),
            PROMPT,
            "sample: runs/text/k/seed_5.safetensors: is missing",
        ),
        (
            ("text", "none", "--tokens", "40"),
            "Line",
            "sample: learned positions ",
        ),
    ],
)
def test_errors_are_one_line(study, monkeypatch, arguments, prompt, line):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    result = CliRunner().invoke(main, ["sample", *arguments], input=prompt)
    assert (result.exit_code, result.stdout) == (2, "")
    (error,) = result.stderr.splitlines()
    assert error.startswith(line)


@FOR_BYTES
@pytest.mark.parametrize("option", [("--tokens", "0"), ("--temperature", "-0.5"), ("--top-k", "0"), ("--seed", "-1")])
def test_a_number_out_of_range_is_refused(study, option):
    code, out, err = invoke(*option)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(f"Error: Invalid value for '{option[0]}': {option[1]} is not in the range")


@FOR_BYTES
def test_a_variant_that_is_not_trained_on_the_task_is_refused(study):
    others = [v for v in load_study().variants if v not in (trained := variants_on(load_study(), "text"))]
    assert invoke(variant=others[0]) == (
        2,
        "",
        f"sample: {others[0]} is not trained on text. Fix: choose from {', '.join(trained)}\n",
    )


def test_missing_or_different_data_are_refused(study, tmp_path, monkeypatch):
    shutil.copytree(Path(), tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    other = "bytes" if study == "words" else "words"
    edit(**{"tasks.text.data.tokens": other})
    stage("generate", "text")
    code, _, err = invoke()
    assert code == 2
    assert err.startswith("sample: runs/text/k/seed_4.safetensors: has a vocabulary of ")
    assert len(err.splitlines()) == 1
    shutil.rmtree(DATA / "text")
    assert invoke() == (2, "", "sample: data/text: is missing. Fix: run `dvc repro generate@text`\n")


@FOR_BYTES
@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_are_escaped_for_a_terminal(study, monkeypatch, capsys, terminal):
    generated = "a\x1b[31m\r\x00é\u202e\t\n\x9b€\ufffd"
    monkeypatch.setattr("pipeline.commands.sample.sample", lambda *_, **__: iter([generated]))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    stage("sample", "text", "k", "--prompt", PROMPT)
    escaped = "a\\u001b[31m\\r\\u0000é\\u202e\t\n\\u009b€\ufffd"
    assert capsys.readouterr().out == (escaped if terminal else generated) + "\n"
