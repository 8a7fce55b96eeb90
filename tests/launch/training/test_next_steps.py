"""What a run says when it has ended, and while it trains: commands that work, and how long it takes."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from launch.common.paths import SMOOTHING_PRIOR
from launch.config import early
from launch.config.options import SftOptions
from launch.evaluation.options import parse
from launch.model.adapters import with_adapter
from launch.training import logging
from launch.training.adapter_weights import save_adapter
from launch.training.next_steps import next_steps
from smoothing.hf import exported_prior
from tests.support.small_run import VOCAB, write_data, write_model


def command(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"  {name}:"))
    return shlex.split(line.partition(":")[2])


def test_the_commands_work(tmp_path, capsys):
    write_data(tmp_path)
    model = write_model(tmp_path, tied=True)
    run = tmp_path / "it's here"
    (run / "checkpoint-300").mkdir(parents=True)
    text = next_steps(run, model, 300)
    python, _, code = command(text, "try it")
    assert python == "python"
    exec(code, {})
    assert "YOUR PROMPT" in capsys.readouterr().out
    words = command(text, "evaluate it")
    assert words[:2] == ["python", "launch/evaluate.py"]
    options = parse(words[2:])
    assert (Path(options.model), options.data) == (model, ["ROWS.jsonl"])
    words = command(text, "train further")
    assert early.read(early.Source(words[words.index("with") + 1 :], "")) == {
        "resume_from_checkpoint": f"{tmp_path}/it's here",
        "max_steps": 600,
    }
    words = command(next_steps(run, model, 300, adapter=True), "merge it")
    assert words[:3] == ["mv", f"{model}", f"{model}-adapter;"]
    assert "train further" not in next_steps(tmp_path, model, 300, adapter=True), "there is no checkpoint"


@pytest.mark.parametrize("prior", [None, torch.linspace(0, 2, VOCAB) / VOCAB])
def test_the_adapter_of_a_base_in_4_bits_is_merged_by_peft(tmp_path, prior):
    write_data(tmp_path)
    path = write_model(tmp_path, tied=False)
    base = AutoModelForCausalLM.from_pretrained(path)
    adapted = with_adapter(base, SftOptions(model=str(path), lora_rank=2, lora_targets=["q_proj"]), 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    base.config.label_smoothing = 0.1
    save_adapter(adapted, {name: p for name, p in adapted.named_parameters() if p.requires_grad}, tmp_path / "it's")
    if prior is not None:
        save_file({"prior": prior}, tmp_path / SMOOTHING_PRIOR)
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path / "it's")
    text = next_steps(tmp_path, tmp_path / "it's", 300, adapter=True, four_bit=True)
    exec(command(text, "merge it")[2], {})
    merged, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "it's-merged"), torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "it's-merged").eos_token_id is not None
    assert merged.config.label_smoothing == 0.1
    assert prior is None if exported_prior(merged) is None else torch.equal(exported_prior(merged), prior)


def test_a_run_without_a_checkpoint_is_trained_further_from_its_model(tmp_path):
    words = command(next_steps(tmp_path, tmp_path / "model", 300), "train further")
    assert words[words.index("with") + 1 :][:2] == ["--model", f"{tmp_path}/model"]
    assert "--resume_from_checkpoint" not in words


LOGS = {"loss": 1.0, "nll": 1.0, "accuracy": 0.5, "learning_rate": 0.1, "tokens_per_second": 10.0}


@pytest.mark.parametrize(
    ("first", "step", "times"),
    [
        (0, 10, "0:01:40 elapsed, 0:48:20 left"),
        (100, 110, "0:01:40 elapsed, 0:31:40 left"),  # resumed: what an earlier start did says nothing of the speed
        (0, 300, "0:01:40 elapsed, 0:00:00 left"),
        (0, 0, "0:01:40 elapsed"),
    ],
)
def test_a_line_says_how_long_it_takes(monkeypatch, capsys, first, step, times):
    now = [50.0]
    monkeypatch.setattr(logging.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logging.sys.stderr, "isatty", lambda: False)
    progress = logging.Progress()
    state = SimpleNamespace(global_step=first, max_steps=300, is_world_process_zero=True)
    progress.on_train_begin(None, state, None)
    now[0] += 100.0
    state.global_step = step
    progress.on_log(None, state, None, logs=LOGS)
    assert capsys.readouterr().out.endswith(f"10 tokens/s  {times}\n")
