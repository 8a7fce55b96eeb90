"""Starts of a run that are watched while they live: their processes, their log, the steps that they have logged."""

import subprocess
import time
from pathlib import Path

import psutil

from tests.support.forked import ForkedRuns
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
        self.output, self.log = folder / output, folder / f"{output}.log"
        with self.log.open("a") as log:
            self.launcher = psutil.Popen(
                [*(start or [*launcher(2), SCRIPT]), *arguments(folder, output, values)],
                stdout=log,
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
        return self.log.read_text()

    def end(self) -> None:
        for process in self.processes():
            process.kill()


class ForkedLaunch(Launch):
    """The same with forked ranks, two of them. `before`: Python that each rank runs first."""

    def __init__(self, folder: Path, output: str, values: dict, before: str = ""):
        self.output, self.log = folder / output, folder / f"{output}.log"
        self.launcher = ForkedRuns(2, [arguments(folder, output, values)], self.log, before=before)
        self.tree = {self.launcher}

    def ranks(self) -> list[psutil.Process]:
        return sorted(set(self.processes()) - {self.launcher}, key=lambda process: process.pid)


def arguments(folder: Path, output: str, values: dict) -> list[str]:
    """The flags of a run in this folder."""
    given = {"model": folder / "model-tied", "data": folder / "train.jsonl", "output_dir": folder / output}
    return flags(COMMON | given | values)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def prepare(folder: Path) -> None:
    """Write the data and the model of these runs."""
    write_data(folder)
    write_model(folder, tied=True, attention_dropout=0.1)


def weights(run: Path) -> bytes:
    """The exported model."""
    return (run / "model/model.safetensors").read_bytes()
