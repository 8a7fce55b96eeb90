"""What a shortened text has lost, found by comparing it with the whole one."""

import re
from os.path import commonprefix

from launch.data.preview.pieces import Cut


def cut_between(whole: str, short: str, special: re.Pattern[str]) -> Cut | None:
    """Return what `whole` has that `short` lacks, None if they are the same.

    Where a cut could stand at several places, because what follows it begins alike, it begins with a special token
    that follows another one, as turns do.
    """
    if whole == short:
        return None
    start = len(commonprefix([whole, short]))  # noqa: RUF071 - of any strings
    ending = len(commonprefix([whole[::-1], short[::-1]]))  # noqa: RUF071
    ending = min(ending, len(short) - start, len(whole) - start)
    lost = len(whole) - ending - start
    if start + ending < len(short):  # the rest is written differently, too
        return Cut(start, whole[start : start + lost])
    place = start
    while place and whole[place - 1] == whole[place + lost - 1]:
        place -= 1
        before = whole[:place].rstrip()
        if special.match(whole, place) and (not before or _ends_special(before, special)):
            start = place
    return Cut(start, whole[start : start + lost])


def _ends_special(text: str, special: re.Pattern[str]) -> bool:
    return any(found.end() == len(text) for found in special.finditer(text, max(0, len(text) - 200)))
