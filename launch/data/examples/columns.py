"""Columns of the data that are read under other names: `--columns prompt=question,completion=answer`."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from launch.common.messages import shortened


@dataclass(frozen=True)
class Columns:
    """`renamed`: the column of the data for each name that is not the column's own."""

    renamed: Mapping[str, str] = field(default_factory=dict)

    def rename(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """A record's fields under their new names. A column that stood under one of these is out of use."""
        given = {name: column for name, column in self.renamed.items() if column in fields}
        if not given:
            return fields
        gone = {*given, *given.values()}
        return _Renamed(fields, given | {name: name for name in fields if name not in gone})

    def columns_of(self, names: Collection[str]) -> set[str]:
        """The columns of the data that are read as one of `names`."""
        moved = {*self.renamed, *self.renamed.values()}
        return {self.renamed[name] for name in names if name in self.renamed} | {n for n in names if n not in moved}

    def problem(self, found: Collection[str]) -> str | None:
        """What to say of a column that no row of the data has, given all the columns that were `found`."""
        missing = [column for column in self.renamed.values() if column not in found]
        if not missing:
            return None
        there = shortened(", ".join(sorted(found)), 300) or "none"
        return (
            f"--columns names {shortened(repr(missing[0]))}, which no row of the data has; the columns are: {there}"
        )


@dataclass(frozen=True)
class _Renamed(Mapping[str, Any]):
    """Fields under other names. Nothing is read that is not asked for: a source may convert values that late."""

    fields: Mapping[str, Any]
    columns: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.fields[self.columns[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __len__(self) -> int:
        return len(self.columns)

    def __contains__(self, name: object) -> bool:
        return name in self.columns  # Mapping's own would read the value
