"""The flags of `launch/evaluate.py`."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from launch.common.errors import UserError
from launch.common.paths import EVALUATION_FOLDER
from launch.config.options import SftOptions, check_options


@dataclass(frozen=True)
class EvaluationOptions:
    """What is evaluated, on what, and where the figures go."""

    model: str
    data: list[str]
    base: str | None
    tp: int
    output_dir: Path
    smoothing: float | None
    batch_size: int
    bf16: bool
    max_length: int
    max_rows: int | None
    columns: list[str] | None
    chat_template: str | None
    chat_template_kwargs: str | None
    trust_remote_code: bool

    def of_run(self, model: str) -> SftOptions:
        """Return these as a run's options: with all rows, none held out. Raises `UserError`."""
        options = SftOptions(
            model=model,
            data=self.data,
            eval_fraction=0.0,
            head="sharded",  # any model's logits will do
            tp=self.tp,
            max_length=self.max_length,
            max_rows=self.max_rows,
            columns=self.columns,
            chat_template=self.chat_template,
            chat_template_kwargs=self.chat_template_kwargs,
            trust_remote_code=self.trust_remote_code,
        )
        check_options(options)
        return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse(argv: Sequence[str]) -> EvaluationOptions:
    """Return the flags. Raises `UserError` for one that is wrong."""
    parser = _Parser(
        prog="evaluate.py",
        usage="[deepspeed | python] launch/evaluate.py --model MODEL --data FILE [--base MODEL] [--tp N]",
        description="Measure how far a model's probabilities can be believed, and draw it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", required=True, help="The model: a directory or hub name.")
    add("--data", required=True, nargs="+", action="extend", help="Rows to evaluate on, as launch/sft.py reads them.")
    add("--base", help="The model that it was trained from, for comparison; of the same tokenizer.")
    add("--tp", type=int, default=1, help="Ranks that share each layer and the vocabulary (default: 1).")
    add("--output_dir", type=Path, help="Where evaluation.json and figures go (default: evaluation, in --model).")
    add(
        "--smoothing",
        type=float,
        help="Label smoothing it was trained with (default: as its config.json says, or 0).",
    )
    add("--batch_size", type=int, default=8, help="Rows at a time on a rank (default: 8).")
    add("--bf16", type=_true_or_false, default=False, help="Compute in bfloat16 (default: false).")
    add("--max_length", type=int, default=512, help="Longest row in tokens (default: 512).")
    add("--max_rows", type=int, help="Rows to take of each --data (default: all).")
    add("--columns", nargs="+", action="extend", help="Columns read under other names: prompt=question.")
    add("--chat_template", help="Chat template instead of the tokenizer's, a file; or none.")
    add("--chat_template_kwargs", help="What the chat template is given besides, JSON.")
    add("--trust_remote_code", action="store_true", help="Let a hub model run code of its own.")
    add("--local_rank", help=argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    del given["local_rank"]
    if given["output_dir"] is None:
        given["output_dir"] = Path(given["model"] if Path(given["model"]).is_dir() else ".") / EVALUATION_FOLDER
    if given["batch_size"] < 1:
        raise UserError(f"--batch_size must be at least 1, got {given['batch_size']}")
    if given["smoothing"] is not None and not 0 <= given["smoothing"] < 1:
        raise UserError(f"--smoothing must lie in [0, 1), got {given['smoothing']}")
    return EvaluationOptions(**given)


def _true_or_false(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")
    return text.lower() == "true"
