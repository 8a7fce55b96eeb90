"""`--preview N`: `preview.html` and `preview.jsonl` of the prepared rows, written by the first rank."""

import json
from collections.abc import Iterable
from pathlib import Path

from launch.common.atomic_files import write_whole
from launch.common.errors import UserError
from launch.common.messages import one_line
from launch.common.paths import PREVIEW_HTML, PREVIEW_JSONL
from launch.data.encode_batch import BatchEncoder
from launch.data.prepared import EncodedData
from launch.data.preview.choose import choose
from launch.data.preview.find import find_records
from launch.data.preview.page import Section, page
from launch.data.preview.shown import Shower, ShownRow
from launch.data.preview.summary import facts
from launch.data.read import Sources

BREAKS = str.maketrans({break_: f"\\u{ord(break_):04x}" for break_ in "\x85\u2028\u2029"})  # not between JSON lines


def write_preview(
    folder: Path, data: EncodedData, encoder: BatchEncoder, sources: Sources, count: int, seed: int
) -> tuple[Path, Path]:
    """Write both files into `folder`, the same for the same data and `seed`.

    Args:
        folder: Made if it is not there.
        data: The prepared rows.
        encoder: What they were encoded with.
        sources: Where they come from; read again for the text of the rows shown.
        count: How many training rows to draw.
        seed: Draws them.

    Returns:
        The page and the file of rows.

    Raises:
        UserError: `folder` cannot be written to.
    """
    chosen = choose(data, count, seed)
    kept = list(dict.fromkeys([*chosen.drawn, chosen.longest, *chosen.shortened]))
    rows = {index: data.train[index] for index in kept}
    wanted = [row["where"] for row in rows.values()]
    wanted += [one_line(rejected.where) for rejected in chosen.dropped if not rejected.whole_file]
    shower = Shower(encoder, find_records(sources, wanted))
    shown = {index: shower.kept(row) for index, row in rows.items()}
    others = set(kept) - set(chosen.drawn)
    sections = [
        Section("Drawn", "from all training rows, by --seed", [shown[index] for index in chosen.drawn]),
        Section("Longest", "of all training rows", [shown[i] for i in [chosen.longest] if i in others]),
        Section(
            "Shortened",
            "to fit --max_length",
            [shown[i] for i in chosen.shortened if i in others and i != chosen.longest],
        ),
        Section("Dropped", "rows that are not trained on", [shower.dropped(each) for each in chosen.dropped]),
    ]
    names = ", ".join(one_line(source.name) for source in sources.train)
    text = page(names, facts(data, encoder.encode, list(shown.values())), sections)
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / PREVIEW_HTML, text)
        write_whole(folder / PREVIEW_JSONL, json_lines(shown.values()))
    except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user that does not exist
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no preview can be written into {folder}: {reason}; name another directory with --output_dir"
        ) from None
    return folder / PREVIEW_HTML, folder / PREVIEW_JSONL


def json_lines(rows: Iterable[ShownRow]) -> str:
    """Return rows as JSON lines."""
    lines = []
    for row in rows:
        values = {"where": row.where, "input_ids": row.input_ids, "labels": row.labels, "learned": row.learned}
        text = json.dumps(values, ensure_ascii=False).translate(BREAKS)
        lines.append(text.encode("utf-8", "backslashreplace").decode() + "\n")  # half a surrogate pair is \udXXX
    return "".join(lines)
