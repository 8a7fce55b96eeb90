"""deepspeed launch/evaluate.py --model DIR --data FILE

Measures how far a model's probabilities can be believed on these rows: `evaluation.json`, a table and a diagram.
`python launch/evaluate.py` does it in one process; `--help` lists every flag.
"""

import sys
from pathlib import Path

# The launcher puts launch/ first on the path, where its modules would shadow others of the same name.
sys.path[0] = str(Path(__file__).resolve().parents[1])

from launch.process.environment import keep_quiet, share_cores
from launch.process.launcher import follow_launcher

follow_launcher()
share_cores()
keep_quiet()

import json

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.library_patches import skip_shared_memory_op
from launch.common.paths import EVALUATION
from launch.config.columns import column_names
from launch.data.examples.columns import Columns
from launch.data.load import load_data, run_sources
from launch.data.tokenizer import load_tokenizer
from launch.evaluation.choices import with_choices
from launch.evaluation.draw import draw
from launch.evaluation.forward import Evaluator, kinds_of
from launch.evaluation.options import EvaluationOptions, parse
from launch.evaluation.report import evaluate, table
from launch.process.exit import run_to_its_end
from launch.process.ranks import ensure_environment, from_main, on_all_ranks, say, world_size
from launch.process.rendezvous import rendezvous
from launch.process.watchdog import Watchdog


def main(argv: list[str]) -> None:
    options = parse(argv)
    run_options = options.of_run(options.model)
    ensure_environment()
    if world_size() % options.tp:
        raise UserError(f"--tp {options.tp} does not divide {world_size()} processes; start a multiple of it")
    skip_shared_memory_op()
    import deepspeed

    with rendezvous():
        deepspeed.init_distributed(verbose=False)
    columns = Columns(column_names(run_options.columns))
    sources = with_choices(run_sources(run_options), columns)
    tokenizer, data = load_data(run_options, sources=sources, purpose="to measure on")
    if options.base is not None:
        on_all_ranks(lambda: check_tokenizer(options, tokenizer))
    with Watchdog(run_options.stall_timeout) as watchdog:
        evaluation = figures_of(options, options.model, tokenizer, data, options.smoothing, watchdog)
        base = None
        if options.base is not None:
            base = figures_of(options, options.base, tokenizer, data, 0.0, watchdog)
    evaluation = {"model": options.model, "data": options.data, **evaluation, "base": base}

    def write() -> None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        write_whole(options.output_dir / EVALUATION, json.dumps(evaluation, indent=2) + "\n")

    from_main(write)
    say(table(evaluation))
    diagram = from_main(lambda: drawn(evaluation, options))
    say(f"figures: {options.output_dir / EVALUATION}, {diagram}")


def figures_of(
    options: EvaluationOptions, model: str, tokenizer, data, smoothing: float | None, watchdog: Watchdog
) -> dict:
    """Return the figures of one model. All ranks must call this."""
    watchdog.beat(f"loading {model}", storage=True)
    evaluator = Evaluator(options.of_run(model), tokenizer, options.bf16, options.batch_size, watchdog.beat)
    kinds = kinds_of(tokenizer, evaluator.vocab_size, data.summary.stops)
    try:
        return evaluate(evaluator, data.train, kinds, smoothing)
    finally:
        evaluator.close()


def check_tokenizer(options: EvaluationOptions, tokenizer) -> None:
    """Raise `UserError` if the base reads other tokens."""
    if load_tokenizer(options.of_run(options.base)).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"--base {options.base} has another tokenizer than {options.model}; tokens cannot be compared"
        )


def drawn(evaluation: dict, options: EvaluationOptions) -> str:
    try:
        return ", ".join(str(path) for path in draw(evaluation, options.output_dir))
    except ImportError:
        return "no diagram, which needs matplotlib (pip install matplotlib)"


if __name__ == "__main__":
    run_to_its_end(main, sys.argv[1:])
