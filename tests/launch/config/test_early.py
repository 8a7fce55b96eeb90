"""A mistake in the flags is told before torch is imported, in the same words, with the right flag's name."""

import json
import os
import subprocess
import sys
from dataclasses import fields

import pytest

from launch.common.errors import UserError
from launch.config import early, hints
from launch.config.command_line import _Parser, parse_options
from launch.config.options import SftOptions
from launch.config.settings import Source, combine
from launch.config.training_arguments import SftTrainingArguments
from tests.support.processes import ROOT

SCRIPT = str(ROOT / "launch/sft.py")
FIELDS = {f.name for kind in (SftOptions, SftTrainingArguments) for f in fields(kind) if f.init}


def test_flags_are_those_of_the_parser():
    """Whatever the source of the classes says, no flag is unknown here that is known there, or of another type."""
    parser = {action.dest: action for action in _Parser(Source([], "command line"), False)._actions}
    known = early.flags()
    assert known.keys() >= FIELDS and known["head"].choices == ("fused", "sharded", "dense")
    for name, flag in known.items():
        if name not in FIELDS:
            continue
        action = parser[name]
        assert tuple(action.choices or ()) == flag.choices or not flag.choices
        assert (action.nargs == "+") <= flag.takes_several
        for kind in ("int", "float"):
            assert (flag.kinds in ({kind}, {f"list[{kind}]"})) == (
                action.type in (int, float) and action.type.__name__ == kind
            ), name
        assert (flag.kinds == {"bool"}) <= (action.nargs == 0 or action.type.__name__ == "string_to_bool")


ACCEPTED = [
    ["--bf16", "--max_steps", "-1", "--learning-rate=1e-3", "--no_average_tokens_across_devices"],
    ["--report_to", "tensorboard", "wandb", "--bf16", "no", "--local_rank=0", "--zero", "3", "--offload"],
    ["--model_config", '{"model_type": "llama"}', "--accelerator_config", '{"split_batches": false}'],
    ["--logging_steps", "0.5", "--eval_strategy", "no", "--label_names", "labels"],
]


@pytest.mark.parametrize("argv", ACCEPTED, ids=" ".join)
def test_what_is_taken_is_taken_early(argv):
    options, training = parse_options(argv)
    early_options, early_training = combine(argv, early.read)
    assert early_options == options
    assert {name: training[name] for name in early_training if name in ("max_steps", "bf16")} == {
        name: value for name, value in early_training.items() if name in ("max_steps", "bf16")
    }


MISTAKES = [
    (["--epochs", "3"], "unknown key 'epochs'; did you mean 'num_train_epochs'?"),
    (["--smothing", "0.1"], "unknown key 'smothing'; did you mean 'smoothing'?"),
    (["--max_steps", "many"], "--max_steps must be a whole number, got 'many'"),
    (["--smoothing", "much"], "--smoothing must be a number, got 'much'"),
    (["--bf16", "perhaps"], "--bf16 must be true or false, got 'perhaps'"),
    (["--head", "round"], "--head must be one of fused, sharded, dense, got 'round'"),
    (["--zero", "4"], "--zero must be one of 0, 1, 2, 3, got '4'"),
    (["--max_steps"], "--max_steps needs a value"),
    (["--eval_data", "a.jsonl", "b.jsonl"], "'b.jsonl' follows no flag"),
    (["--lr_scheduler_type", "cosin"], "--lr_scheduler_type must be one of linear, cosine, "),
    (["--optim", "adam"], "--optim must be one of adamw_torch, adamw_torch_fused, "),
    (["--eval_strategy", "never"], "--eval_strategy must be one of no, steps, epoch, got 'never'"),
    (["--save_strategy", "Best"], "--save_strategy must be one of no, steps, epoch, best, got 'Best'"),
    (["--smoothing", "2"], "--smoothing must lie in [0, 1], got 2.0"),
    (["--learning_rate", "nan"], "--learning_rate must be a finite number of at least 0"),
    (["--label-smoothing-factor", "0.1"], "--smoothing is the only smoothing knob"),
    (["--recipe", "nowhere.yaml"], "no recipe at nowhere.yaml"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=lambda value: str(value)[:30])
def test_mistakes(argv, words):
    said = []
    for read in (lambda: parse_options(argv), lambda: combine(argv, early.read)):
        with pytest.raises(UserError) as error:
            read()
        said.append(str(error.value))
    assert said[0] == said[1] and words in said[0]


def test_no_torch_and_no_transformers_are_imported_for_it():
    code = f"""
import runpy, sys, json
sys.argv = [{SCRIPT!r}, "--epochs", "3"]
try:
    runpy.run_path({SCRIPT!r}, run_name="__main__")
except SystemExit as end:
    print(json.dumps([end.code, sorted({{"torch", "transformers", "deepspeed"}} & sys.modules.keys())]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert json.loads(done.stdout) == [2, []]
    assert done.stderr == "error: command line: unknown key 'epochs'; did you mean 'num_train_epochs'?\n"


RANKS = [
    (["--tp", "3"], "tensor parallelism 3 does not divide the 4 processes"),
    (["--deepspeed", "nowhere.json"], "--deepspeed nowhere.json is not a readable JSON file"),
    (["--deepspeed", SCRIPT], "expected a JSON object, got str"),
    (["--deepspeed", str(ROOT / "ds_configs/zero2.json"), "--zero", "2"], "already sets the ZeRO stage"),
]


@pytest.mark.parametrize(("argv", "words"), RANKS, ids=lambda value: str(value)[-30:])
def test_mistakes_of_ranks_and_files(argv, words, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as end:
        early.end_on_mistake(argv, lambda: None)
    assert end.value.code == 2 and words in capsys.readouterr().err
    early.end_on_mistake(["--tp", "3", "--sanity"], lambda: None)  # it starts ranks of its own


def test_a_process_that_does_not_know_its_rank(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")

    def contradiction() -> None:
        raise UserError("RANK is 0, but srun says 3")

    with pytest.raises(SystemExit) as end:
        early.end_on_mistake([], contradiction)
    assert end.value.code == 2 and capsys.readouterr().err == "error: RANK is 0, but srun says 3\n"


def test_a_no_that_yaml_reads_as_false(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: somewhere\neval_strategy: no\n")
    with pytest.raises(UserError, match=r"recipe.yaml:2: .* got 'false'; YAML reads no as false, so write \"no\""):
        parse_options(["--recipe", str(tmp_path / "recipe.yaml")])


def test_a_mistake_in_a_recipe_is_told_with_its_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("# a comment\nmodel: somewhere\n\nmodel_config_:\n  a: 1\nepochs: 3\nsmoothing: 0.1\n")
    with pytest.raises(UserError, match=r"recipe\.yaml:4: unknown key 'model_config_'; did you mean 'model_config'"):
        parse_options(["--recipe", str(path)])
    path.write_text("model: somewhere\nmax_steps: 3\nsmoothing: much\n")
    with pytest.raises(UserError, match=r"recipe\.yaml:3: --smoothing must be a number, got 'much'"):
        parse_options(["--recipe", str(path)])


def test_words_of_other_tools_lead_to_flags_that_exist():
    assert hints.ELSEWHERE.keys() <= FIELDS
    words = [word for group in (*hints.ELSEWHERE.values(), *hints.NOT_OFFERED.values()) for word in group.split()]
    assert len(words) == len(set(words)) and FIELDS.isdisjoint(words)
    assert hints.MORE.keys() <= set(words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resume", "'resume_from_checkpoint'? (the same command with the same --output_dir resumes by itself)"),
        ("lora_r", "'lora_rank'?"),
        ("lora-r", "'lora_rank'?"),
        ("qlora", "only the base of adapters is quantised: --lora_rank 16 --load_in_4bit true"),
        ("do_eval_only", "'eval_strategy'? (a run trains; "),
        ("epochs", "'num_train_epochs'?"),
        ("epoch", "'num_train_epochs'?"),
        ("batch_size", "'per_device_train_batch_size'?"),
        ("batchsize", "'per_device_train_batch_size'?"),
        ("lr", "'learning_rate'?"),
        ("LR", "'learning_rate'?"),
        ("max_seq_len", "'max_length'?"),
        ("class_weights", "class weights are not offered"),
        ("num_gpus", "stands before the script"),
        ("learning_rat", "'learning_rate'?"),
        ("modle", "'model'?"),
        ("cpu", "'use_cpu'?"),
        ("eps", "'adam_epsilon'?"),
        ("eval_only", "launch/evaluate.py --model DIR"),
        ("subset", "'data'? (--data owner/name:config:split)"),
        ("num_processes", "stands before the script"),
        ("tokenizer_name", "the tokenizer is the model's own"),
        ("flash_attention_2", "'attn_implementation'?"),
        ("save_model", "; see --help"),  # and not save_only_model, which is refused
        ("push", "nothing is uploaded"),
        ("bits", "; see --help"),  # alike to short words that mean something else
        ("qqqq", "; see --help"),
    ],
)
def test_hints(name, words):
    assert hints.unknown_key(name, early.flags()).startswith(f"unknown key {name!r}; ")
    assert words in hints.unknown_key(name, early.flags())


def test_without_evaluations_there_is_none_before_the_first_step():
    assert parse_options(["--eval_strategy", "no"])[1]["eval_on_start"] is False
    assert parse_options(["--eval_strategy", "no", "--eval_on_start", "true"])[1]["eval_on_start"] is True
    assert "eval_on_start" not in parse_options(["--eval_strategy", "epoch"])[1]
