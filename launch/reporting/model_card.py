"""The model card of an export: what was learned from what, the figures, and how the model is used."""

import json
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import smoothing
from launch.common.messages import counted
from launch.config.chat_template import NONE
from launch.config.options import SftOptions
from launch.data.examples.formats import FORMATS
from launch.data.prepared import EncodedData
from launch.training.trainer import SftTrainer

PACKAGES = ("torch", "transformers", "deepspeed", "peft")
PLAIN = ("text", "prompt/completion")  # formats whose rows no template renders
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
HERE = "MODEL"  # where the card is read from is not known: a directory, or a name on the hub
FIGURES = {
    "eval_nll": ("held-out nll", ".4f"),
    "eval_accuracy": ("accuracy", ".1%"),
    "eval_ece_equal_mass": ("ECE", ".4f"),
    "eval_unsmoothed_ece_equal_mass": ("ECE, unsmoothed", ".4f"),
    "eval_brier": ("Brier score", ".4f"),
}


def model_card(trainer: SftTrainer, tokenizer: Any, data: EncodedData, options: SftOptions) -> str:
    """Return the text of `README.md`, with the hub's metadata in front. No path of this machine is in it."""
    adapter = options.lora_rank > 0 and not options.merge_adapter
    base = _hub_name(options.model)
    sources = [name for name, _ in data.summary.sources]
    metadata = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if adapter else "finetune",
        datasets=[name for name in map(_hub_name, sources) if name] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["label-smoothing", "sft", *(["lora"] if adapter else [])],
    )
    chat = _chats(tokenizer, data, options)
    started = _shown_name(options.model) if options.model else "random weights"
    sections = [
        f"# {'Adapter of' if adapter else 'Fine-tuned from'} {started}",
        f"Trained with a label-smoothed cross entropy, ε = {options.smoothing:g} ({_loss(options)}).",
        "## Trained on",
        *_data(data),
        "## How",
        _table(_recipe(trainer, options)),
        "## Figures on held-out rows",
        _figures(trainer),
        "## Use",
        *_use(tokenizer, options, adapter, chat),
        *_unsmoothing(options, adapter),
        "## Serve with vLLM",
        *_serve(trainer, tokenizer, options, base, adapter),
        "## Versions",
        ", ".join(_versions()) + ".",
    ]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _hub_name(given: str | None) -> str | None:
    """A name on the hub as it is written there; None for a path, or for nothing."""
    if given is None or Path(given).expanduser().exists() or not 0 < given.count("/") < 2:
        return None
    return given.partition("@")[0].partition(":")[0]


def _shown_name(given: str) -> str:
    return _hub_name(given) or Path(given).name


def _chats(tokenizer: Any, data: EncodedData, options: SftOptions) -> bool:
    """Whether the chat template has rendered rows."""
    plain = {*PLAIN, *(name for name, kind in FORMATS.items() if "input_ids" in kind.needs)}
    return (
        bool(tokenizer.chat_template) and options.chat_template != NONE and not plain >= data.summary.formats.keys()
    )


def _loss(options: SftOptions) -> str:
    prior = options.smoothing_prior
    named = {"uniform": "spread over the vocabulary alike", "unigram": "spread as often as tokens are labels"}
    z_loss = f", z-loss {options.z_loss:g}" if options.z_loss else ""
    return named.get(prior, f"spread as in {Path(prior).name}") + z_loss


def _data(data: EncodedData) -> Iterator[str]:
    statistics = data.summary.statistics
    yield _table([(_shown_name(name), f"{rows:,} rows") for name, rows in data.summary.sources])
    first = "Of the first rows of a stream: " if data.streaming is not None else ""
    yield (
        f"{first}{counted(len(data.train), 'row')} to train on, {len(data.heldout):,} held out "
        f"({', '.join(data.summary.formats)}). {statistics.learned:,} of {statistics.tokens:,} tokens are learned; a "
        f"row has {statistics.median:,} tokens in the median and {statistics.longest:,} at most."
    )


def _recipe(trainer: SftTrainer, options: SftOptions) -> list[tuple[str, str]]:
    args, state, facts = trainer.args, trainer.state, trainer.facts
    rows = [
        ("steps", f"{state.global_step:,} ({state.epoch or 0:.2f} epochs), {facts['rows_a_step']:,} rows each"),
        (
            "optimizer",
            f"{_value(args.optim)}, learning rate {args.learning_rate:g}, {_value(args.lr_scheduler_type)}",
        ),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("longest row", f"{options.max_length:,} tokens" + (", packed" if options.packing else "")),
        ("processes", f"{args.world_size}, tensor parallelism {options.tp}, ZeRO {facts['zero']}"),
        ("seed", str(args.seed)),
    ]
    if options.lora_rank:
        kind, where = "DoRA" if options.dora else "LoRA", " ".join(options.lora_targets or ["all linear layers"])
        base = ", its base in 4 bits" if options.load_in_4bit else ""
        rows.append(("adapter", f"{kind} of rank {options.lora_rank} on {where}{base}"))
    return rows


def _value(choice: Any) -> str:
    return str(getattr(choice, "value", choice))


def _figures(trainer: SftTrainer) -> str:
    state = trainer.state
    found = [log for log in state.log_history if "eval_nll" in log]
    if not found:
        return "None: the run has evaluated nothing."
    best = trainer.args.load_best_model_at_end and state.best_model_checkpoint is not None
    exported = state.best_global_step if best else state.global_step
    shown = {log["step"]: log for log in (found[0], *(log for log in found if log["step"] == exported), found[-1])}
    names = [name for name in FIGURES if any(name in log for log in shown.values())]
    rows = [["step", *(FIGURES[name][0] for name in names)], ["---"] * (len(names) + 1)]
    for step, log in sorted(shown.items()):
        figures = [format(log[name], FIGURES[name][1]) if name in log else "" for name in names]
        rows.append([f"{step:,}{' (this model)' if step == exported else ''}", *figures])
    labels = found[-1].get("eval_label_tokens")
    over = f", over {labels:,} label tokens" if labels else ""
    lines = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{lines}\n\nNot smoothed{over}. The weights are those after step {exported:,}."


def _use(tokenizer: Any, options: SftOptions, adapter: bool, chat: bool) -> Iterator[str]:
    prompt = '[{"role": "user", "content": "PROMPT"}]' if chat else '"PROMPT"'
    yield (
        "```python\nfrom transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", "{HERE}")\n'
        f'print(generator({prompt}, max_new_tokens=200)[0]["generated_text"])\n```'
    )
    if adapter:
        yield (
            "transformers loads the base model with the adapter, and so does "
            f'`peft.AutoPeftModelForCausalLM.from_pretrained("{HERE}")`.'
        )
    bos = tokenizer.bos_token
    begins = bos is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    begin = f"The tokenizer begins a text with `{bos}`. " if begins else ""
    yield f"{begin}Generation stops where training has ended answers: `generation_config.json` has the tokens."
    if isinstance(options.chat_template_kwargs, dict) and chat:
        given = ", ".join(f"{name}={value!r}" for name, value in options.chat_template_kwargs.items())
        yield f"Its chats were rendered with `tokenizer.apply_chat_template(messages, {given})`: ask it likewise."


def _unsmoothing(options: SftOptions, adapter: bool) -> Iterator[str]:
    if not 0 < options.smoothing < 1:
        return
    uniform = options.smoothing_prior == "uniform"
    if not uniform and adapter:
        return
    made = f"UnsmoothLogits({options.smoothing:g})" if uniform else "UnsmoothLogits.of(generator.model)"
    yield (
        f"A smoothed model gives about {options.smoothing:g} of the probability to tokens that it holds for wrong. "
        "Where you sample, or read probabilities, take it out:"
    )
    yield (
        "```python\nfrom smoothing.hf import UnsmoothLogits\n\n"
        f"generator(..., do_sample=True, logits_processor=[{made}])\n```"
    )


def _serve(
    trainer: SftTrainer, tokenizer: Any, options: SftOptions, base: str | None, adapter: bool
) -> Iterator[str]:
    if not adapter:
        yield f"```sh\nvllm serve {HERE}\n```"
        yield "It stops and samples as `generation_config.json` says, which vLLM reads unless told otherwise."
    elif options.dora:
        yield "vLLM takes no DoRA: export a whole model with `--merge_adapter true`."
    else:
        rank = next((rank for rank in LORA_RANKS if rank >= options.lora_rank), options.lora_rank)
        template = f" --chat-template {HERE}/chat_template.jinja" if tokenizer.chat_template else ""
        yield (
            f"```sh\nvllm serve {base or 'BASE'} --enable-lora --max-lora-rank {rank} "
            f"--lora-modules tuned={HERE}{template}\n```"
        )
        stops = trainer.model.get_base_model().generation_config.eos_token_id
        tokens = json.dumps(stops if isinstance(stops, list) else [stops])
        yield f'It stops as the base model does: send `"stop_token_ids": {tokens}` with each request for `tuned`.'
    if options.smoothing:
        yield (
            "Sampling there meets the smoothing: cut the unlikely tokens off, as "
            f'`"top_p": {1 - options.smoothing:g}` or `"min_p": 0.02` do, or ask greedily.'
        )


def _versions() -> Iterator[str]:
    yield f"sharded-label-smoothing {smoothing.__version__}"
    for package in PACKAGES:
        try:
            yield f"{package} {version(package)}"
        except PackageNotFoundError:
            continue


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
