"""Charts as SVG in a page: in its colours, also in the dark, and its type; lines differ by form too."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

# what stands for the page's colours while a chart is drawn
INK, QUIET, LINE, ACCENT, CARD = "#010203", "#010204", "#010205", "#010206", "#010207"
NAMES = {INK: "--ink", QUIET: "--quiet", LINE: "--line", ACCENT: "--learned-line", CARD: "--card"}
FORMS: tuple[tuple[Any, str, str], ...] = (
    ("solid", "o", ACCENT),
    ((0, (5, 2)), "s", INK),
    ((0, (1.2, 1.6)), "^", QUIET),
    ((0, (6, 2, 1.2, 2)), "D", ACCENT),
    ((0, (3, 1)), "v", INK),
    ((0, (1, 3)), "P", QUIET),
)
SIZE = (3.7, 2.45)
MOST_MARKS = 12  # on a line
MOST_LETTERS = 28  # of a name in a chart
SETTINGS = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 2.6,
    "lines.linewidth": 1.6,
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True)
class Line:
    """A line of a chart: its name, and its points."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """A figure of the page."""

    title: str
    about: str
    svg: Markup


def line_chart(title: str, about: str, lines: Sequence[Line], x_label: str = "step", zero: bool = False) -> Chart:
    """Draw lines, each of a form of its own, over the step. `zero`: the axis begins there."""

    def draw(axis: Any) -> None:
        for line, (style, marker, colour) in zip(lines, _repeated(len(lines)), strict=True):
            if not line.x:  # a run that has not logged it keeps its form for the other charts
                continue
            every = max(1, -(-len(line.x) // MOST_MARKS))
            form = {"linestyle": style, "marker": marker, "markevery": every, "markersize": 3.6, "color": colour}
            axis.plot(line.x, line.y, label=_end(line.name), **form)
        axis.set_xlabel(x_label)
        axis.margins(x=0.03, y=0.12)
        if zero:
            axis.set_ylim(0, 1.12 * max((max(line.y) for line in lines if line.y), default=0) or 1)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
        if len(lines) > 1:
            axis.legend(loc="best")

    return Chart(title, about, drawn(draw, title))


def drawn(draw: Callable[[Any], None], name: str, size: tuple[float, float] = SIZE) -> Markup:
    """Return what `draw` makes of an axis as an SVG element. Raises ImportError without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _of_the_page(file.getvalue(), name)


def _of_the_page(svg: str, name: str) -> Markup:
    """The element alone, as wide as its place, in the page's colours and type, with ids of its own."""
    prefix = re.sub(r"\W+", "-", name.lower())
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#(?=[a-z])', rf"\1#{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in NAMES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)


def _end(name: str) -> str:
    return name if len(name) <= MOST_LETTERS else f"…{name[1 - MOST_LETTERS :]}"


def _repeated(count: int) -> list[tuple[Any, str, str]]:
    return [FORMS[index % len(FORMS)] for index in range(count)]
