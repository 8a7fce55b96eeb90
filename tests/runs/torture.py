"""Runs that are killed at any moment and started again until they end: `python -m tests.runs.torture --kills 50`.

Each run is a real launch. A kill hits one rank, at a moment drawn at random over the whole run, or while it saves or
exports. After each, every process of the launch must be gone within a minute, and the next start must resume. Prints
how many runs ended with exactly the weights of an undisturbed run.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.support.launches import LAYOUTS, Launch, prepare, weights


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


def _report(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
