"""The page of a preview: one HTML file that needs nothing else, and in which nothing of the data can run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from launch.data.preview.pieces import Piece, runs
from launch.data.preview.shown import ShownRow
from launch.data.preview.summary import Fact
from launch.data.preview.visible import plain, visible

TEMPLATES = Path(__file__).parent / "templates"
CLOSE = Markup("</del>")


@dataclass(frozen=True)
class Section:
    """Rows under a heading."""

    name: str
    about: str
    rows: Sequence[ShownRow]


def page(title: str, facts: Sequence[Fact], sections: Sequence[Section]) -> str:
    """Return the page. What there is to say of all rows that were kept is said once, at its top."""
    template = environment().get_template("page.html")
    shown = [section for section in sections if section.rows]
    kept = [row for section in shown for row in section.rows if row.input_ids]
    notes = [note for note in kept[0].notes if len(kept) > 1 and all(note in row.notes for row in kept)]
    return template.render(title=title, facts=facts, sections=shown, notes=notes)


def environment(*folders: Path) -> jinja2.Environment:
    """Return what renders pages: templates in `folders`, then those of a preview, and its filters for texts."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    filters = (visible, plain, runs, hint, strip, close_dropped)
    made.filters |= {function.__name__: function for function in filters}
    return made


def hint(piece: Piece) -> str:
    """Return what is said of a piece under the pointer: ids and positions of its tokens."""
    ids = " ".join(str(token.id) for token in piece.tokens)
    first, last = piece.tokens[0].position, piece.tokens[-1].position
    return f"id {ids} at {first}" if first == last else f"ids {ids} at {first} to {last}"


def close_dropped(html: Markup) -> Markup:
    """Close dropped text before the line break at its end."""
    return html.removesuffix("\n") + (CLOSE + Markup("\n") if html.endswith("\n") else CLOSE)


def strip(row: ShownRow) -> list[tuple[str, int]]:
    """Return the kinds of a row's tokens and how many follow each other, for its strip of colours."""
    counted = [(str(kind), sum(len(piece.tokens) for piece in pieces)) for kind, pieces in runs(row.pieces)]
    return [(kind, count) for kind, count in counted if count]
