"""`launch/evaluate.py`: one process and two tensor-parallel ranks give the same figures, which are the model's."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from smoothing import unsmooth
from tests.support.data import prepared
from tests.support.launches import COMMON
from tests.support.processes import ROOT, environment, launcher
from tests.support.small_run import VOCAB, flags, launch_many, metrics, write_data, write_model

KEYS = {
    "nll",
    "accuracy",
    "ece_equal_mass",
    "ece_equal_width",
    "brier",
    "confidence",
    "entropy",
    "aurc",
    "temperature",
}


QUESTIONS = [("What is 3 + 4?", ["7", "Add 4 to get 7.", "12"], 1), ("What is 40 + 5?", ["45", "54"], 0)]


def evaluated(folder, start: list[str], name: str, *flags: str) -> dict:
    data = ["--data", "heldout.jsonl", "questions.jsonl"]
    given = ["--model", "model-tied", *data, "--max_length", "96", "--output_dir", name, *flags]
    done = subprocess.run(
        [*start, str(ROOT / "launch/evaluate.py"), *given],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for figure in ("reliability", "risk-coverage", "by-class", "answers-reliability", "answers-risk-coverage"):
        assert (folder / name / f"{figure}.png").stat().st_size > 10_000
    return json.loads((folder / name / "evaluation.json").read_text())


def prior() -> torch.Tensor:
    return torch.arange(VOCAB).float().softmax(0) / 2 + 0.5 / VOCAB


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_data(folder)
    rows = [{"question": q, "choices": choices, "answer": right} for q, choices, right in QUESTIONS]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_model(folder, tied=True)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.lm_head.weight *= 6  # sure of something
    model.config.label_smoothing, model.config.smoothing_prior = 0.1, "smoothing_prior.safetensors"
    model.save_pretrained(path)
    save_file({"u": prior()}, path / "smoothing_prior.safetensors")
    alone = evaluated(folder, [sys.executable], "one", "--base", "model-tied")
    return folder, alone, evaluated(folder, launcher(2), "two", "--tp", "2")


def test_every_figure_has_its_interval(evaluations):
    _, alone, two = evaluations
    parts = (alone, alone["after_temperature"], alone["unsmoothed"], alone["base"], alone["answers"])
    for part in (*parts, alone["unsmoothed"]["answers"], *alone["by_class"].values()):
        assert all(isinstance(part[key], float) and len(part[f"{key}_interval"]) == 2 for key in KEYS)
    assert alone["label_smoothing"] == 0.1 and two["base"] is None


def test_two_ranks_agree_with_one(evaluations):
    _, alone, two = evaluations
    for part in ("", "after_temperature", "unsmoothed", "answers"):
        one, other = (alone[part], two[part]) if part else (alone, two)
        for key in KEYS:  # nll is flat where it is least
            assert other[key] == pytest.approx(one[key], abs=1e-4 if key == "temperature" else 1e-6), key


def test_evaluations_in_training_have_the_same_figures(evaluations):
    folder, alone, _ = evaluations
    values = {"model": folder / "model-tied", "data": folder / "train.jsonl", "eval_data": folder / "same.jsonl"}
    right = [{"question": question, "answer": choices[right]} for question, choices, right in QUESTIONS]
    (folder / "same.jsonl").write_text(
        (folder / "heldout.jsonl").read_text() + "".join(json.dumps(row) + "\n" for row in right)
    )
    values |= {"output_dir": folder / "trained", "tp": 2, "max_steps": 1, "save_strategy": "no"}
    values |= {"warmup_steps": 0, "smoothing_prior": folder / "model-tied" / "smoothing_prior.safetensors"}
    evaluated = {"eval_calibration": True, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1}
    launch_many(folder, 2, [flags(COMMON | values | evaluated)])
    before, after = [row for row in metrics(folder / "trained") if "eval_nll" in row]
    for prefix, part in (("eval_", alone), ("eval_unsmoothed_", alone["unsmoothed"])):
        for key in KEYS:
            tolerance = 1e-4 if key == "temperature" else 1e-6
            assert before[prefix + key] == pytest.approx(part[key], abs=tolerance), prefix + key
    bins = before["eval_reliability"]
    assert bins["tokens"] == alone["reliability"]["tokens"]
    for name in ("confidence", "accuracy"):
        assert bins[name] == pytest.approx(alone["reliability"][name], abs=1e-6)
    assert after["eval_nll"] != before["eval_nll"] and after["eval_reliability"] != bins


def test_figures_are_those_of_the_models_logits(evaluations):
    folder, alone, _ = evaluations
    model = AutoModelForCausalLM.from_pretrained(folder / "model-tied").double()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model-tied")

    def of_rows(name: str) -> list[tuple[torch.Tensor, ...]]:
        """nll, correctness, and unsmoothed nll of the label tokens of each row."""
        found = []
        for row in prepared(str(folder / name), tokenizer, max_length=96, fraction=0.0).train:
            labels = torch.tensor(row["labels"])[1:]
            with torch.no_grad():
                logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
            log_probs = unsmooth(logits.log_softmax(-1), 0.1, prior=prior())
            numbers = (
                F.cross_entropy(logits, labels, reduction="none"),
                (logits.argmax(-1) == labels).double(),
                F.nll_loss(log_probs, labels, reduction="none"),
            )
            found.append(tuple(x[labels != -100] for x in numbers))
        return found

    tokens, answers = of_rows("heldout.jsonl"), []
    for question, choices, right in QUESTIONS:
        rows = [{"question": question, "answer": choice} for choice in choices]
        (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        each = of_rows("choices.jsonl")
        tokens.append(each[right])
        scores = torch.stack([-nll.sum() for nll, _, _ in each])
        answers.append(F.cross_entropy(scores, torch.tensor(right)).item())
    assert alone["answers"]["questions"] == 2
    assert alone["answers"]["nll"] == pytest.approx(sum(answers) / 2, rel=1e-5)
    nll, right, without = (torch.cat(parts).tolist() for parts in zip(*tokens, strict=True))
    assert (alone["rows"], alone["label_tokens"]) == (9, len(nll))
    assert alone["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-6)
    assert alone["unsmoothed"]["nll"] == pytest.approx(sum(without) / len(without), rel=1e-6)
    assert alone["accuracy"] == pytest.approx(sum(right) / len(right), rel=1e-6)
