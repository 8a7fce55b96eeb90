"""What a run is told: flags over a recipe over defaults, every key known, every value of its type."""

import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from launch.common.errors import UserError
from launch.common.messages import did_you_mean
from launch.config.training_arguments import check_values
from smoothing.linear_loss import chunk_bytes_problem

DEFAULT_RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "default.yaml"
REFUSED = {
    "label_smoothing_factor": (
        "--smoothing is the only smoothing knob: label_smoothing_factor makes transformers.Trainer smooth the logits "
        "it sees, which under tensor parallelism are one rank's share of the vocabulary (an index error, or a wrong "
        "loss in silence)"
    ),
    "save_only_model": "no run could go on from such checkpoints; the model is exported at the end",
    "ddp_timeout": "--stall_timeout says how long a rank is waited for",
}


@dataclass
class SftOptions:
    """What this recipe adds to `transformers.TrainingArguments`."""

    smoothing: float = field(default=0.1, metadata={"help": "Label smoothing, in [0, 1]."})
    head: str = field(
        default="fused",
        metadata={
            "help": "Where the loss is taken. fused: from hidden states, without logits. "
            "sharded: each rank's own logits, never gathered. "
            "dense: gathered logits and F.cross_entropy, the baseline to compare with.",
            "choices": ["fused", "sharded", "dense"],
        },
    )
    chunk_bytes: int | None = field(
        default=None,
        metadata={"help": "What the fused head's logits may take at a time; by default a part of the weight's size."},
    )
    model: str | None = field(
        default=None, metadata={"help": "Path or hub name. Without it a model is built from --model_config."}
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={"help": "A model's configuration (JSON): model_type, hidden_size, ...; random weights."},
    )
    tokenizer_size: int = field(
        default=4000, metadata={"help": "Vocabulary of the SentencePiece tokenizer trained for --model_config."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let a hub model run code of its own."})
    data: str | None = field(
        default=None,
        metadata={"help": "JSONL, JSON, Parquet, CSV, a directory of them, or a hub name. Without it: docstrings."},
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out rows. Without it a part of --data."})
    eval_fraction: float = field(default=0.05, metadata={"help": "Share of --data held out without --eval_data."})
    max_length: int = field(default=512, metadata={"help": "Longest row in tokens; longer prompts lose their start."})
    strict: bool = field(default=False, metadata={"help": "Stop at the first row that cannot be used."})
    tp: int = field(default=1, metadata={"help": "Tensor-parallel ranks that share each layer and the vocabulary."})
    zero: int | None = field(
        default=None,
        metadata={"help": "ZeRO stage 0 to 3, from ds_configs/ (1 unless --deepspeed).", "choices": [0, 1, 2, 3]},
    )
    offload: bool = field(
        default=False, metadata={"help": "With --zero 3: keep optimizer and parameters on the CPU."}
    )
    samples: int = field(default=3, metadata={"help": "Held-out prompts to complete and show at the end."})
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What to do at a step whose loss or gradient is not finite. stop: end the run there, its update "
            "not made. skip: leave the step out on all ranks and go on.",
            "choices": ["stop", "skip"],
        },
    )
    stall_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds without progress on a rank after which the run stops and says where; 0: never."},
    )
    sanity: bool = field(default=False, metadata={"help": "Check this run on one device instead of starting it."})
    recipe: str | None = field(default=None, metadata={"help": "YAML file of any of these keys; flags override it."})

    def __post_init__(self):
        if isinstance(self.model_config, str):
            self.model_config = _json_object(self.model_config, "--model_config")


@dataclass
class SftTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with this recipe's defaults."""

    output_dir: str | None = field(default=None, metadata={"help": "Default: the next numbered directory in runs/."})
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.03
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 4
    per_device_eval_batch_size: int = 8
    logging_steps: float = 10
    eval_strategy: str = "epoch"
    eval_on_start: bool = True
    save_strategy: str = "steps"
    save_steps: float = 0.1  # of all steps
    save_total_limit: int | None = 2
    report_to: str | list[str] = "none"
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    prediction_loss_only: bool = True
    remove_unused_columns: bool = False  # the collator keeps what the model takes, and where rows come from
    average_tokens_across_devices: bool = True
    metric_for_best_model: str | None = "eval_nll"

    def __post_init__(self):
        if self.greater_is_better is None:  # transformers would have it by the name: anything but a "loss"
            self.greater_is_better = "accuracy" in (self.metric_for_best_model or "")
        super().__post_init__()


def parse_options(argv: Sequence[str]) -> tuple[SftOptions, dict]:
    """Flags and recipe as `SftOptions` and the keyword arguments of `SftTrainingArguments`.

    The latter stay a dict until the DeepSpeed configuration is known: `TrainingArguments` starts the process group.
    Raises `UserError` for an unknown key, a value of the wrong type, or a refused one.
    """
    flags = _parse(argv, "command line", add_help=True)
    recipe = _recipe_path(flags)
    values = _parse(_recipe_argv(recipe), str(recipe), add_help=False) if recipe else {}
    for given, other in (("model", "model_config"), ("model_config", "model")):
        if given in flags:
            values.pop(other, None)  # a flag for one source of the model overrides a recipe's other one
    values |= flags
    values["recipe"] = str(recipe) if recipe else None
    own = {f.name for f in fields(SftOptions)}
    options = SftOptions(**{name: value for name, value in values.items() if name in own})
    _check(options)
    training_values = {name: value for name, value in values.items() if name not in own}
    check_values(training_values)
    return options, training_values


def resolved(options: SftOptions, training: TrainingArguments, deepspeed: str | None) -> dict:
    """What this run was told, as a recipe that says it again; `deepspeed`: the user's own file, if any."""
    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    changed = {name: value for name, value in training.to_dict().items() if defaults.get(name, MISSING) != value}
    # of this machine or this run alone, secret, or an argument that is no value
    derived = {"recipe", "sanity", "output_dir", "hub_token", "use_cpu", "dataloader_pin_memory"}
    values = asdict(options) | changed | {"deepspeed": deepspeed}
    return {name: v for name, v in values.items() if name not in derived and v is not None and v != []}


class _Parser(HfArgumentParser):
    """Reports mistakes as `UserError` and guesses no abbreviations."""

    def __init__(self, where: str, add_help: bool):
        types = (SftOptions, SftTrainingArguments)
        super().__init__(types, prog="sft.py", allow_abbrev=False, add_help=add_help)
        self.where = where
        self.description = "Fine-tune a causal LM with a label-smoothed loss whose vocabulary is sharded over ranks."

    def error(self, message: str):
        raise UserError(f"{self.where}: {message}")


def _parse(argv: Sequence[str], where: str, add_help: bool) -> dict:
    """Only what `argv` says, of its type."""
    parser = _Parser(where, add_help)
    given, unknown = parser.parse_known_args(list(argv))
    known = {action.dest for action in parser._actions}
    for word in unknown:
        raise UserError(_unknown_key(word, known, where))
    names = {word.split("=")[0].lstrip("-").replace("-", "_") for word in argv if word.startswith("--")}
    for name in names & REFUSED.keys():
        raise UserError(f"{where}: {name}: {REFUSED[name]}")
    names = {name.removeprefix("no_") if name not in known else name for name in names}
    return {name: value for name, value in vars(given).items() if name in names and name != "local_rank"}


def _unknown_key(word: str, known: set[str], where: str) -> str:
    name = word.split("=")[0].lstrip("-")
    if not word.startswith("-"):
        return f"{where}: {word!r} stands after no flag; every value belongs to one, as in --data train.jsonl"
    return f"{where}: unknown key {name!r}{did_you_mean(name, known) or '; see --help'}"


def _recipe_path(flags: dict) -> Path | None:
    """The recipe to start from: the one named, or the embedded default unless a model is named."""
    if flags.get("recipe"):
        return Path(flags["recipe"])
    return None if flags.get("model") or flags.get("model_config") else DEFAULT_RECIPE


class _RecipeLoader(yaml.SafeLoader):
    """`yaml.safe_load`, but a key that stands twice is a mistake, and so is an alias, of which few make gigabytes."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            line = self.peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                line = node.value[index][0].start_mark.line + 1
                raise yaml.YAMLError(f"line {line}: {key!r} stands there a second time")
        return super().construct_mapping(node, deep)


def _recipe_argv(path: Path) -> list[str]:
    """A recipe's keys and values as flags, so that they are held to the same types."""
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader) or {}
    except FileNotFoundError:
        raise UserError(f"no recipe at {path}; recipes/ holds the ones that come with this project") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as fault:
        raise UserError(f"{path} is not a readable YAML file: {fault}") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: expected a mapping of keys to values, got {type(recipe).__name__}")
    argv = []
    for key, value in recipe.items():
        if key in ("recipe", "local_rank") or not isinstance(key, str):
            raise UserError(f"{path}: {key!r} cannot stand in a recipe")
        if value is None:
            continue
        try:
            words = [_word(v) for v in (value if isinstance(value, list) else [value])]
        except (TypeError, ValueError, RecursionError) as fault:
            raise UserError(f"{path}: {key} holds what no flag can: {fault}") from None
        argv += [f"--{key}", *words]
    return argv


def _word(value) -> str:
    """A recipe's value as it would stand on the command line."""
    if isinstance(value, dict | list):
        return json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _json_object(text: str, flag: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{flag} is not JSON: {fault}") from None
    if not isinstance(value, dict):
        raise UserError(f"{flag} must be a JSON object, got {type(value).__name__}")
    return value


def _check(options: SftOptions) -> None:
    if not 0.0 <= options.smoothing <= 1.0:
        raise UserError(f"--smoothing must lie in [0, 1], got {options.smoothing}")
    if fault := chunk_bytes_problem(options.chunk_bytes):
        raise UserError(f"--{fault}")
    if options.tp < 1:
        raise UserError(f"--tp must be at least 1, got {options.tp}")
    if options.model and options.model_config:
        raise UserError("--model and --model_config are two sources of one model; give one")
    if not options.model and not options.model_config:
        raise UserError("no model: give --model (a path or a hub name) or --model_config")
    if not 0.0 <= options.eval_fraction < 1.0:
        raise UserError(f"--eval_fraction must lie in [0, 1), got {options.eval_fraction}")
    if options.samples < 0:
        raise UserError(f"--samples must be at least 0, got {options.samples}")
    if options.max_length < 8:
        raise UserError(f"--max_length must be at least 8, got {options.max_length}")
    if not options.stall_timeout >= 0:
        raise UserError(f"--stall_timeout must be at least 0 seconds, got {options.stall_timeout}")
    if options.offload and options.zero != 3:
        raise UserError(f"--offload goes with --zero 3, got --zero {options.zero}")
