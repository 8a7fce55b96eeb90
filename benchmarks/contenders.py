"""The heads that `heads.py` compares: each takes one problem and does forward and backward of head and loss.

Every one ends with the whole gradient of the hidden states on each rank, and the gradient of the rank's own rows.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from smoothing import VocabShard, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from smoothing.core.options import DEFAULT_IGNORE_INDEX
from smoothing.model.gather_logits import gather_logits


@dataclass
class Problem:
    hidden: Tensor  # [T, H], alike on all ranks
    weight: Tensor  # [S, H]
    target: Tensor  # [T]
    shard: VocabShard
    smoothing: float

    @classmethod
    def make(cls, tokens: int, vocab: int, hidden: int, smoothing: float, ignored: float, dtype=torch.float32):
        """Random, the same for the same arguments; the share `ignored` of the labels carries the ignore index."""
        shard = VocabShard.split(vocab, dist.group.WORLD)
        generator = torch.Generator().manual_seed(0)
        hidden_TH = torch.randn(tokens, hidden, generator=generator)
        target_T = torch.randint(vocab, (tokens,), generator=generator)
        target_T[torch.randperm(tokens, generator=generator)[: round(ignored * tokens)]] = DEFAULT_IGNORE_INDEX
        generator.manual_seed(1 + shard.rank)
        weight_SH = torch.randn(shard.size, hidden, generator=generator).mul_(hidden**-0.5)
        leaves = (hidden_TH.to(dtype).requires_grad_(), weight_SH.to(dtype).requires_grad_())
        return cls(*leaves, target_T, shard, smoothing)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


class _SumGradients(torch.autograd.Function):
    """What a column-parallel head does: its input's gradient is summed over the ranks."""

    @staticmethod
    def forward(ctx, hidden: Tensor):
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


def _logits(p: Problem) -> Tensor:
    return F.linear(_SumGradients.apply(p.hidden), p.weight)


def fused(p: Problem) -> Tensor:
    return vocab_parallel_linear_cross_entropy(p.hidden, p.weight, p.target, p.shard, label_smoothing=p.smoothing)


def fused_unsmoothed(p: Problem) -> Tensor:
    return vocab_parallel_linear_cross_entropy(p.hidden, p.weight, p.target, p.shard)


def sharded(p: Problem) -> Tensor:
    return vocab_parallel_cross_entropy(_logits(p), p.target, p.shard, label_smoothing=p.smoothing)


def deepspeed_fused(p: Problem) -> Tensor:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy as theirs

    bounds = {"vocab_start_index": p.shard.start, "vocab_end_index": p.shard.stop}
    return theirs(p.hidden, p.weight, p.target, tp_group=p.shard.group, **bounds)


def deepspeed_sharded(p: Problem) -> Tensor:
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy as theirs

    bounds = {"vocab_start_index": p.shard.start, "vocab_end_index": p.shard.stop}
    return _mean_of_labelled(theirs(_logits(p), p.target, tp_group=p.shard.group, **bounds), p)


def megatron_sharded(p: Problem, smoothing: float = 0.0) -> Tensor:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as theirs

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(p.shard.world_size)
    logits = _logits(p).unsqueeze(1)  # [sequence, batch, vocabulary]; overwritten there
    return _mean_of_labelled(theirs(logits, p.target.unsqueeze(1), smoothing).squeeze(1), p)


def megatron_smoothed(p: Problem) -> Tensor:
    """Fails the check on more than one rank: it takes each shard for the whole vocabulary."""
    return megatron_sharded(p, p.smoothing)


def _mean_of_labelled(losses_T: Tensor, p: Problem) -> Tensor:
    labelled_T = p.target != DEFAULT_IGNORE_INDEX
    return (losses_T * labelled_T).sum() / labelled_T.sum()


def gathered(p: Problem) -> Tensor:
    return F.cross_entropy(gather_logits(_logits(p), p.shard), p.target, label_smoothing=p.smoothing)


def gathered_label_smoother(p: Problem) -> Tensor:
    from transformers.trainer_pt_utils import LabelSmoother

    logits = gather_logits(_logits(p), p.shard)
    return LabelSmoother(epsilon=p.smoothing)({"logits": logits[None]}, p.target[None])


def torch_fused(p: Problem) -> Tensor:
    if p.shard.world_size > 1:
        raise NotImplementedError("F.linear_cross_entropy takes no shard of a vocabulary")
    return F.linear_cross_entropy(p.hidden, p.weight, p.target, options=torch.nn.LinearCrossEntropyOptions())


def loss_parallel(p: Problem) -> Tensor:
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cpu", (p.shard.world_size,))
    logits = DTensor.from_local(_logits(p), mesh, [Shard(1)], run_check=False)
    return F.cross_entropy(logits, p.target)


@contextlib.contextmanager
def loss_parallel_context():
    from torch.distributed.tensor.parallel import loss_parallel as context

    with context():
        yield


def products_alone(p: Problem) -> None:
    """The three products that no head can do without, each in one piece, with nothing between them and no traffic."""
    with torch.no_grad():
        labelled_NH = p.hidden[p.target != DEFAULT_IGNORE_INDEX]
        logits_NS = labelled_NH @ p.weight.t()
        logits_NS @ p.weight
        logits_NS.t() @ labelled_NH


@dataclass(frozen=True)
class Contender:
    title: str
    loss: Callable[[Problem], Tensor | None]
    smooths: bool
    context: Callable = contextlib.nullcontext
    backward: bool = True

    def run(self, problem: Problem) -> Tensor | None:
        problem.clear()
        with self.context():
            loss = self.loss(problem)
            if self.backward:
                loss.backward()
        return loss


CONTENDERS = {
    "fused": Contender("fused, here", fused, True),
    "fused-unsmoothed": Contender("fused, here, without smoothing", fused_unsmoothed, False),
    "sharded": Contender("sharded logits, here", sharded, True),
    "deepspeed-fused": Contender("DeepSpeed vocab_parallel_linear_cross_entropy", deepspeed_fused, False),
    "deepspeed-sharded": Contender("F.linear + DeepSpeed vocab_parallel_cross_entropy", deepspeed_sharded, False),
    "megatron-sharded": Contender("F.linear + Megatron-core vocab_parallel_cross_entropy", megatron_sharded, False),
    "megatron-smoothed": Contender("the same with its label_smoothing", megatron_smoothed, True),
    "gathered": Contender("gathered logits + F.cross_entropy", gathered, True),
    "label-smoother": Contender("gathered logits + HF LabelSmoother", gathered_label_smoother, True),
    "loss-parallel": Contender("F.linear + torch loss_parallel", loss_parallel, False, loss_parallel_context),
    "torch-fused": Contender("F.linear_cross_entropy, one rank", torch_fused, False),
    "products": Contender("the three products alone (floor)", products_alone, True, backward=False),
}
