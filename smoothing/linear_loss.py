"""Label-smoothed cross entropy straight from hidden states: the head and its loss in one, the vocabulary sharded.

Legend: T tokens, N of them labelled, S rows of this rank's weight (padding included), H hidden.
"""

from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from smoothing.core import agreement
from smoothing.core.agreement import Handshake
from smoothing.core.arguments import argument_problem, dtype_problem, tensor_problem
from smoothing.core.call import LossCall, TokenStats
from smoothing.core.options import DEFAULT_IGNORE_INDEX, LossOptions
from smoothing.core.refusal import refuse_at_handshake
from smoothing.core.statistics import Combined, token_loss
from smoothing.kernels.dispatch import backend_for
from smoothing.linear.gradients import HeadGradients, Wanted
from smoothing.linear.head import LinearHead
from smoothing.shard import VocabShard


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shard: VocabShard | None = None,
    *,
    bias: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    smoothing_prior: Tensor | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
    label_tokens: int | None = None,
) -> Tensor | tuple[Tensor, TokenStats]:
    """`vocab_parallel_cross_entropy(hidden @ weight.T + bias, ...)` without the logits; same options, same loss.

        loss = lse(z) - (1-ε)·z_y - ε·(h·w̄ + b̄) + z_loss·lse(z)²,     w̄ = Σ_v u_v W_v,  b̄ = Σ_v u_v b_v

    `hidden` `[..., H]`, alike on all ranks; `weight` `[S, H]` and `bias` `[S]`, this rank's rows. Each rank ends with
    the whole gradient of `hidden` (the ranks' parts are summed here) and that of its own rows. `target` as in
    `vocab_parallel_cross_entropy`; only rows with a label are looked at. The head works through them in chunks whose
    logits fit `chunk_bytes` (at least one row; None: a quarter of the weight's size in fp32, or 16 MiB; on a device
    half of it, or 256 MiB). Under autocast it computes in autocast's dtype, as `F.linear` does; products
    accumulate in fp32.

    With a scalar reduction the gradients are computed along with the loss: three products in all, two if `weight` or
    `hidden` is frozen, one without grad. `reduction="none"` computes logits anew in backward: four. Gradients of
    `weight` are summed in fp32, the smoothing part algebraically, and rounded to its dtype once; an upstream factor
    other than 1 rounds once more. A scalar loss can be differentiated once; doing so again raises `RuntimeError`.

    Returns the loss, or `(loss, TokenStats)` with `return_stats`. Raises `ValueError` on every rank if any rank's
    arguments are wrong or the ranks' differ.
    Collectives, C chunks of n tokens: one all-gather of 72 bytes; with smoothing, but no softcap, one all-reduce of
    H+1 numbers; C all-gathers of 12·n bytes (with a softcap or probabilities 4·n more each) and, if `hidden` needs a
    gradient, C all-reduces of n·H numbers (in backward with `reduction="none"`).
    On a device the host waits once, to count the labelled tokens, unless `label_tokens` says how many they are (a
    wrong number raises as a wrong target does); and once more the first time that several ranks use a shard. Not
    while a CUDA graph is captured on one rank, whose replays may have other labels, and more or fewer.
    """
    options = LossOptions(label_smoothing, ignore_index, reduction, z_loss, logit_softcap)
    try:
        job = _checked(
            hidden,
            weight,
            bias,
            target,
            shard,
            options,
            smoothing_prior,
            num_items_in_batch,
            chunk_bytes,
            label_tokens,
            return_stats,
        )
    except Exception as error:  # whatever it is, the other ranks must learn of it
        refuse_at_handshake(error, shard, hidden, target)
    with torch.autocast(hidden.device.type, enabled=False):
        loss, *stats = job.run(hidden.reshape(job.leading.numel(), hidden.shape[-1]), weight, bias)
    return (loss, TokenStats(*stats)) if return_stats else loss


def _checked(
    hidden,
    weight,
    bias,
    target,
    shard,
    options: LossOptions,
    prior,
    num_items_in_batch,
    chunk_bytes,
    label_tokens,
    return_stats,
) -> "_Job":
    """This call, its arguments looked at. Raises `ValueError` for one that is wrong."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    if (
        problem := tensor_problem(**tensors)
        or dtype_problem(**tensors)
        or _head_problem(hidden, weight, bias, chunk_bytes)
    ):
        raise ValueError(problem)
    leading, size = hidden.shape[:-1], weight.shape[0]
    shard = VocabShard.whole(size) if shard is None else shard
    if problem := argument_problem(hidden, target, shard, options, prior, num_items_in_batch, size):
        raise ValueError(problem)
    dtype = _compute_dtype(hidden, weight)
    grad = torch.is_grad_enabled()
    wanted = Wanted(*(grad and x is not None and x.requires_grad for x in (hidden, weight, bias)))
    soft = target.is_floating_point()
    flat_T = target.reshape(leading.numel(), size) if soft else target.reshape(-1)
    masked = not soft and keeps_every_row(hidden.device)
    if problem := _label_tokens_problem(label_tokens, flat_T):
        raise ValueError(problem)
    rows_N = None if soft or masked else _labelled(flat_T, options.ignore_index, label_tokens)
    statistics_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    call = LossCall(
        target=flat_T if rows_N is None else flat_T[rows_N],
        shard=shard,
        options=options,
        prior=None if prior is None else prior[: shard.real_size].to(statistics_dtype),
        statistics_dtype=statistics_dtype,
        input_dtype=dtype,
        batch_checksum=agreement.batch_checksum(flat_T, num_items_in_batch) if shard.world_size > 1 else None,
        alike=("linear", hidden.shape[-1], bias is None, wanted, chunk_bytes),
    )
    return _Job(call, leading, rows_N, masked, wanted, num_items_in_batch, chunk_bytes, return_stats)


@dataclass(frozen=True)
class _Job:
    """A call without the tensors that may need gradients."""

    call: LossCall
    leading: torch.Size
    rows_N: Tensor | None  # the labelled tokens; None for all
    masked: bool  # tokens without a label are among them
    wanted: Wanted
    num_items_in_batch: int | Tensor | None
    chunk_bytes: int | None
    return_stats: bool

    def run(self, *tensors: Tensor | None) -> tuple:
        """Loss, and statistics if asked for: by way of autograd only where a gradient is wanted."""
        if not any(self.wanted):
            outcome = self.forward(*tensors)
            return outcome.loss, *outcome.stats
        scalar = self.call.options.reduction != "none"
        return (_ScalarLoss if scalar else _TokenLosses).apply(*tensors, self)

    def head(self, hidden_TH: Tensor, weight_SH: Tensor, bias_S: Tensor | None) -> LinearHead:
        hidden_NH = hidden_TH if self.rows_N is None else hidden_TH[self.rows_N]
        if self.masked:  # whatever they hold, NaN included
            hidden_NH = hidden_NH.masked_fill(~self.call.valid_T.unsqueeze(1), 0.0)
        return LinearHead.of(self.call, hidden_NH, weight_SH, bias_S, self.chunk_bytes)

    def forward(self, *tensors: Tensor | None, with_gradients: bool = False) -> "_Outcome":
        """Loss and statistics; of a scalar loss, the gradients' sums too if asked for."""
        handshake = self.call.start_handshake()
        head, options = self.head(*tensors), self.call.options
        scalar, gradients = options.reduction != "none", None
        divisor = self.call.divisor(self.num_items_in_batch, all_labelled=not self.masked) if scalar else None
        if with_gradients:
            token_weight_N = self.mask((1 / divisor).expand(self.call.tokens))
            gradients = HeadGradients(head, self.call, self.wanted, token_weight_N)
        combined, mean_row_H, handshake = head.forward(handshake, gradients)
        loss_N = token_loss(combined, options.label_smoothing, options.z_loss)
        if self.masked:
            loss_N = loss_N.masked_fill(~self.call.valid_T, 0.0)
        loss = loss_N.sum() / divisor if scalar else self.scatter(loss_N, self.leading)
        stats = ()
        if self.return_stats:
            compact = self.call.token_stats(combined, loss_N.shape)
            stats = tuple(None if x is None else self.scatter(x, self.leading) for x in compact)
        sums = None if gradients is None else gradients.finish(mean_row_H)
        return _Outcome(loss, stats, combined, mean_row_H, handshake, sums)

    def mask(self, token_weight_N: Tensor) -> Tensor:
        """What tokens weigh, 0 for those without a label."""
        return token_weight_N.where(self.call.valid_T, 0.0) if self.masked else token_weight_N

    def scatter(self, compact_N: Tensor, shape: torch.Size, dtype: torch.dtype | None = None) -> Tensor:
        """Values of the labelled tokens in their places, zero elsewhere."""
        compact_N = compact_N.to(dtype or compact_N.dtype)
        if self.rows_N is None:
            return compact_N.view(shape)
        whole_T = compact_N.new_zeros(self.leading.numel(), *compact_N.shape[1:])
        whole_T[self.rows_N] = compact_N
        return whole_T.view(shape)


@dataclass
class _Outcome:
    loss: Tensor
    stats: tuple
    combined: Combined
    mean_row_H: Tensor | None
    handshake: Handshake
    sums: list[Tensor | None] | None


class _ScalarLoss(torch.autograd.Function):
    """Gradients along with the loss. Keeps them alone: no logits, no hidden states."""

    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_SH: Tensor, bias_S: Tensor | None, job: _Job):
        outcome = job.forward(hidden_TH, weight_SH, bias_S, with_gradients=True)
        inputs = (hidden_TH, weight_SH, bias_S)
        ctx.gradients = []
        for index, given in enumerate(inputs):
            total, outcome.sums[index] = outcome.sums[index], None  # one sum at a time beside its rounded copy
            if total is not None:
                # fp16 must wait for the upstream gradient: that is where loss scaling comes in
                early = total.dtype if given.dtype == torch.float16 else given.dtype
                total = job.scatter(total, given.shape, early) if index == 0 else total.to(early)
            ctx.gradients.append(total)
        ctx.dtypes = [None if given is None else given.dtype for given in inputs]
        ctx.scale = backend_for(hidden_TH.device, job.call).scale
        ctx.mark_non_differentiable(*(x for x in outcome.stats if x is not None))
        return outcome.loss, *outcome.stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "vocab_parallel_linear_cross_entropy was differentiated a second time: with reduction='mean' or "
                "'sum' its gradients are made with the loss and handed over once. Call it again, or use "
                "reduction='none'."
            )
        for gradient in gradients:
            if gradient is not None:
                ctx.scale(gradient, upstream)
        return *(None if grad is None else grad.to(dt) for grad, dt in zip(gradients, ctx.dtypes, strict=True)), None


class _TokenLosses(torch.autograd.Function):
    """One loss a token. Keeps its inputs and a few numbers a token, and computes the logits anew in backward."""

    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_SH: Tensor, bias_S: Tensor | None, job: _Job):
        outcome = job.forward(hidden_TH, weight_SH, bias_S)
        ctx.job, ctx.handshake = job, outcome.handshake
        inputs = (hidden_TH, weight_SH, bias_S, job.call.target, job.call.prior)
        ctx.save_for_backward(*inputs, outcome.mean_row_H, *outcome.combined)
        ctx.mark_non_differentiable(*(x for x in outcome.stats if x is not None))
        return outcome.loss, *outcome.stats

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor, *_):
        job, saved = ctx.job, ctx.saved_tensors
        inputs, (_target, _prior, mean_row_H, *combined) = saved[:3], saved[3:]  # the call has target and prior
        upstream_T = upstream.reshape(-1).to(job.call.statistics_dtype)
        token_weight_N = upstream_T if job.rows_N is None else upstream_T[job.rows_N]
        head = job.head(*inputs)
        gradients = HeadGradients(head, job.call, job.wanted, job.mask(token_weight_N))
        head.backward(ctx.handshake, Combined(*combined), gradients)
        grad_hidden, grad_weight, grad_bias = gradients.finish(mean_row_H)
        if grad_hidden is not None:
            grad_hidden = job.scatter(grad_hidden, inputs[0].shape, inputs[0].dtype)
        rest = zip((grad_weight, grad_bias), inputs[1:], strict=True)
        return grad_hidden, *(None if grad is None else grad.to(given.dtype) for grad, given in rest), None


def keeps_every_row(device: torch.device) -> bool:
    """Whether tokens without a label go through the head and weigh nothing, so that the host need not count them.

    Only while a CUDA graph is captured, since they cost what labelled ones cost.
    """
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _labelled(target_T: Tensor, ignore_index: int, count: int | None) -> Tensor | None:
    """Indices of the tokens that have a label, None if all have. Without their `count` the host waits for it.

    Raises `ValueError` for a wrong count, on a device by an assertion there.
    """
    valid_T = target_T != ignore_index
    if count is None:
        rows_N = valid_T.nonzero().squeeze(1)
    else:
        held = valid_T.sum()
        if target_T.device.type != "cpu":
            torch._assert_async(held == count)
        elif held != count:
            raise ValueError(f"label_tokens must be the number of labelled tokens, {held}, got {count}")
        rows_N = valid_T.nonzero_static(size=int(count)).squeeze(1)
    return None if len(rows_N) == len(target_T) else rows_N


def _label_tokens_problem(count: int | None, target_T: Tensor) -> str | None:
    """What is wrong with the number of labelled tokens that a caller gave, as far as it tells by itself, or None."""
    if count is None:
        return None
    if not isinstance(count, Integral) or isinstance(count, bool) or not 0 <= count <= len(target_T):
        return (
            f"label_tokens must be None or an integer from 0 to {len(target_T)}, the number of tokens, got {count!r}"
        )
    if target_T.is_floating_point():
        return "label_tokens counts targets that are ids; leave it out where they are probabilities"
    return None


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What `F.linear` would compute in; operands that differ outside autocast are promoted."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _head_problem(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_bytes: int | None) -> str | None:
    """What is wrong with what a loss from logits does not have, or None."""
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        return f"weight must have shape [S, {hidden.shape[-1]}], this rank's rows, got {tuple(weight.shape)}"
    if bias is not None and bias.shape != weight.shape[:1]:
        return f"bias must have shape {tuple(weight.shape[:1])}, one number for each row, got {tuple(bias.shape)}"
    return chunk_bytes_problem(chunk_bytes)


def chunk_bytes_problem(chunk_bytes: int | None) -> str | None:
    """What is wrong with this budget, or None."""
    if chunk_bytes is None or (
        isinstance(chunk_bytes, int) and not isinstance(chunk_bytes, bool) and chunk_bytes > 0
    ):
        return None
    return f"chunk_bytes must be None or an integer of at least 1, got {chunk_bytes!r}"
