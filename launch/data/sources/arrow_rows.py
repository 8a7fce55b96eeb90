"""Rows of Arrow batches: a column is converted to Python only once a row's value in it is asked for."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
from pyarrow import types

from launch.common.errors import Reject
from launch.common.messages import error_line, shortened
from launch.data.records import Note, Record, Records

BATCH = 128  # rows; a thousand of them would be a tenth faster
BROKEN = (pyarrow.ArrowException, ArithmeticError, ValueError, OSError)  # what Arrow raises for a damaged file
PANDAS_INDEX = re.compile(r"Unnamed: 0(\.\d+)?|__index_level_\d+__")
UNCONVERTIBLE = (pyarrow.ArrowException, ArithmeticError, ValueError, KeyError, NotImplementedError, RecursionError)


class ArrowRow(Mapping[str, Any]):
    """The fields of one row. Raises Reject for a value that Python cannot hold, once it is asked for."""

    __slots__ = ("_columns", "_row")

    def __init__(self, columns: Mapping[str, Sequence[Any]], row: int) -> None:
        self._columns, self._row = columns, row

    def __getitem__(self, name: str) -> Any:
        value = self._columns[name][self._row]
        if isinstance(value, Reject):
            raise value
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __contains__(self, name: object) -> bool:
        return name in self._columns  # Mapping's own would convert the value

    def __repr__(self) -> str:
        return f"ArrowRow({', '.join(self._columns)})"

    def __reduce__(self):
        """Pickle this row's values, without the batch around them."""
        return ArrowRow, ({name: (column[self._row],) for name, column in self._columns.items()}, 0)


def arrow_rows(batch: pyarrow.RecordBatch) -> Iterator[ArrowRow]:
    """Yield the rows of `batch`, without the index that pandas writes into a table as a column."""
    named = zip(batch.schema.names, batch.columns, strict=True)
    columns = {name: ArrowColumn(name, column) for name, column in named if not is_index(name)}
    return (ArrowRow(columns, row) for row in range(batch.num_rows))


def is_index(name: str) -> bool:
    """Whether a column of this name is the index that pandas wrote beside the data."""
    return not name or PANDAS_INDEX.fullmatch(name) is not None


def index_note(names: Iterable[str]) -> Iterator[Note]:
    """Yield what to say of those `names` that are an index."""
    found = [name or "a column without a name" for name in names if is_index(name)]
    if found:
        yield Note(f"not read: {', '.join(found)}, the index that pandas wrote beside the data")


def dataset_rows(dataset, place: str) -> Records:
    """Yield the rows of a data set, mapped from its files or streamed, as `place` with the row's number."""
    yield from index_note(dataset.column_names or ())  # of a stream they may be unknown
    number = 0
    for table in dataset.with_format("arrow").iter(BATCH):
        for batch in table.to_batches():
            for fields in arrow_rows(batch):
                number += 1
                yield Record(fields, f"{place}:{number}")


class ArrowColumn(Sequence[Any]):
    """One column of a batch as Python values, and a Reject in place of each value that cannot be converted."""

    def __init__(self, name: str, array: pyarrow.Array) -> None:
        self._name, self._array = name, array
        self._values: list[Any] | None = None

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, row):
        if self._values is None:
            self._values = self._converted()
        return self._values[row]

    def _converted(self) -> list[Any]:
        kind = self._array.type
        how = {"maps_as_pydicts": "strict"} if _any_within(kind, types.is_map) else {}  # it takes four times as long
        clean = _cleaner(kind) if _any_within(kind, _is_json) or _nulls_within(self._array) else None
        try:
            values = self._array.to_pylist(**how)
            return values if clean is None else [clean(value) for value in values]
        except UNCONVERTIBLE:
            return [self._value(scalar, how, clean) for scalar in self._array]

    def _value(self, scalar: pyarrow.Scalar, how: dict[str, str], clean: Callable[[Any], Any] | None) -> Any:
        try:
            value = scalar.as_py(**how)
            return value if clean is None else clean(value)
        except UNCONVERTIBLE as error:
            return Reject(f"{shortened(self._name)} cannot be read", error_line(error, 80))


def _cleaner(kind: pyarrow.DataType) -> Callable[[Any], Any] | None:
    """Return what makes of a Python value of type `kind` what its writer meant, None if it is that already.

    All structs of a column have all keys in Arrow, so a null in one stands for a key that is absent. JSON is text.
    """
    if types.is_struct(kind):
        fields = {field.name: _cleaner(field.type) for field in kind}
        return lambda struct: (
            struct
            and {
                name: inner(value) if (inner := fields[name]) else value
                for name, value in struct.items()
                if value is not None
            }
        )
    if types.is_map(kind):
        item = _cleaner(kind.item_type)
        return item and (lambda mapping: mapping and {key: item(value) for key, value in mapping.items()})
    if _is_list(kind):
        element = _cleaner(kind.value_type)
        return element and (lambda values: values and [element(value) for value in values])
    if _is_json(kind):
        return lambda text: None if text is None else json.loads(text, parse_constant=_no_constant)
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _is_list(kind: pyarrow.DataType) -> bool:
    return (
        types.is_list(kind)
        or types.is_large_list(kind)
        or types.is_fixed_size_list(kind)
        or types.is_list_view(kind)
        or types.is_large_list_view(kind)
    )


def _is_json(kind: pyarrow.DataType) -> bool:
    return isinstance(kind, pyarrow.JsonType)


def _any_within(kind: pyarrow.DataType, check: Callable[[pyarrow.DataType], bool]) -> bool:
    return check(kind) or any(_any_within(kind.field(index).type, check) for index in range(kind.num_fields))


def _nulls_within(array: pyarrow.Array) -> bool:
    """Whether any struct in `array` has a null key."""
    kind = array.type
    if types.is_struct(kind):
        fields = [array.field(index) for index in range(kind.num_fields)]
        return any(field.null_count or _nulls_within(field) for field in fields)
    if types.is_map(kind):
        return _nulls_within(array.items)
    return _is_list(kind) and _nulls_within(array.flatten())
