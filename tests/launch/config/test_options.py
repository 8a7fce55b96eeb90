"""Flags over a recipe over defaults; every mistake is a sentence that names the key."""

import datetime
import json
import re
from dataclasses import asdict, fields

import pytest
import yaml

from launch.common.errors import UserError
from launch.config.command_line import parse_options
from launch.config.deepspeed import DS_CONFIGS, deepspeed_config
from launch.config.limits import REFUSED
from launch.config.options import SftOptions
from launch.config.recipe import DEFAULT_RECIPE, resolved
from launch.config.training_arguments import HELP, HIDDEN, SftTrainingArguments

MODEL = ("--model", "somewhere")


@pytest.fixture
def recipe(tmp_path):
    def write(**values) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def test_nothing_said_is_the_embedded_default():
    options, training = parse_options([])
    said = yaml.safe_load(DEFAULT_RECIPE.read_text())
    assert options.model_config == said["model_config"]
    assert training["max_steps"] == said["max_steps"] and training["save_total_limit"] == 1


def test_a_model_alone_is_not_given_the_default_recipe():
    options, training = parse_options(MODEL)
    assert options.recipe is None and options.model_config is None and training == {}


def test_flags_override_the_recipe(recipe):
    path = recipe(model="somewhere", smoothing=0.2, learning_rate=1e-3, max_steps=7)
    options, training = parse_options(["--recipe", path, "--smoothing", "0.3", "--max_steps", "9"])
    assert (options.smoothing, training["max_steps"], training["learning_rate"]) == (0.3, 9, 1e-3)


def test_a_model_given_as_a_flag_replaces_the_recipes_configuration(recipe):
    path = recipe(model_config={"model_type": "llama"}, max_steps=3)
    options, training = parse_options(["--recipe", path, *MODEL])
    assert options.model == "somewhere" and options.model_config is None and training["max_steps"] == 3


def test_the_resolved_recipe_says_the_run_again(recipe):
    argv = ["--smoothing", "0.2", "--report_to", "tensorboard", "--max_steps", "5", "--tp", "2"]
    options, training = parse_options(argv)
    written = resolved(options, SftTrainingArguments(output_dir="here", use_cpu=True, **training), None)
    again, training_again = parse_options(["--recipe", recipe(**written)])
    assert asdict(again) | {"recipe": None} == asdict(options) | {"recipe": None}
    assert training_again.items() >= {"max_steps": 5, "learning_rate": training["learning_rate"]}.items()
    assert "output_dir" not in training_again


def test_a_flag_may_run_code_and_the_recipe_of_the_run_does_not_keep_it(recipe):
    options, training = parse_options(
        ["--recipe", recipe(model="somewhere", trust_remote_code=False), "--trust_remote_code"]
    )
    assert options.trust_remote_code
    written = resolved(options, SftTrainingArguments(output_dir="here", use_cpu=True, **training), None)
    again, _ = parse_options(["--recipe", recipe(**written)])
    assert not again.trust_remote_code


def test_a_flag_may_report_to_a_server_and_the_recipe_of_the_run_does_not_keep_it(recipe):
    options, training = parse_options(["--report_to", "wandb"])
    assert training["report_to"] == ["wandb"]
    written = resolved(options, SftTrainingArguments(output_dir="here", use_cpu=True, **training), None)
    assert "report_to" not in parse_options(["--recipe", recipe(**written)])[1]


def test_every_shipped_recipe_parses():
    for path in DEFAULT_RECIPE.parent.glob("*.yaml"):
        options, _ = parse_options(["--recipe", str(path)])
        assert 0 < options.smoothing < 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"smothing": 0.1}, ("unknown key 'smothing'", "'smoothing'")),
        ({"learning_rat": 0.1}, ("'learning_rat'", "'learning_rate'")),
        ({"help": True}, ("unknown key 'help'",)),
        ({"save_only_model": True}, ("save_only_model", "resume")),
        (
            {"model_config": {"model_type": "llama", "when": datetime.date(2026, 1, 1)}, "model": None},
            ("model_config",),
        ),
        ({"smoothing": "much"}, ("smoothing", "much")),
        ({"max_steps": "many"}, ("max_steps", "many")),
        ({"smoothing": 1.5}, ("smoothing", "[0, 1]", "1.5")),
        ({"label_smoothing_factor": 0.1}, ("label_smoothing_factor", "--smoothing")),
        ({"head": "round"}, ("head", "round")),
        ({"zero": 4}, ("zero", "4")),
        ({"tp": 0}, ("tp", "0")),
        ({"chunk_bytes": 0}, ("--chunk_bytes", "at least 1", "0")),
        ({"offload": True, "zero": 2}, ("offload", "--zero 3")),
        ({"recipe": "other.yaml"}, ("recipe",)),
        ({"data_weights": [1.0]}, ("--data_weights goes with --data",)),
        ({"data": ["a", "b"], "data_weights": [1.0]}, ("--data_weights", "expected 2", "got 1")),
        ({"data": ["a", "b"], "data_weights": [1.0, 0.0]}, ("--data_weights", "above 0", "leave a source")),
        ({"data": ["a", "b/../a"]}, ("--data names a twice",)),
        ({"streaming": True}, ("--streaming reads --data", "none")),
        ({"streaming": True, "data": ["a", "b"], "data_weights": [1, 2]}, ("--data_weights", "--streaming")),
        ({"streaming": True, "data": "a", "packing": True}, ("--packing", "--streaming")),
        ({"streaming": True, "data": "a", "max_rows": 5}, ("--max_rows", "--streaming")),
        ({"streaming": True, "data": "a", "shuffle_buffer": -1}, ("--shuffle_buffer", "at least 0", "-1")),
        ({"data": "a", "shuffle_buffer": 5}, ("--shuffle_buffer", "--streaming")),
        ({"model_config": {"model_type": "llama"}}, ("--model", "--model_config")),
        # a recipe is never code, however it is written
        ({"trust_remote_code": True}, ("trust_remote_code", "--trust_remote_code on the command line")),
        ({"trust-remote-code": "yes"}, ("--trust_remote_code on the command line",)),
        ({"trust_remote_code=true": []}, ("trust_remote_code=true", "not one setting")),
        ({"report_to": ["none", "--trust_remote_code"]}, ("report_to", "not one setting")),
        ({"push_to_hub": True}, ("push_to_hub", "command line")),
        ({"hub_token": "secret"}, ("hub_token", "command line")),
        ({"report_to": "wandb"}, ("report_to wandb sends", "--report_to wandb on the command line")),
        ({"report_to": ["tensorboard", "mlflow"]}, ("report_to mlflow sends",)),
        ({"report_to": "all"}, ("report_to all sends",)),
        ({"trackio_space_id": "me/space"}, ("trackio_space_id", "command line")),
        (
            {"model": None, "model_config": {"model_type": "llama", "auto_map": {"AutoConfig": "evil--x.Y"}}},
            ("model_config names auto_map",),
        ),
        (
            {"model": None, "model_config": {"model_type": "gemma3", "text_config": {"_attn_implementation": "a/b"}}},
            ("model_config names _attn_implementation",),
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_mistakes_in_a_recipe(recipe, values, words):
    with pytest.raises(UserError) as error:
        parse_options(["--recipe", recipe(**{"model": "somewhere"} | values)])
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        "seed: 2024-13-45",
        "seed: !!int abc",
        "seed: " + "9" * 5000,
        "[" * 20000,
        "model_config: &a {x: *a}",
        "model_config: {a: !!binary aGk=}",
        "learning_rate: 0.1\nlearning_rate: 0.2",
        "model_config: {a: 1, a: 2}",
        "seed: !!python/object/apply:os.getcwd []",
        "{[1]: 2}",
        "\n".join(
            ["model_config:", "  a: &a1 [1]", *(f"  b{i}: &a{i} [{f'*a{i - 1}, ' * 9}]" for i in range(2, 12))]
        ),
    ],
    ids=lambda text: text[:30],
)
def test_a_file_that_is_no_recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        parse_options(["--recipe", str(path), "--model", "somewhere"])


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"], ids=["deep", "long"])
def test_json_that_no_parser_reads(tmp_path, text):
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a readable JSON"):
        deepspeed_config(SftOptions(model="somewhere"), str(path), 1)
    with pytest.raises(UserError, match="is not JSON"):
        parse_options(["--model_config", text])


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["--smothing", "0.1"], "did you mean 'smoothing'"),
        (["--label_smoothing_factor", "0.1"], "only smoothing knob"),
        (["--label_smoothing_factor=0.1"], "only smoothing knob"),
        (["--label-smoothing-factor", "0.1"], "only smoothing knob"),
        (["train.jsonl"], "follows no flag"),
        (["--recipe", "nowhere.yaml"], "no recipe at nowhere.yaml"),
        (["--model_config", "{"], "not JSON"),
        (["--model_config", "[1]"], "JSON object"),
    ],
)
def test_mistakes_in_flags(argv, word):
    with pytest.raises(UserError, match=word):
        parse_options(argv)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("learning_rate", "nan", "a finite number of at least 0, got nan"),
        ("learning_rate", "-1e-3", "at least 0, got -0.001"),
        ("weight_decay", "inf", "finite"),
        ("adam_beta1", "1", "at least 0 and below 1, got 1"),
        ("adam_beta2", "-0.1", "below 1, got -0.1"),
        ("adam_epsilon", "0", "above 0, got 0"),
        ("max_grad_norm", "-1", "at least 0, got -1"),
        ("warmup_steps", "-1", "at least 0, got -1"),
        ("neftune_noise_alpha", "-1", "at least 0, got -1"),
        ("per_device_train_batch_size", "0", "at least 1, got 0"),
        ("per_device_eval_batch_size", "-2", "at least 1, got -2"),
        ("gradient_accumulation_steps", "0", "at least 1, got 0"),
        ("eval_accumulation_steps", "0", "at least 1, got 0"),
        ("logging_steps", "0", "above 0, got 0"),
        ("eval_steps", "-1", "above 0, got -1"),
        ("save_steps", "nan", "above 0, got nan"),
        ("seed", "-1", "at least 0 and below 2^32, got -1"),
        ("data_seed", "4294967296", "below 2^32, got 4294967296"),
        ("dataloader_num_workers", "-1", "at least 0, got -1"),
        ("max_steps", "0", "at least 1, got 0; leave it out"),
        ("max_steps", "-2", "at least 1, got -2"),
        ("num_train_epochs", "0", "above 0, got 0"),
        ("num_train_epochs", "nan", "above 0, got nan"),
        ("metric_for_best_model", "loss", "one of eval_nll, eval_accuracy, got 'loss'"),
        ("metric_for_best_model", "eval_acc", "got 'eval_acc'"),
        ("fsdp", "full_shard", "not supported"),
        ("push_to_hub", "true", "not supported"),
        ("dataloader_persistent_workers", "true", "different rows"),
        ("ignore_data_skip", "true", "different rows"),
        ("accelerator_config", "{", "not JSON"),
        ("lr_scheduler_kwargs", '{"a": ' + "[" * 100_000, "not JSON"),
    ],
    ids=lambda value: str(value)[:30],
)
@pytest.mark.parametrize("sanity", [False, True])
def test_values_that_no_run_can_be_made_of(name, value, words, sanity):
    with pytest.raises(UserError, match=f"--{name} .*{re.escape(words)}"):
        parse_options([*MODEL, f"--{name}={value}", *["--sanity"] * sanity])


@pytest.mark.parametrize(("metric", "greater"), [("eval_nll", False), ("nll", False), ("accuracy", True)])
def test_the_best_model_is_that_of_the_least_nll_or_the_greatest_accuracy(metric, greater):
    _, training = parse_options([*MODEL, "--metric_for_best_model", metric])
    assert SftTrainingArguments(output_dir="here", use_cpu=True, **training).greater_is_better is greater
    assert SftTrainingArguments(output_dir="here", use_cpu=True).greater_is_better is False


def test_values_at_the_edge_of_what_is_taken():
    edges = {"learning_rate": 0, "adam_beta1": 0, "max_grad_norm": 0, "warmup_steps": 0, "max_steps": -1, "seed": 0}
    _, training = parse_options([*MODEL, *(f"--{name}={value}" for name, value in edges.items())])
    assert training == edges


@pytest.mark.parametrize("text", ["- a\n- b", "a: [", "\x00", "just text"])
def test_a_recipe_that_is_not_one(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        parse_options(["--recipe", str(path)])


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("tp", [1, 2])
def test_built_in_deepspeed_configurations(zero, tp):
    _, config = deepspeed_config(SftOptions(model="somewhere", zero=zero, tp=tp), None, world_size=4)
    assert config["zero_optimization"]["stage"] == zero
    assert config.get("tensor_parallel", {}).get("autotp_size", 1) == tp
    # a value lives in one place: these are the recipe's
    assert config["train_micro_batch_size_per_gpu"] == config["bf16"]["enabled"] == "auto"


@pytest.mark.parametrize(
    ("content", "options", "ranks", "word"),
    [
        ("{", {}, 1, "not a readable JSON"),
        ("[]", {}, 1, "JSON object"),
        ("{}", {"tp": 2}, 2, "autotp_size"),
        ('{"tensor_parallel": {"autotp_size": 4}}', {"tp": 2}, 4, "autotp_size 4, but --tp is 2"),
        ('{"tensor_parallel": {"autotp_size": 4}}', {}, 2, "does not divide"),
        ("{}", {"zero": 1}, 1, "--zero"),
        ('{"tensor_parallel": null}', {}, 1, "tensor_parallel must be an object"),
        ('{"zero_optimization": 2}', {}, 1, "zero_optimization must be an object"),
        ('{"tensor_parallel": {"autotp_size": "2"}}', {}, 2, "autotp_size must be a number"),
    ],
)
def test_mistakes_in_a_deepspeed_file(tmp_path, content, options, ranks, word):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=word):
        deepspeed_config(SftOptions(model="somewhere", **options), str(path), ranks)


def help_text(capsys, flag: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse_options([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


def flags_of(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?--([a-z_0-9-]+)", text, flags=re.M)


OWN = [f.name for f in fields(SftOptions)]
GROUPS = ["loss:", "model:", "data:", "parallelism:", "run:", "training "]


@pytest.mark.parametrize("columns", ["50", "100", "200"])
def test_help_shows_this_projects_flags_first_each_with_a_line(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = help_text(capsys, "--help")
    words, shown = " ".join(text.split()), flags_of(text)
    assert shown[:2] == ["help", "help-all"]
    assert sorted(shown[2 : 2 + len(OWN)]) == sorted(OWN) and sorted(shown[2 + len(OWN) :]) == sorted(HELP)
    places = [re.search(rf"^{name}", text, flags=re.M).start() for name in GROUPS]
    assert places == sorted(places)
    for line in [*HELP.values(), *(f.metadata["help"] for f in fields(SftOptions))]:
        assert " ".join(line.split()[:3]) in words
    assert "(default: 0.1)" in words and "None" not in words and "--help-all lists the rest" in words


def test_help_all_shows_the_rest_but_nothing_that_is_refused(capsys):
    shown = flags_of(help_text(capsys, "--help-all"))
    given = {f.name for f in fields(SftTrainingArguments) if f.init} | set(OWN)
    assert given - set(shown) == HIDDEN & given
    refused = {*REFUSED, "fsdp", "push_to_hub", "ignore_data_skip"}
    assert refused <= HIDDEN and refused.isdisjoint(shown)


@pytest.mark.parametrize("name", ["help", "help-all", "help_all"])
def test_help_is_no_key_of_a_recipe(recipe, name):
    with pytest.raises(UserError, match="unknown key"):
        parse_options(["--recipe", recipe(**{name: True})])


def test_tensor_parallelism_must_divide_the_processes():
    with pytest.raises(UserError, match="tensor parallelism 2 does not divide the 3"):
        deepspeed_config(SftOptions(model="somewhere", tp=2), None, 3)


def test_the_size_of_a_file_is_the_runs_and_the_options_are_left_alone(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"tensor_parallel": {"autotp_size": 4}}')
    given = SftOptions(model="somewhere")
    options, config = deepspeed_config(given, str(path), 4)
    assert (given.tp, options.tp, config["tensor_parallel"]["autotp_size"]) == (1, 4, 4)


def test_a_file_of_ds_configs_takes_its_size_from_the_flag():
    options = SftOptions(model="somewhere", tp=2)
    _, config = deepspeed_config(options, str(DS_CONFIGS / "zero2_tp.json"), 2)
    assert config["tensor_parallel"]["autotp_size"] == 2


def test_every_ds_config_has_a_twin_with_tensor_parallelism():
    for path in DS_CONFIGS.glob("*.json"):
        if not path.stem.endswith("_tp"):
            twin = json.loads((DS_CONFIGS / f"{path.stem}_tp.json").read_text())
            assert twin["zero_optimization"]["stage"] == json.loads(path.read_text())["zero_optimization"]["stage"]
            assert twin["tensor_parallel"]["vocab_parallel_lm_head"] is True
