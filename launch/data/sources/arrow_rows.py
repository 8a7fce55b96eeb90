"""Rows of Arrow batches: a column is converted to Python only once a row's value in it is asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow

from launch.common.errors import Reject
from launch.common.messages import error_line, shortened

UNCONVERTIBLE = (pyarrow.ArrowException, ArithmeticError, ValueError, KeyError, NotImplementedError)


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
    """Yield the rows of `batch`."""
    columns = {
        name: ArrowColumn(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)
    }
    return (ArrowRow(columns, row) for row in range(batch.num_rows))


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
        try:
            values = self._array.to_pylist(maps_as_pydicts="strict")
        except UNCONVERTIBLE:
            values = [self._value(scalar) for scalar in self._array]
        strip = null_stripper(self._array.type)
        return [value if isinstance(value, Reject) else strip(value) for value in values] if strip else values

    def _value(self, scalar: pyarrow.Scalar) -> Any:
        try:
            return scalar.as_py(maps_as_pydicts="strict")
        except UNCONVERTIBLE as error:
            return Reject(f"{shortened(self._name)} cannot be read", error_line(error, 80))


def null_stripper(kind: pyarrow.DataType) -> Callable[[Any], Any] | None:
    """Return what drops the keys that Arrow filled with null from values of type `kind`, None if it has no keys.

    All structs of a column have all keys in Arrow, so a null stands for a key that was absent, or was null.
    """
    if pyarrow.types.is_struct(kind):
        fields = {field.name: null_stripper(field.type) for field in kind}

        def strip(struct):
            if struct is None:
                return None
            present = ((name, fields[name], value) for name, value in struct.items() if value is not None)
            return {name: inner(value) if inner else value for name, inner, value in present}

        return strip
    if pyarrow.types.is_map(kind):
        item = null_stripper(kind.item_type)
        if item is None:
            return None
        return lambda mapping: mapping and {key: item(value) for key, value in mapping.items()}
    if _is_list(kind):
        element = null_stripper(kind.value_type)
        if element is None:
            return None
        return lambda values: values and [element(value) for value in values]
    return None


def _is_list(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    is_kind = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    return any(check(kind) for check in is_kind)
