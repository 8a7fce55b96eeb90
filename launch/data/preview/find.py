"""Records found again in their sources: prepared rows hold tokens alone, and dropped ones are not kept at all."""

from collections.abc import Collection

from launch.common.messages import one_line
from launch.data.read import Sources
from launch.data.records import Record


def find_records(sources: Sources, wanted: Collection[str]) -> dict[str, Record]:
    """Return the records at these places, by their `where` on one line; those that are not there are left out.

    The sources are read up to the last of them.
    """
    missing = set(wanted)
    found: dict[str, Record] = {}
    for source in (*sources.train, *sources.heldout):
        if not missing:
            break
        for record in source.records():
            if isinstance(record, Record) and (where := one_line(record.where)) in missing:
                missing.discard(where)
                found[where] = record
                if not missing:
                    break
    return found
