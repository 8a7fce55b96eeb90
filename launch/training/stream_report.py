"""What is told of streamed rows while a run trains: epochs that end, and rows that cannot be used."""

from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback

from launch.common.errors import UserError
from launch.common.messages import counted
from launch.common.paths import DROPPED
from launch.config.options import SftOptions
from launch.data.records import DropReport
from launch.data.stream_found import Epoch, Taken
from launch.data.streamed_rows import StreamedRows
from launch.process.ranks import from_main, on_all_ranks, say

ENOUGH = 1000  # rows after which a share of dropped ones says something


class StreamReport(TrainerCallback):
    """With each log line asks the ranks what they found, names dropped rows in a file, and tells ends of epochs.

    Raises `UserError` on all ranks if more rows were dropped since this start than --max_dropped accepts.

    Collectives: a gather and a broadcast of objects a log line.
    """

    def __init__(self, rows: StreamedRows, options: SftOptions):
        self.rows, self.options, self.told = rows, options, set(rows.streaming.told)
        self.total = Tally()
        self.epochs: dict[int, list[Epoch]] = {}  # that have not ended on all ranks

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        file = Path(args.output_dir) / DROPPED
        report, epochs = self._gather(file)
        if (epochs or self.total.seen >= ENOUGH) and self.total.share > self.options.max_dropped:
            raise UserError(
                f"{self.total} since this start, more than a share of --max_dropped {self.options.max_dropped:g}; "
                f"{file} names them.\n{report.summary()}"
            )

    def on_train_end(self, args, state, control, **kwargs):
        self._gather(Path(args.output_dir) / DROPPED)
        self.rows.close()
        say(f"data: {self.total} since this start" + (f"; {DROPPED} names them" if self.total.dropped else ""))

    def _gather(self, file: Path) -> tuple[DropReport, int]:
        """Take what all ranks found into the tallies; return it, and how many epochs have ended."""
        found = on_all_ranks(self.rows.found.take)[:: self.options.tp]  # tensor-parallel ranks take the same rows
        report = merged(found)
        self.total += Tally(report.dropped(), sum(one.rows for one in found))
        if lines := report.lines():
            from_main(lambda: _append(file, lines))
        for note in report.left_out:
            if note not in self.told:
                self.told.add(note)
                say(f"data: {note}")
        for epoch in (epoch for one in found for epoch in one.epochs):
            self.epochs.setdefault(epoch.number, []).append(epoch)
        ended = [number for number, epochs in self.epochs.items() if len(epochs) == len(found)]
        for number in ended:
            epochs = self.epochs.pop(number)
            tally = Tally(sum(epoch.dropped for epoch in epochs), sum(epoch.rows for epoch in epochs))
            say(f"data: epoch {number} has ended; {tally}")
        return report, len(ended)


@dataclass(frozen=True)
class Tally:
    """How many rows were dropped, and how many not."""

    dropped: int = 0
    rows: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.dropped + other.dropped, self.rows + other.rows)

    @property
    def seen(self) -> int:
        return self.dropped + self.rows

    @property
    def share(self) -> float:
        return self.dropped / max(self.seen, 1)

    def __str__(self) -> str:
        return f"{self.dropped:,} of {counted(self.seen, 'row')} dropped"


def merged(found: list[Taken]) -> DropReport:
    """Return one report of what several ranks found."""
    report = DropReport()
    for one in found:
        report.rejections += one.report.rejections
        report.truncated += one.report.truncated
        report.spelled_out |= one.report.spelled_out
        report.left_out += one.report.left_out
    return report


def _append(file: Path, text: str) -> None:
    with file.open("a", encoding="utf-8") as opened:
        opened.write(text)
