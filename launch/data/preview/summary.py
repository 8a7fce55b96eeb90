"""The numbers at the top of a preview: rows, lengths, what is learned, what rows begin and end with."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.data.encode import Encoder
from launch.data.prepared import EncodedData
from launch.data.preview.shown import ShownRow


@dataclass(frozen=True)
class Fact:
    """A number of a preview. `value` is shown as a token if `token`, and followed by `note`."""

    name: str
    value: str
    note: str = ""
    token: bool = False


def facts(data: EncodedData, encoder: Encoder, shown: Sequence[ShownRow]) -> list[Fact]:
    """Return what a reader wants to know of the data before its rows."""
    statistics, report, tokenizer = data.summary.statistics, data.report, encoder.tokenizer
    rows = [row for row in shown if row.input_ids]
    begin = sum(row.input_ids[0] == tokenizer.bos_token_id for row in rows)
    end = sum(row.input_ids[-1] == tokenizer.eos_token_id for row in rows)
    of_shown = f"of {len(rows)} rows shown"
    stop = encoder.template.end_of_turn if tokenizer.chat_template else None
    return [
        Fact("rows to train on", f"{len(data.train):,}", f"{len(data.heldout):,} held out"),
        Fact("dropped", f"{report.dropped():,}", f"{len(report.truncated):,} shortened to --max_length"),
        Fact("median length", f"{statistics.median:,}", "tokens"),
        Fact("longest", f"{statistics.longest:,}", f"95 % up to {statistics.most:,}"),
        Fact("learned", f"{statistics.learned / statistics.tokens:.0%}", f"of {statistics.tokens:,} tokens"),
        _token("end of turn", stop, "written by the chat template", "the tokenizer has no chat template"),
        _token("EOS", tokenizer.eos_token, f"ends {end} {of_shown}", "none"),
        _token("BOS", tokenizer.bos_token, f"begins {begin} {of_shown}", "the tokenizer has none"),
    ]


def _token(name: str, token: str | None, note: str, otherwise: str) -> Fact:
    return Fact(name, str(token), note, token=True) if token else Fact(name, "–", otherwise)
