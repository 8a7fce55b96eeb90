"""The fused head's arithmetic on a device, on a CPU: GEMMs of low-precision factors that return fp32 sums.

A CPU has no such GEMM, and the head takes another path there. Here the same factors are widened and multiplied in
fp32, which is what a matrix unit computes of them. `tests/smoothing/test_device.py` runs the real one where there is
a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

from smoothing import vocab_parallel_linear_cross_entropy
from smoothing.linear import matmul
from smoothing.linear.accumulator import power_of_two
from smoothing.linear.head import LinearHead

TOKENS, VOCAB, HIDDEN = 600, 512, 32
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class DeviceTorch:
    """`torch` with the two GEMMs of a device; everything else is torch's."""

    def __getattr__(self, name: str):
        return getattr(torch, name)

    @staticmethod
    def mm(left, right, out, out_dtype=None):
        assert left.dtype == right.dtype
        return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)

    @staticmethod
    def addmm(total, left, right, out, out_dtype=None):
        assert left.dtype == right.dtype
        return torch.addmm(total, left.to(out.dtype), right.to(out.dtype), out=out)


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch):
    monkeypatch.setattr(matmul, "gemm_dtype", lambda compute, statistics, device: compute)
    monkeypatch.setattr(matmul, "torch", DeviceTorch())
    monkeypatch.setattr(LinearHead, "factored", False)


def problem(dtype, tokens: int = TOKENS, bias: bool = False):
    draw = torch.Generator().manual_seed(0)
    shapes = ((tokens, HIDDEN), (VOCAB, HIDDEN)) + (((VOCAB,),) if bias else ())
    leaves = [torch.randn(*shape, generator=draw).to(dtype) for shape in shapes]
    target = torch.randint(VOCAB, (tokens,), generator=draw)
    target[::7] = -100
    return leaves, target


def gradients(loss, leaves, dtype, scale: float = 1.0) -> list[torch.Tensor]:
    leaves = [leaf.to(dtype, copy=True).requires_grad_() for leaf in leaves]
    (loss(*leaves) * scale).backward()
    return [leaf.grad.double() / scale for leaf in leaves]


def error(got, truth) -> float:
    return ((got - truth).norm() / truth.norm()).item()


def plain(target, reduction, softcap=None):
    def loss(hidden, weight, bias=None):
        logits = F.linear(hidden, weight, bias)
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, target, label_smoothing=0.1, reduction=reduction).sum()

    return loss


def fused(target, reduction, softcap=None):
    def loss(hidden, weight, bias=None):
        options = {"label_smoothing": 0.1, "reduction": reduction, "logit_softcap": softcap, "chunk_bytes": 1 << 18}
        return vocab_parallel_linear_cross_entropy(hidden, weight, target, bias=bias, **options).sum()

    return loss


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (False, 5.0), (True, 5.0)])
def test_no_further_from_fp64_than_twice_the_plain_method(dtype, reduction, bias, softcap):
    leaves, target = problem(dtype, bias=bias)
    truth = gradients(plain(target, reduction, softcap), leaves, torch.float64)
    own = gradients(plain(target, reduction, softcap), leaves, dtype)
    for got, allowed, exact in zip(
        gradients(fused(target, reduction, softcap), leaves, dtype), own, truth, strict=True
    ):
        assert error(got, exact) <= 2 * error(allowed, exact)


@pytest.mark.parametrize("scale", [1.0, 2.0**-20, 2.0**20])
def test_a_mean_of_many_tokens_losses_does_not_underflow(scale):
    """Tokens of a few thousand weigh 1/N, and so would a factor of the fp16 GEMM: below what fp16 can hold."""
    leaves, target = problem(torch.float16, tokens=8192)
    leaves[1] = leaves[1].float()
    count = (target != -100).sum()

    def loss(hidden, weight):
        return fused(target, "none")(hidden, weight) / count

    def under_autocast(hidden, weight):
        with torch.autocast("cpu", torch.float16):
            return loss(hidden, weight)

    wide = [leaf.float() for leaf in leaves]
    truth = gradients(lambda *given: plain(target, "none")(*given) / count, wide, torch.float64)
    for got, exact in zip(gradients(under_autocast, wide, torch.float32, scale), truth, strict=True):
        assert error(got, exact) <= 1e-3


UNITS = {(): 1, (0.0,): 1, (1.0,): 1, (0.75, -5.0): 4, (3e-9,): 2.0**-29, (1e-45,): 2.0**-126, (3e38,): 2.0**127}


@pytest.mark.parametrize(("weights", "unit"), UNITS.items())
def test_what_tokens_weights_are_divided_by(weights, unit):
    assert power_of_two(torch.tensor(weights)) == unit
