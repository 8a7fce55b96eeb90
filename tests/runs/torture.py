"""Runs that are killed at any moment and started again until they end: `python -m tests.runs.torture --kills 50`.

Each run is a real launch. A kill hits one rank, at a moment drawn at random over the whole run, or while it saves or
exports. After each, every process of the launch must be gone within a minute, and the next start must go on. Prints
how many runs ended with exactly the weights of the run that nobody touched.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.support.processes import ROOT, environment, launcher
from tests.support.small_run import flags, write_data, write_model

GONE_SECONDS = 60
SCRIPT = str(ROOT / "launch/sft.py")
COMMON = {
    "smoothing": 0.1,
    "learning_rate": 1e-2,
    "max_steps": 24,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "save_steps": 2,
    "max_length": 96,
    "samples": 0,
    "per_device_train_batch_size": 4,
}
LAYOUTS = {"tp2-zero1": {"tp": 2, "zero": 1}, "dp2-zero2": {"tp": 1, "zero": 2}, "dp2-zero3": {"tp": 1, "zero": 3}}


class Launch:
    """One start of a run, with everything that it prints, and its processes.

    `start`: the words before its flags; left out, the deepspeed launcher on two ranks.
    """

    def __init__(self, folder: Path, output: str, values: dict, start: list[str] | None = None):
        self.output = folder / output
        given = {"model": folder / "model-tied", "data": folder / "train.jsonl", "output_dir": self.output}
        self.log = (folder / f"{output}.log").open("a+")
        self.launcher = psutil.Popen(
            [*(start or [*launcher(2), SCRIPT]), *flags(COMMON | given | values)],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        self.tree: set[psutil.Process] = {self.launcher}

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, as far as they have been started and still live."""
        found = []
        for process in self.processes():
            try:
                words = process.cmdline()
                if any(word.startswith("--local_rank") for word in words):
                    found.append(process)
            except psutil.Error:
                continue
        return sorted(found, key=lambda process: process.pid)

    def processes(self) -> list[psutil.Process]:
        """All living processes of this launch that have ever been seen."""
        for process in list(self.tree):
            try:
                self.tree |= set(process.children(recursive=True))
            except psutil.Error:
                continue
        return [process for process in self.tree if _alive(process)]

    def until(self, condition, seconds: float) -> bool:
        """Whether `condition()` came true while the launch was running, within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.processes()
            if condition():
                return True
            if self.launcher.poll() is not None:
                return False
            time.sleep(0.005)
        return False

    def steps(self) -> int:
        """Lines of metrics so far."""
        path = self.output / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def gone(self, seconds: float = GONE_SECONDS) -> float | None:
        """Seconds until every process was gone; None if some were left after `seconds`."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if self.launcher.poll() is not None and not self.processes():
                return time.monotonic() - start
            time.sleep(0.1)
        return None

    def said(self) -> str:
        self.log.flush()
        return Path(self.log.name).read_text()

    def end(self) -> None:
        for process in self.processes():
            process.kill()


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def prepare(folder: Path) -> None:
    write_data(folder)
    write_model(folder, tied=True, attention_dropout=0.1)


def moment(launch: Launch, draw: random.Random, seconds: float) -> str:
    """Wait for a moment to kill at; what it was."""
    kind = draw.choice(["any", "any", "step", "saving", "exporting"])
    if kind == "any":
        wait = draw.uniform(0, seconds)
        launch.until(lambda: False, wait)
        return f"{wait:.1f} s after its start"
    if kind == "step":
        step = launch.steps() + draw.randint(1, 5)
        launch.until(lambda: launch.steps() >= step, 2 * seconds)
        time.sleep(draw.uniform(0, 0.2))
        return f"after line {step} of its metrics"
    partial = "checkpoint.partial" if kind == "saving" else "model.partial"
    launch.until(lambda: (launch.output / partial).exists(), 2 * seconds)
    time.sleep(draw.uniform(0, 0.05))
    return f"while {partial} was there"


def tortured(folder: Path, output: str, values: dict, draw: random.Random, kills: int, seconds: float, report) -> int:
    """One run, killed up to `kills` times before it may end; how many kills hit it."""
    hit = 0
    while not (folder / output / "model").exists():
        launch = Launch(folder, output, values)
        if hit < kills:
            when = moment(launch, draw, seconds)
            ranks = launch.ranks()
            if ranks:
                victim = draw.randrange(len(ranks))
                ranks[victim].send_signal(signal.SIGKILL)
                hit += 1
                taken = launch.gone()
                if taken is None:
                    launch.end()
                    raise SystemExit(
                        f"{output}: processes outlived the kill {when} by a minute:\n{launch.said()[-4000:]}"
                    )
                report(f"{output}: rank {victim} killed {when}; all gone after {taken:.1f} s")
                continue
        if launch.gone(300) is None or launch.launcher.returncode:
            launch.end()
            raise SystemExit(f"{output} did not end well:\n{launch.said()[-4000:]}")
    return hit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--kills_a_run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw, same, runs, hits = random.Random(args.seed), 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        wanted, seconds = {}, {}
        for name, values in LAYOUTS.items():
            start = time.monotonic()
            tortured(folder, f"{name}-untouched", values, draw, 0, 0, print)
            wanted[name] = weights(folder / f"{name}-untouched")
            seconds[name] = time.monotonic() - start
        while hits < args.kills:
            name = list(LAYOUTS)[runs % len(LAYOUTS)]
            kills = min(args.kills_a_run, args.kills - hits)
            output = f"{name}-{runs}"
            hits += tortured(folder, output, LAYOUTS[name], draw, kills, seconds[name], report=_report)
            identical = weights(folder / output) == wanted[name]
            _report(f"{output}: ended with {'the same' if identical else 'OTHER'} weights")
            same, runs = same + identical, runs + 1
    print(json.dumps({"kills": hits, "runs": runs, "identical": same}))
    sys.exit(same != runs)


def weights(run: Path) -> bytes:
    return (run / "model/model.safetensors").read_bytes()


def _report(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
