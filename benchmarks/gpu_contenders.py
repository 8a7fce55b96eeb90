"""What `gpu.py` compares on one GPU: losses from logits, and heads from hidden states, in bf16.

Each is used as its own documentation recommends. What cannot smooth is timed without, and says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from smoothing import smoothed_cross_entropy, vocab_parallel_linear_cross_entropy

SMOOTHING = 0.1
SPREAD = 3.0  # of the logits: some 170 of 128,256 then hold half of the probability


@dataclass(frozen=True)
class Sizes:
    tokens: int
    vocab: int
    hidden: int = 0  # 0: from logits


@dataclass
class Given:
    """Inputs of one measurement. From logits, `hidden` is None and `weight` holds the logits."""

    hidden: Tensor | None
    weight: Tensor
    target: Tensor
    chunk_bytes: int | None = None  # for the head here; None: its own choice

    @classmethod
    def make(cls, sizes: Sizes, device: str, seed: int = 0) -> "Given":
        """Logits of which a few hold most of the probability, as a trained model's do."""
        generator = torch.Generator(device).manual_seed(seed)
        options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        target = torch.randint(sizes.vocab, (sizes.tokens,), generator=generator, device=device)
        if not sizes.hidden:
            return cls(None, torch.randn(sizes.tokens, sizes.vocab, **options).mul_(SPREAD).requires_grad_(), target)
        hidden = torch.randn(sizes.tokens, sizes.hidden, **options).mul_(SPREAD).requires_grad_()
        weight = torch.randn(sizes.vocab, sizes.hidden, **options).mul_(sizes.hidden**-0.5).requires_grad_()
        return cls(hidden, weight, target)

    def clear(self) -> None:
        self.weight.grad = None
        if self.hidden is not None:
            self.hidden.grad = None


Loss = Callable[[Given], Tensor]


# From logits.


def here_in_place(given: Given) -> Tensor:
    return smoothed_cross_entropy(given.weight, given.target, label_smoothing=SMOOTHING, inplace_backward=True)


def here_kept(given: Given) -> Tensor:
    return smoothed_cross_entropy(given.weight, given.target, label_smoothing=SMOOTHING)


def torch_loss(given: Given) -> Tensor:
    return F.cross_entropy(given.weight.float(), given.target, label_smoothing=SMOOTHING)


def liger_loss() -> Loss:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(label_smoothing=SMOOTHING)
    return lambda given: loss(given.weight, given.target)


def quack_loss() -> Loss:
    from quack import cross_entropy  # cannot smooth

    return lambda given: cross_entropy(given.weight, given.target, inplace_backward=True)


# From hidden states.


def here_fused(given: Given) -> Tensor:
    """With `label_tokens`, the number of labels, as `launch/` passes it."""
    options = {"label_smoothing": SMOOTHING, "chunk_bytes": given.chunk_bytes, "label_tokens": len(given.target)}
    return vocab_parallel_linear_cross_entropy(given.hidden, given.weight, given.target, **options)


def torch_head(given: Given) -> Tensor:
    return F.cross_entropy(F.linear(given.hidden, given.weight).float(), given.target, label_smoothing=SMOOTHING)


def here_fp32_logits(given: Given) -> Tensor:
    options = {"label_smoothing": SMOOTHING, "chunk_bytes": given.chunk_bytes, "label_tokens": len(given.target)}
    return vocab_parallel_linear_cross_entropy(given.hidden, given.weight, given.target, fp32_logits=True, **options)


def liger_scaled_head(sharded: bool) -> Loss:
    """Liger's heads on CUTLASS, which cannot smooth: of one rank, or of a tensor-parallel group, here of one."""
    from liger_kernel.ops import fused_linear_scaled_cross_entropy as liger

    group = ()
    if sharded:
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        group = (dist.group.WORLD,)
    heads = (
        liger.LigerFusedLinearScaledCrossEntropyFunction,
        liger.LigerFusedLinearScaledCrossEntropyTPFunction,
    )
    return lambda given: heads[sharded].apply(given.hidden, given.weight, given.target, *group).mean()


def fla_head() -> Loss:
    from fla.modules.fused_linear_cross_entropy import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss(label_smoothing=SMOOTHING)
    return lambda given: loss(given.hidden[None], given.target[None], given.weight)


def liger_head() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(label_smoothing=SMOOTHING, accum_dtype=torch.float32)
    return lambda given: loss(given.weight, given.hidden, given.target)


def cut_head(**how) -> Loss:
    from cut_cross_entropy import linear_cross_entropy  # cannot smooth

    return lambda given: linear_cross_entropy(given.hidden, given.weight, given.target, **how)


def torch_chunked_head() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # since torch 2.13; with smoothing it makes all logits
    return lambda given: F.linear_cross_entropy(given.hidden, given.weight, given.target, options=options)


def compiled(loss: Loss) -> Loss:
    """Compiled for one shape at a time, as if it were the only one."""
    torch._dynamo.reset()
    return torch.compile(loss, dynamic=False)


def deepspeed_head() -> Loss:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy  # cannot smooth

    def loss(given: Given) -> Tensor:
        bounds = {"vocab_start_index": 0, "vocab_end_index": len(given.weight)}
        return vocab_parallel_linear_cross_entropy(given.hidden, given.weight, given.target, tp_group=None, **bounds)

    return loss


def products_alone(given: Given) -> None:
    """The three products of a head, each in one piece and with a bf16 result: the rate that the matrix units give."""
    with torch.no_grad():
        logits_TV = given.hidden @ given.weight.t()
        logits_TV @ given.weight
        logits_TV.t() @ given.hidden


@dataclass(frozen=True)
class Contender:
    name: str
    make: Callable[[], Loss]
    smooths: bool = True
    needs: str | None = None
    checked: bool = True


LOSSES = [
    Contender("here, in place", lambda: here_in_place),
    Contender("here", lambda: here_kept),
    Contender("Liger cross entropy", liger_loss, needs="liger_kernel"),
    Contender("quack cross entropy", quack_loss, smooths=False, needs="quack"),
    Contender("F.cross_entropy", lambda: torch_loss),
    Contender("F.cross_entropy, compiled", lambda: compiled(torch_loss)),
]
HEADS = [
    Contender("fused, here", lambda: here_fused),
    Contender("fused, here, logits in fp32", lambda: here_fp32_logits),
    Contender("Liger fused linear cross entropy", liger_head, needs="liger_kernel"),
    Contender("Liger scaled head", lambda: liger_scaled_head(False), smooths=False, needs="liger_kernel"),
    Contender(
        "Liger scaled head, tensor parallel", lambda: liger_scaled_head(True), smooths=False, needs="liger_kernel"
    ),
    Contender("fla fused linear cross entropy", fla_head, needs="fla"),
    Contender("Cut Cross-Entropy", cut_head, smooths=False, needs="cut_cross_entropy"),
    Contender(
        "Cut Cross-Entropy, whole", lambda: cut_head(filter_eps=None), smooths=False, needs="cut_cross_entropy"
    ),
    Contender("F.linear_cross_entropy", torch_chunked_head, smooths=False),
    Contender("DeepSpeed vocab_parallel_linear_cross_entropy", deepspeed_head, smooths=False, needs="deepspeed"),
    Contender("F.linear + F.cross_entropy", lambda: torch_head),
    Contender("F.linear + F.cross_entropy, compiled", lambda: compiled(torch_head)),
    Contender("the three products alone", lambda: products_alone, checked=False),
]
