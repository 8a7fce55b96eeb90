"""A GPU without one: the code that a GPU would run, on CUDA tensors that have shape, dtype and memory, but no data.

They are torch's own (`FakeTensorMode`), of any size, since nothing is computed. What can be seen of a call: for what
the host would wait, which kernels are launched, which collectives are called, and the most memory that is alive.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from smoothing.core import call
from smoothing.kernels import dispatch, head_kernels, triton_kernels

aten = torch.ops.aten
WITHOUT_A_KERNEL = {"empty", "empty_like", "new_empty", "lift_fresh", "promote_types", "reshape_alias"}


class Seen(TorchDispatchMode):
    """What happens while this is entered. `labelled`: how many there are of what the host has counted for it."""

    def __init__(self, labelled: int = 0):
        super().__init__()
        self.labelled = labelled
        self.waits: list[str] = []  # any other value that the host asks for is an error of FakeTensorMode's
        self.launches, self.operations, self.collectives = Counter(), Counter(), Counter()
        self.bytes = self.most_bytes = 0
        self._alive: set[int] = set()
        self._turn = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (aten.nonzero.default, aten.allclose.default):
            self.waits.append(operation.__name__.removesuffix(".default"))
            if operation is aten.allclose.default:
                return True
            return args[0].new_empty(self.labelled, args[0].dim(), dtype=torch.int64)
        result = operation(*args, **kwargs or {})
        if "index_put" in operation.__name__ and args[2].numel() != 1:
            self.waits += ["nonzero" for index in args[1] if index is not None and index.dtype == torch.bool]
        if operation in (aten._to_copy.default, aten.copy_.default):
            source = args[1] if operation is aten.copy_.default else args[0]
            if source.device != result.device:
                self.waits.append(f"copy from {source.device.type} to {result.device.type}")
        name = operation.__name__.partition(".")[0].strip("_")
        if operation.namespace == "c10d":
            self.collectives[name] += 1
        elif not (operation.is_view or operation.namespace == "prim" or name in WITHOUT_A_KERNEL):
            self.operations[name] += 1
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, memory: torch.UntypedStorage) -> None:
        if memory._cdata not in self._alive:
            self._alive.add(memory._cdata)
            self.bytes += memory.nbytes()
            self.most_bytes = max(self.most_bytes, self.bytes)
            weakref.finalize(memory, self._release, memory._cdata, memory.nbytes(), self._turn)

    def _release(self, memory: int, size: int, turn: int) -> None:
        self._alive.discard(memory)
        if turn == self._turn:
            self.bytes -= size

    def forget(self) -> None:
        """Start anew; what is alive now was there before."""
        self.waits, self.launches, self.operations, self.collectives = [], Counter(), Counter(), Counter()
        self.bytes = self.most_bytes = 0
        self._turn += 1


class _Kernel:
    """A Triton kernel that is launched on nothing."""

    def __init__(self, name: str, seen: Seen):
        self.name, self.seen = name, seen

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **kwargs: self.seen.launches.update([self.name])


def allow_cuda_tensors(folder: Path) -> None:
    """Compile, in `folder`, what FakeTensorMode needs of a torch without CUDA; skips where there is no compiler."""
    if not torch.backends.cuda.is_built():
        from torch.utils import cpp_extension

        # with its threads: once there seem to be devices, it would start some for these, and could not be forked
        torch.zeros((), requires_grad=True).backward()
        source = str(Path(__file__).with_suffix(".cpp"))
        try:
            cpp_extension.load("fake_gpu", [source], build_directory=str(folder), is_python_module=False)
        except (RuntimeError, OSError) as error:
            pytest.skip(f"needs a C++ compiler: {error}")


@contextlib.contextmanager
def fake_gpu(patch: pytest.MonkeyPatch) -> Iterator[Seen]:
    """What is seen of a device where Triton works and no graph is captured."""
    seen = Seen()
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setitem(dispatch._triton_works, "cuda", True)
    patch.setattr(call, "_headers", {})
    for module in (triton_kernels, head_kernels):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            patch.setattr(module, name, _Kernel(name, seen))
    with FakeTensorMode(), seen:
        yield seen


def gradients(loss: torch.Tensor) -> tuple:
    """What the last custom function of a loss gives its inputs; the engine itself would need a device."""
    node, given = loss.grad_fn, (torch.ones_like(loss),)
    while not hasattr(node, "saved_tensors"):  # of torch's own
        given = node(*given)
        given, (node, _) = (given,) if isinstance(given, torch.Tensor) else given[:1], node.next_functions[0]
    return node.apply(*given)
