"""Text in HTML, with all that a reader would not see made visible, and nothing in it that a browser obeys.

Blanks stay in the text, so that it can be copied, and get their marks from the style sheet. Characters that show
nothing, or turn the order of what follows, are named in their place.
"""

import re
import unicodedata

from markupsafe import Markup, escape

from launch.common.messages import printable

BLANKS = {" ": "<u> </u>", "\n": "<u class=n></u>\n", "\t": "<u class=t>\t</u>"}
JOINERS = "\u200c\u200d"  # without them Persian words and emoji fall apart
NAMES = {
    "\r": "CR", "\x7f": "DEL", "\xa0": "NBSP", "\xad": "SHY", "\u200b": "ZWSP", "\u200e": "LRM", "\u200f": "RLM",
    "\u061c": "ALM", "\u202a": "LRE", "\u202b": "RLE", "\u202c": "PDF", "\u202d": "LRO", "\u202e": "RLO",
    "\u2066": "LRI", "\u2067": "RLI", "\u2068": "FSI", "\u2069": "PDI", "\u2028": "LS", "\u2029": "PS",
    "\ufeff": "BOM",
}  # fmt: skip
UNSEEN = re.compile(r"[^\S ]|[\x00-\x1f\x7f-\x9f]|[^\w\s!-~]| ")  # what may be one of them


def visible(text: str) -> Markup:
    """Return text as HTML."""
    if text.isascii() and text.isalnum():
        return Markup(text)
    safe = str(escape(text.encode("utf-8", "backslashreplace").decode()))
    return Markup(UNSEEN.sub(_shown, safe))


def plain(text: str) -> str:
    """Return text for an attribute or a heading: nothing in it turns the order of what follows."""
    return printable(text)


def _shown(found: re.Match[str]) -> str:
    character = found[0]
    if character in BLANKS:
        return BLANKS[character]
    if character in JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Co", "Cn", "Zs", "Zl", "Zp"):
        return character
    name = NAMES.get(character) or f"U+{ord(character):04X}"
    return f'<b class=c title="U+{ord(character):04X}">{name}</b>'
