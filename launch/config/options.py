"""What this project adds to `transformers.TrainingArguments`: each flag with its default and its line of help.

A class of flags is a group of `--help`; `SftOptions` is all of them. A recipe's keys are the same names.
"""

import json
import math
import os
from dataclasses import dataclass, field, fields

from launch.common.errors import UserError
from launch.config.chat_template import NONE, read_chat_template, reserved
from launch.config.columns import column_names
from launch.config.smoothing_prior import prior_name_problem


@dataclass
class LossFlags:
    """What is minimised, and what it is computed from."""

    _argument_group_name = "loss"

    smoothing: float = field(default=0.1, metadata={"help": "Label smoothing, in [0, 1]."})
    smoothing_prior: str = field(
        default="uniform",
        metadata={
            "help": "Where the mass of the smoothing goes. uniform: to all of the vocabulary alike. unigram: as "
            "often as each token is a training label. Or a distribution over the vocabulary, .npy or .safetensors.",
            "metavar": "uniform|unigram|FILE",
        },
    )
    z_loss: float = field(
        default=0.0,
        metadata={"help": "Weight of a z-loss, the square of each token's log of the sum of exp(logits)."},
    )
    head: str = field(
        default="fused",
        metadata={
            "help": "What the loss is computed from. fused: hidden states, without logits. "
            "sharded: each rank's own logits, never gathered. "
            "dense: gathered logits and F.cross_entropy, the baseline to compare with.",
            "choices": ["fused", "sharded", "dense"],
        },
    )
    chunk_bytes: int | None = field(
        default=None,
        metadata={"help": "Memory for the fused head's logits at a time (default: a part of the weight's size)."},
    )


@dataclass
class ModelFlags:
    """The model to train: loaded, or built with random weights."""

    _argument_group_name = "model"

    model: str | None = field(
        default=None,
        metadata={
            "help": "Path or hub name. Without it one is built from --model_config.",
            "metavar": "PATH|NAME",
        },
    )
    model_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Configuration of a model of random weights: model_type, ...",
            "metavar": "JSON",
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention of transformers (default: the model's, mostly sdpa).",
            "choices": ["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"],
        },
    )
    tokenizer_size: int = field(
        default=4000, metadata={"help": "Vocabulary of the SentencePiece tokenizer trained for --model_config."}
    )
    resize_embeddings: bool = field(
        default=False,
        metadata={"help": "Add rows to embedding and output head for tokens of the tokenizer that have none."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Let a hub model run code of its own."})


@dataclass
class AdapterFlags:
    """Few weights beside frozen ones: LoRA, in the names and the files of peft."""

    _argument_group_name = "adapter"

    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank alone; 0: all weights."})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "What is learned is scaled by this over the rank (default: twice the rank)."},
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of what an adapter is given."})
    lora_targets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Linear layers that are adapted, by the ends of their names, such as q_proj v_proj (default: "
            "all-linear, which is all but the output head).",
            "metavar": "NAME",
            "action": "extend",
        },
    )
    dora: bool = field(default=False, metadata={"help": "DoRA: also learn the length of each weight's rows."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the linear layers of the frozen model in 4 bits (QLoRA), by bitsandbytes."},
    )
    merge_adapter: bool = field(
        default=False, metadata={"help": "Export a whole model, with what was learned added to its weights."}
    )


@dataclass
class DataFlags:
    """The rows to train and to evaluate on."""

    _argument_group_name = "data"

    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "JSONL, JSON, Parquet, CSV, directories of them, or hub names; rows of several are concatenated. "
            "Without it: docstrings of the Python standard library.",
            "metavar": "PATH|NAME",
            "action": "extend",
        },
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of each --data in the rows of an epoch, which has as many rows as all of them together; "
            "rows of a source come again, or in a later epoch (default: each row once).",
        },
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "Usable rows to take of each --data, from its beginning (default: all)."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns that are read under other names, as in prompt=question,completion=answer.",
            "metavar": "NAME=COLUMN",
            "action": "extend",
        },
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template to use instead of the tokenizer's, a Jinja file. "
            "none: questions and instructions are written as text although the tokenizer has a template.",
            "metavar": "FILE|none",
        },
    )
    chat_template_kwargs: dict | str | None = field(
        default=None,
        metadata={"help": "What the chat template is given besides, such as enable_thinking.", "metavar": "JSON"},
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out rows. Without it a part of --data.", "metavar": "PATH|NAME"}
    )
    eval_fraction: float = field(default=0.05, metadata={"help": "Share of --data held out without --eval_data."})
    max_length: int = field(default=512, metadata={"help": "Longest row in tokens; longer prompts lose their start."})
    packing: bool = field(
        default=False,
        metadata={"help": "Put several rows into a sequence of --max_length tokens; no row attends to another."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read and tokenise --data while training, instead of preparing all of it; with --max_steps."
        },
    )
    shuffle_buffer: int = field(
        default=10000,
        metadata={"help": "With --streaming: rows that are read and then taken in random order; 0: in the data's."},
    )
    strict: bool = field(default=False, metadata={"help": "Stop at the first row that cannot be used."})
    max_dropped: float = field(
        default=0.2, metadata={"help": "Stop if more than this share of the rows cannot be used."}
    )
    data_workers: int | None = field(
        default=None,
        metadata={"help": "Processes that prepare rows (default: one a core); 0: none beside the first rank's own."},
    )
    data_cache: str | None = field(
        default=None,
        metadata={
            "help": "Directory for prepared rows, which a later run finds there (default: in that of datasets).",
            "metavar": "DIRECTORY",
        },
    )
    preview: int = field(
        default=0,
        metadata={"help": "Show so many rows, with what is learned of them, in an HTML page, and stop; 0: train."},
    )


@dataclass
class ParallelismFlags:
    """How the model and its optimizer are spread over ranks."""

    _argument_group_name = "parallelism"

    tp: int = field(default=1, metadata={"help": "Tensor-parallel ranks that share each layer and the vocabulary."})
    zero: int | None = field(
        default=None,
        metadata={"help": "ZeRO stage, from ds_configs/ (default: 1 unless --deepspeed).", "choices": [0, 1, 2, 3]},
    )
    offload: bool = field(
        default=False, metadata={"help": "With --zero 3: keep optimizer and parameters on the CPU."}
    )


@dataclass
class RunFlags:
    """How a run starts, what it shows, and when it stops."""

    _argument_group_name = "run"

    recipe: str | None = field(
        default=None,
        metadata={"help": "YAML file of any of these keys; flags override it.", "metavar": "FILE"},
    )
    sanity: bool = field(default=False, metadata={"help": "Check this run on one device instead of starting it."})
    samples: int = field(default=3, metadata={"help": "Held-out prompts to complete and show at the end."})
    eval_calibration: bool = field(
        default=False,
        metadata={"help": "Also measure at evaluations how far probabilities can be believed: ECE, Brier score, ..."},
    )
    no_report: bool = field(default=False, metadata={"help": "Write no report.html at the end."})
    on_nonfinite: str = field(
        default="stop",
        metadata={
            "help": "What to do at a step whose loss or gradient is not finite, before its update is made. "
            "stop: end the run. skip: leave the step out on all ranks.",
            "choices": ["stop", "skip"],
        },
    )
    stall_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds without progress on a rank after which the run stops and says where; 0: never."},
    )


GROUPS = (LossFlags, ModelFlags, AdapterFlags, DataFlags, ParallelismFlags, RunFlags)


@dataclass
class SftOptions(RunFlags, ParallelismFlags, DataFlags, AdapterFlags, ModelFlags, LossFlags):
    """All options of this project."""

    def __post_init__(self) -> None:
        if isinstance(self.data, str):
            self.data = [self.data]
        if isinstance(self.model_config, str):
            self.model_config = _json_object(self.model_config, "--model_config")
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = _json_object(self.chat_template_kwargs, "--chat_template_kwargs")


def check_options(options: SftOptions) -> None:
    """Raise `UserError` for a value out of its range, or two that contradict each other."""
    if not 0.0 <= options.smoothing <= 1.0:
        raise UserError(f"--smoothing must lie in [0, 1], got {options.smoothing}")
    if problem := _loss_problem(options):
        raise UserError(problem)
    if options.chunk_bytes is not None:
        from smoothing.linear.chunks import chunk_bytes_problem  # imports torch

        if problem := chunk_bytes_problem(options.chunk_bytes):
            raise UserError(f"--{problem}")
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
    if problem := _data_problem(options) or _adapter_problem(options):
        raise UserError(problem)
    column_names(options.columns)
    if options.chat_template not in (None, NONE):
        read_chat_template(options.chat_template)
    if isinstance(options.chat_template_kwargs, dict) and (name := reserved(options.chat_template_kwargs)):
        raise UserError(f"--chat_template_kwargs: {name} is an argument of apply_chat_template, not of a template")
    if options.preview < 0:
        raise UserError(f"--preview must be at least 0 rows, got {options.preview}")
    if options.preview and options.sanity:
        raise UserError("--preview and --sanity each stop before training; give one")
    if not options.stall_timeout >= 0:
        raise UserError(f"--stall_timeout must be at least 0 seconds, got {options.stall_timeout}")
    if options.offload and options.zero != 3:
        raise UserError(f"--offload goes with --zero 3, got --zero {options.zero}")


def _loss_problem(options: SftOptions) -> str | None:
    if not 0.0 <= options.z_loss < math.inf:
        return f"--z_loss must be a finite number of at least 0, got {options.z_loss}"
    if options.z_loss and options.head == "dense":
        return "--z_loss cannot be used with --head dense, which is F.cross_entropy; use --head fused or sharded"
    return prior_name_problem(options.smoothing_prior, options.smoothing, options.head, options.streaming)


def _data_problem(options: SftOptions) -> str | None:
    weights, sources = options.data_weights, options.data or []
    if weights and not sources:
        return "--data_weights goes with --data, which is not given"
    if weights and len(weights) != len(sources):
        return f"--data_weights: expected {len(sources)}, one for each --data, got {len(weights)}"
    if weights and not all(0 < weight < math.inf for weight in weights):
        return f"--data_weights must be above 0, got {' '.join(map(str, weights))}; leave a source of weight 0 out"
    if weights and options.packing:
        return "--data_weights cannot be used with --packing: packed sequences hold each row once"
    if options.streaming and (problem := _streaming_problem(options)):
        return problem
    if options.shuffle_buffer < 0:
        return f"--shuffle_buffer must be at least 0 rows, got {options.shuffle_buffer}"
    if options.shuffle_buffer != DataFlags.shuffle_buffer and not options.streaming:
        return "--shuffle_buffer goes with --streaming; other data are shuffled as a whole"
    places = [source if "\0" in source else os.path.realpath(source) for source in sources]
    if len(set(places)) < len(places):
        twice = sources[places.index(max(places, key=places.count))]
        return f"--data names {twice} twice; use --data_weights to take a source more often"
    if options.max_rows is not None and options.max_rows < 1:
        return f"--max_rows must be at least 1, got {options.max_rows}"
    if not 0.0 <= options.max_dropped <= 1.0:
        return f"--max_dropped must lie in [0, 1], got {options.max_dropped}"
    if options.data_workers is not None and options.data_workers < 0:
        return f"--data_workers must be at least 0, got {options.data_workers}"
    return None


def _streaming_problem(options: SftOptions) -> str | None:
    if not options.data:
        return "--streaming reads --data, and there is none; leave out --streaming for the docstrings"
    if options.data_weights:
        return "--data_weights cannot be used with --streaming, which reads one source after the other"
    if options.packing:
        return "--packing cannot be used with --streaming: sequences are planned from the lengths of all rows"
    if options.max_rows is not None:
        return "--max_rows cannot be used with --streaming; --max_steps says how many rows are read"
    return None


def _adapter_problem(options: SftOptions) -> str | None:
    if options.lora_rank < 0:
        return f"--lora_rank must be at least 0, got {options.lora_rank}"
    if not options.lora_rank:
        given = [f.name for f in fields(AdapterFlags) if getattr(options, f.name) != f.default]
        return f"--{given[0]} goes with --lora_rank, which is not given" if given else None
    if options.resize_embeddings:
        return "--resize_embeddings cannot be used with --lora_rank: the rows that it adds would stay untrained"
    if options.lora_alpha is not None and options.lora_alpha < 1:
        return f"--lora_alpha must be at least 1, got {options.lora_alpha}"
    if not 0.0 <= options.lora_dropout < 1.0:
        return f"--lora_dropout must lie in [0, 1), got {options.lora_dropout}"
    if options.load_in_4bit and options.merge_adapter:
        return (
            "--merge_adapter cannot be used with --load_in_4bit: the weights to add to are rounded to 4 bits; leave "
            "it out, and merge the adapter into the model of --model with peft"
        )
    if options.model_config:
        return "--lora_rank adapts a trained model, and that of --model_config has random weights; give --model"
    return None


def _json_object(text: str, flag: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{flag} must be a JSON object, got {type(value).__name__}")
    return value
