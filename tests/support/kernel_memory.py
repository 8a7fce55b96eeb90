"""What kernels do with memory, followed in Triton's interpreter access by access.

    with watched() as launches:
        triton_ops.gradient(...)   # imported in here
    launches[0].reads(logits)     # how often each element was read, in the tensor's shape

Every launch is checked. It stays inside the tensors that it was given; and a byte that it writes is written once, and
read by nobody but the program that writes it, before that: programs may run in any order. Not seen here: threads of
one program (the barrier before a gradient is written over its logits is for `test_kernels_compile.py`), one tensor
taken for another (the counts of `test_kernel_memory.py`), memory that nobody has written yet. Atomics are refused.
"""

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor


@dataclass
class Accesses:
    """Loads or stores of a launch: of each the address, its bytes, the program, and when."""

    noted: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, addresses: np.ndarray, size: int, program: int, moment: int) -> None:
        ones = np.ones(addresses.size, dtype=np.int64)
        self.noted.append((addresses, size * ones, program * ones, moment * ones))

    def elements(self) -> tuple[np.ndarray, ...]:
        nothing = (np.empty(0, np.int64),) * 4
        return tuple(np.concatenate(parts) for parts in zip(nothing, *self.noted, strict=True))

    def each_byte(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where, by which program, when."""
        addresses, sizes, programs, moments = self.elements()
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(addresses, sizes) + within, np.repeat(programs, sizes), np.repeat(moments, sizes)


class Launch:
    """One kernel over its grid."""

    def __init__(self, kernel: str, tensors: list[Tensor]):
        self.kernel, self.tensors = kernel, tensors
        self.loads, self.stores = Accesses(), Accesses()
        self._starts, self._stops = _stretches(tensors)

    def reads(self, tensor: Tensor) -> Tensor:
        return _counts(self.loads, tensor)

    def writes(self, tensor: Tensor) -> Tensor:
        return _counts(self.stores, tensor)

    def check_inside(self, addresses: np.ndarray, size: int) -> None:
        at = np.searchsorted(self._starts, addresses, side="right") - 1
        outside = (at < 0) | (addresses + size > self._stops[at])
        assert not outside.any(), f"{self.kernel} touches {outside.sum()} elements outside of its tensors"

    def check_order(self) -> None:
        read, reader, read_at = self.loads.each_byte()
        written, writer, written_at = self.stores.each_byte()
        if not written.size:
            return
        order = np.argsort(written, kind="stable")
        written, writer, written_at = written[order], writer[order], written_at[order]
        assert (np.diff(written) > 0).all(), f"{self.kernel} writes an element twice"
        at = np.minimum(np.searchsorted(written, read), written.size - 1)
        shared = written[at] == read
        another = shared & (reader != writer[at])
        assert not another.any(), f"{self.kernel} reads {another.sum()} bytes that another program writes"
        late = shared & (read_at > written_at[at])
        assert not late.any(), f"{self.kernel} reads {late.sum()} bytes after it has written over them"


@contextlib.contextmanager
def watched() -> Iterator[list[Launch]]:
    """Run kernels in the interpreter, and follow them. Triton must not be imported here outside of it."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # read when Triton is imported, and when a kernel is made
        yield from _followed()


def _followed() -> Iterator[list[Launch]]:
    from triton.runtime import interpreter

    launches: list[Launch] = []
    builder, execute = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    moments = itertools.count()

    def note(accesses: Accesses, pointers, mask) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        x, y, z = builder.grid_idx
        assert not y and not z, "programs are numbered along one dimension"
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64)
        launches[-1].check_inside(addresses, size)
        accesses.add(addresses, size, x, next(moments))

    def create_masked_load(pointers, mask, *rest, **more):
        note(launches[-1].loads, pointers, mask)
        return load(pointers, mask, *rest, **more)

    def create_masked_store(pointers, value, mask, *rest, **more):
        note(launches[-1].stores, pointers, mask)
        return store(pointers, value, mask, *rest, **more)

    def atomic(*_, **__):
        raise NotImplementedError("atomics are not followed")

    def launch(executor, *args, **kwargs):
        launches.append(Launch(executor.fn.__name__, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]))
        execute(executor, *args, **kwargs)
        launches[-1].check_order()

    followed = {"create_masked_load": create_masked_load, "create_masked_store": create_masked_store}
    followed |= {name: atomic for name in dir(builder) if name.startswith("create_atomic")}
    with (
        mock.patch.multiple(builder, **followed),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        yield launches


def _addresses(tensor: Tensor) -> np.ndarray:
    """Of every element, in order. In numpy: memory that tests count is torch's."""
    places = sum(
        index * stride for index, stride in zip(np.indices(tensor.shape, sparse=True), tensor.stride(), strict=True)
    )
    return (tensor.data_ptr() + np.broadcast_to(places, tensor.shape) * tensor.element_size()).reshape(-1)


def _stretches(tensors: list[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Where memory of these tensors begins and ends, in order; between their elements it is somebody else's."""
    starts = np.concatenate([_addresses(x) for x in tensors])
    stops = np.concatenate([_addresses(x) + x.element_size() for x in tensors])
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    first = np.concatenate([[True], starts[1:] > stops[:-1]])
    return starts[first], stops[np.concatenate([first[1:], [True]])]


def _counts(accesses: Accesses, tensor: Tensor) -> Tensor:
    """How often each element was touched, as one of its size."""
    addresses, sizes, _, _ = accesses.elements()
    touched, times = np.unique(addresses[sizes == tensor.element_size()], return_counts=True)
    counts = dict(zip(touched.tolist(), times.tolist(), strict=True))
    return torch.tensor([counts.get(address, 0) for address in _addresses(tensor).tolist()]).view(tensor.shape)
