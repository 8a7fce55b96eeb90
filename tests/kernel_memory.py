"""What kernels do with memory, followed in Triton's interpreter as compute-sanitizer does on a GPU, and further.

    with watched() as launches:
        passes_triton.gradient(...)   # imported in here
    launches[0].reads(logits)     # how often each element was read, in the tensor's shape

Every launch is checked when it is done. It stays inside the tensors that it was given; and a byte that it writes is
written once, and read by nobody but the program that writes it, before that. The second rule is what makes programs
independent of one another's order, and a gradient in its logits' memory right. (compute-sanitizer's racecheck looks
at shared memory alone.)
"""

import contextlib
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

    chunks: list[tuple[np.ndarray, ...]] = field(default_factory=list)

    def add(self, addresses: np.ndarray, size: int, program: int, moment: int) -> None:
        ones = np.ones(addresses.size, dtype=np.int64)
        self.chunks.append((addresses.astype(np.int64).reshape(-1), size * ones, program * ones, moment * ones))

    def whole(self) -> tuple[np.ndarray, ...]:
        return (
            tuple(np.concatenate(parts) for parts in zip(*self.chunks, strict=True)) or (np.empty(0, np.int64),) * 4
        )

    def bytes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each byte touched: where, by which program, when."""
        addresses, sizes, programs, moments = self.whole()
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return np.repeat(addresses, sizes) + within, np.repeat(programs, sizes), np.repeat(moments, sizes)


@dataclass
class Launch:
    """One kernel over its grid."""

    kernel: str
    tensors: list[Tensor]
    loads: Accesses = field(default_factory=Accesses)
    stores: Accesses = field(default_factory=Accesses)

    def reads(self, tensor: Tensor) -> Tensor:
        return _counts(self.loads, tensor)

    def writes(self, tensor: Tensor) -> Tensor:
        return _counts(self.stores, tensor)

    def check(self) -> None:
        given = np.unique(np.concatenate([_bytes_of(tensor) for tensor in self.tensors]))
        read, reader, read_at = self.loads.bytes()
        written, writer, written_at = self.stores.bytes()
        for what, touched in (("reads", read), ("writes", written)):
            outside = ~np.isin(touched, given)
            assert not outside.any(), f"{self.kernel} {what} {outside.sum()} bytes outside of its tensors"
        order = np.argsort(written, kind="stable")
        written, writer, written_at = written[order], writer[order], written_at[order]
        assert (np.diff(written) > 0).all(), f"{self.kernel} writes an element twice"
        if not written.size:
            return
        at = np.minimum(np.searchsorted(written, read), written.size - 1)
        shared = written[at] == read
        another = shared & (reader != writer[at])
        assert not another.any(), f"{self.kernel} reads {another.sum()} bytes that another program writes"
        late = shared & (read_at > written_at[at])
        assert not late.any(), f"{self.kernel} reads {late.sum()} bytes after it has written over them"


@contextlib.contextmanager
def watched() -> Iterator[list[Launch]]:
    """Run kernels in the interpreter, and follow them. Triton must not have been imported here before."""
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # read when Triton is imported, and when a kernel is made
        yield from _followed()


def _followed() -> Iterator[list[Launch]]:
    from triton.runtime import interpreter

    launches: list[Launch] = []
    builder, execute = interpreter.interpreter_builder, interpreter.GridExecutor.__call__
    load, store = builder.create_masked_load, builder.create_masked_store
    moments = iter(range(10**12))

    def note(accesses: Accesses, pointers, mask) -> None:
        size = np.dtype(interpreter._get_np_dtype(pointers.get_element_ty())).itemsize
        x, y, z = builder.grid_idx
        assert not y and not z, "programs are numbered along one dimension"
        accesses.add(pointers.data[mask.data.astype(bool)], size, x, next(moments))

    def create_masked_load(pointers, mask, *rest):
        note(launches[-1].loads, pointers, mask)
        return load(pointers, mask, *rest)

    def create_masked_store(pointers, value, mask, *rest):
        note(launches[-1].stores, pointers, mask)
        return store(pointers, value, mask, *rest)

    def launch(executor, *args, **kwargs):
        launches.append(Launch(executor.fn.__name__, [x for x in args if isinstance(x, Tensor)]))
        execute(executor, *args, **kwargs)
        launches[-1].check()

    with (
        mock.patch.object(builder, "create_masked_load", create_masked_load),
        mock.patch.object(builder, "create_masked_store", create_masked_store),
        mock.patch.object(interpreter.GridExecutor, "__call__", launch),
    ):
        yield launches


def _addresses(tensor: Tensor) -> np.ndarray:
    """Of every element, in order. In numpy: memory that tests count is torch's."""
    places = sum(
        index * stride for index, stride in zip(np.indices(tensor.shape, sparse=True), tensor.stride(), strict=True)
    )
    return (tensor.data_ptr() + np.broadcast_to(places, tensor.shape) * tensor.element_size()).reshape(-1)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return (_addresses(tensor)[:, None] + np.arange(tensor.element_size())).reshape(-1)


def _counts(accesses: Accesses, tensor: Tensor) -> Tensor:
    """How often each element was touched, as one of its size."""
    addresses, sizes, _, _ = accesses.whole()
    values, times = np.unique(addresses[sizes == tensor.element_size()], return_counts=True)
    own = _addresses(tensor)
    at = np.minimum(np.searchsorted(values, own), max(len(values) - 1, 0))
    found = values[at] == own if len(values) else np.zeros(own.size, dtype=bool)
    return torch.from_numpy(np.where(found, times[at] if len(times) else 0, 0)).view(tensor.shape)
