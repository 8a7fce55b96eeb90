"""Label-smoothed cross entropy straight from hidden states: the head and its loss in one, the vocabulary sharded.

Legend: T tokens, N of them labelled, S rows of this rank's weight (padding included), H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smoothing.core.agreement import Handshake
from smoothing.core.arguments import argument_problem, dtype_problem, head_problem, tensor_problem
from smoothing.core.call import LossCall, TokenStats
from smoothing.core.dtensor import local_head
from smoothing.core.once import anchor, once_differentiable, transform_problem
from smoothing.core.options import DEFAULT_IGNORE_INDEX, LossOptions
from smoothing.core.refusal import refuse_at_handshake
from smoothing.core.statistics import Combined, token_loss
from smoothing.kernels.dispatch import backend_for
from smoothing.linear import loop
from smoothing.linear.accumulator import GradientAccumulator, Wanted
from smoothing.linear.choice import runs_in_bf16
from smoothing.linear.chunks import chunk_bytes_problem
from smoothing.linear.head import LinearHead
from smoothing.linear.labelled_tokens import LabelledTokens
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
    logit_scale: float = 1.0,
    return_stats: bool = False,
    chunk_bytes: int | None = None,
    label_tokens: int | None = None,
    fp32_logits: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:
    """Compute `vocab_parallel_cross_entropy(hidden @ weight.T + bias, ...)` without making the logits.

        loss = lse(z) - (1-ε)·z_y - ε·(h·w̄ + b̄) + z_loss·lse(z)²,     w̄ = Σ_v u_v W_v,  b̄ = Σ_v u_v b_v

    Tokens with a label go through the head in chunks. Under autocast it computes in autocast's dtype, as `F.linear`
    does; matrix products accumulate in fp32. In bf16 on a device logits are rounded to bf16, as `F.linear` rounds
    them, and smoothing rides in the product of the weight's gradient, ε·u rounded to bf16. Each rank ends with the
    whole gradient of `hidden` (the ranks' parts are summed here) and that of its own rows of `weight` and `bias`.

    With a scalar reduction the gradients are computed along with the loss: three matrix products in all, two if
    `weight` or `hidden` is frozen, one without grad. `reduction="none"` computes the logits anew in backward: four.
    Gradients of `weight` are summed in fp32, the smoothing part algebraically, and rounded to its dtype once; an
    upstream gradient other than 1 rounds once more.

    Args:
        hidden: `[..., H]` fp32, bf16, fp16 or fp64, alike on all ranks.
        weight: `[S, H]` floating point: this rank's rows, padding included. Or a DTensor `[V, H]`, split along its
            first dimension: `shard` then follows from it.
        target: labels, `[...]` int64 global ids, or probabilities `[..., S]` floating point (this rank's columns).
        shard: which columns this rank holds, and whose group holds the rest; None for a whole vocabulary on one rank.
        bias: `[S]` floating point: this rank's rows; None: none.
        label_smoothing: ε, in [0, 1].
        ignore_index: label of tokens that have none; they take part in nothing.
        reduction: "mean" divides by the number of labelled tokens, or by `num_items_in_batch`; "sum"; "none" gives
            one loss a token. Without any labelled token the loss is 0.0, connected to the graph.
        num_items_in_batch: what "mean" divides by instead, one number; a tensor is not read on the host.
        smoothing_prior: `[S]` floating point, this rank's slice of a distribution over the vocabulary; None: uniform.
        z_loss: weight of `lse(z)²`, at least 0.
        logit_softcap: `cap` of `cap·tanh(z / cap)`, applied to the logits first; None: none.
        logit_scale: what the logits are multiplied by before all else, above 0.
            Hidden states and bias are, once, in their dtype.
        return_stats: also return per-token statistics.
        chunk_bytes: what the logits of a chunk may take (at least one token goes in); None: a quarter of the weight's
            size in fp32, or 16 MiB; on a device half of it, or 256 MiB. There a bf16 weight's head takes all tokens
            at once where their logits in bf16 take no more than the weight would in fp32 (2·H labels on one rank).
        label_tokens: how many tokens have a label; on a device the host then need not wait for their count. A wrong
            number raises as a wrong target does.
        fp32_logits: keep the logits in fp32 on a device: 2 to 10 times closer in the gradient, and slower.

    Returns:
        The loss, `[]` or `[...]`, fp32 (fp64 for fp64 inputs); with `return_stats`, `(loss, TokenStats)`.

    Raises:
        ValueError: on every rank, if any rank's arguments are wrong or the ranks' differ (targets on a device: a
            device-side assertion); under a transform of `torch.func`.
        RuntimeError: in the second backward of a scalar loss, whose gradients are handed over once; where a gradient
            is differentiated again (`create_graph=True`), which has no graph.

    Collectives:
        For C chunks of n tokens: one all-gather of 72 bytes; with smoothing, but no softcap, one all-reduce of H+1
        numbers (H in bf16 on a device, where two chunks are in memory at a time); C all-gathers of 12·n bytes (with a
        softcap or probabilities 4·n more each) and, if `hidden` needs a gradient, C all-reduces of n·H numbers (in
        backward with `reduction="none"`).

        On a device the host waits once, to count the labelled tokens, unless `label_tokens` is passed; and once more
        the first time that several ranks use a shard. Not while a CUDA graph is captured on one rank, whose replays
        may have other labels, and more or fewer.
    """
    options = LossOptions(label_smoothing, ignore_index, reduction, z_loss, logit_softcap, logit_scale)
    try:
        hidden, weight, bias, target, smoothing_prior, shard = local_head(
            hidden, weight, bias, target, smoothing_prior, shard
        )
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
            fp32_logits,
            return_stats,
        )
    except Exception as error:  # whatever it is, the other ranks must learn of it
        refuse_at_handshake(error, shard, hidden, target)
    with torch.autocast(hidden.device.type, enabled=False):
        if options.logit_scale != 1:
            hidden = hidden * options.logit_scale
            bias = None if bias is None else bias * options.logit_scale
        loss, *stats = job.run(hidden.reshape(job.labelled.leading.numel(), hidden.shape[-1]), weight, bias)
    return (loss, TokenStats(*stats)) if return_stats else loss


def _checked(
    hidden: Any,
    weight: Any,
    bias: Any,
    target: Any,
    shard: Any,
    options: LossOptions,
    prior: Any,
    num_items_in_batch: Any,
    chunk_bytes: Any,
    label_tokens: Any,
    fp32_logits: Any,
    return_stats: Any,
) -> "_Job":
    """This call, its arguments looked at. Raises `ValueError` for one that is wrong."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    if (
        problem := transform_problem()
        or tensor_problem(**tensors)
        or dtype_problem(**tensors)
        or head_problem(hidden, weight, bias)
        or chunk_bytes_problem(chunk_bytes)
    ):
        raise ValueError(problem)
    leading, size = hidden.shape[:-1], weight.shape[0]
    shard = VocabShard.whole(size) if shard is None else shard
    if problem := argument_problem(hidden, target, shard, options, prior, num_items_in_batch, size):
        raise ValueError(problem)
    dtype = _compute_dtype(hidden, weight)
    grad = torch.is_grad_enabled()
    wanted = Wanted(*(grad and x is not None and x.requires_grad for x in (hidden, weight, bias)))
    flat_T = target.reshape(leading.numel(), size) if target.is_floating_point() else target.reshape(-1)
    alike = ("linear", hidden.shape[-1], bias is None, weight.dtype, wanted, chunk_bytes, bool(fp32_logits))
    call = LossCall.of(flat_T, shard, options, prior, dtype, num_items_in_batch, alike, bool(return_stats))
    in_bf16 = runs_in_bf16(call, bias, fp32_logits)
    labelled = LabelledTokens.of(leading, flat_T, options.ignore_index, label_tokens, by_kernel=in_bf16)
    call = replace(call, target=labelled.select(flat_T) if labelled.labels_N is None else labelled.labels_N)
    return _Job(call, labelled, wanted, num_items_in_batch, chunk_bytes, in_bf16 and call.tokens > 0)


@dataclass(frozen=True)
class _Job:
    """A call without the tensors that may need gradients."""

    call: LossCall
    labelled: LabelledTokens
    wanted: Wanted
    num_items_in_batch: int | Tensor | None
    chunk_bytes: int | None
    in_bf16: bool

    def run(self, *tensors: Any) -> Any:
        """Return the loss, and statistics if wanted: by way of autograd only where a gradient is wanted."""
        if not any(self.wanted):
            outcome = self.forward(*tensors)
            return outcome.loss, *outcome.stats
        if self.call.options.reduction == "none":
            return _TokenLosses.apply(*tensors, self)  # type: ignore[no-untyped-call]  # torch has no types for it
        return _ScalarLoss.apply(*tensors, *map(anchor, tensors), self)  # type: ignore[no-untyped-call]  # nor here

    def head(self, hidden_TH: Tensor, weight_SH: Tensor, bias_S: Tensor | None) -> LinearHead:
        hidden_NH = self.labelled.select(hidden_TH)
        if self.labelled.masked:  # whatever they hold, NaN included
            hidden_NH = hidden_NH.masked_fill(~self.call.valid_T.unsqueeze(1), 0.0)
        return LinearHead.of(self.call, hidden_NH, weight_SH, bias_S, self.chunk_bytes)

    def forward(self, *tensors: Any, with_gradients: bool = False) -> "_Outcome":
        """Compute loss and statistics; of a scalar loss, the gradients' sums too if wanted."""
        end_handshake = self.call.start_handshake(labels_checked=self.in_bf16)
        if self.in_bf16:
            return self._forward_in_bf16(end_handshake, tensors, with_gradients)
        head, options = self.head(*tensors), self.call.options
        divisor = accumulator = None
        if options.reduction != "none":
            divisor = self.call.divisor(self.num_items_in_batch, all_labelled=not self.labelled.masked)
            if with_gradients:
                accumulator = self.accumulator(head, (1 / divisor).expand(self.call.tokens))
        result = loop.forward(head, end_handshake, accumulator)
        loss_N = token_loss(result.combined, options.label_smoothing, options.z_loss)
        if self.labelled.masked:
            loss_N = loss_N.masked_fill(~self.call.valid_T, 0.0)
        loss = self.labelled.scatter(loss_N, self.labelled.leading) if divisor is None else loss_N.sum() / divisor
        sums = [] if accumulator is None else accumulator.finish(result.mean_row_H, options.label_smoothing)
        return _Outcome(loss, self._stats(result), result, sums)

    def _forward_in_bf16(
        self, end_handshake: Callable[[], Handshake], tensors: Sequence[Any], with_gradients: bool
    ) -> "_Outcome":
        """Compute loss and statistics; of a scalar loss, the finished gradients too if wanted."""
        from smoothing.kernels import triton_ops
        from smoothing.linear import bf16_loop

        call, labelled, items = self.call, self.labelled, self.num_items_in_batch
        if items is None and call.options.reduction == "mean":
            items = call.valid_T.sum() if labelled.masked else call.tokens
        scalar = call.options.reduction != "none"
        result, losses, gradients = bf16_loop.forward(
            self.bf16_head(tensors), end_handshake, items, with_gradients and scalar
        )
        expected = None if labelled.masked else call.tokens
        loss, _ = triton_ops.sum_up(losses, call, items, expected, labelled.found)
        if not scalar:
            loss = labelled.scatter(losses.loss_T, labelled.leading)
        return _Outcome(loss, self._stats(result), result, gradients)

    def _stats(self, result: loop.Result) -> tuple[Tensor | None, ...]:
        if not self.call.with_stats:
            return ()
        compact = self.call.token_stats(result.combined, result.combined.maximum.shape)
        return tuple(None if x is None else self.labelled.scatter(x, self.labelled.leading) for x in compact)

    def bf16_head(self, tensors: Sequence[Any]) -> Any:
        from smoothing.linear.bf16_loop import Bf16Head

        hidden_TH, weight_SH, _ = tensors
        return Bf16Head.of(self.call, self.labelled, hidden_TH, weight_SH, self.wanted, self.chunk_bytes)

    def backward(self, result: loop.Result, upstream: Tensor, *tensors: Any) -> list[Tensor | None]:
        """Compute the gradients' sums of one loss a token, with the logits computed anew; in bf16, the gradients."""
        weight_N = self.labelled.select(upstream.reshape(-1).to(self.call.statistics_dtype))
        if self.in_bf16:
            from smoothing.linear import bf16_loop

            return bf16_loop.backward(self.bf16_head(tensors), result, weight_N)
        head = self.head(*tensors)
        accumulator = self.accumulator(head, weight_N)
        loop.backward(head, result, accumulator)
        return accumulator.finish(result.mean_row_H, self.call.options.label_smoothing)

    def accumulator(self, head: LinearHead, weight_N: Tensor) -> GradientAccumulator:
        """Return an accumulator for losses scaled by `weight_N`; tokens without a label weigh nothing."""
        weight_N = weight_N.where(self.call.valid_T, 0.0) if self.labelled.masked else weight_N
        return loop.new_accumulator(head, self.wanted, weight_N)


@dataclass
class _Outcome:
    loss: Tensor
    stats: tuple[Tensor | None, ...]
    result: loop.Result
    sums: list[Tensor | None]  # of the gradients; finished in bf16


class _ScalarLoss(torch.autograd.Function):
    """Gradients along with the loss. Keeps them alone: no logits, no hidden states."""

    @staticmethod
    def forward(ctx: Any, *inputs_anchors_job: Any) -> tuple[Tensor | None, ...]:
        *tensors, job = inputs_anchors_job
        inputs, anchors = tensors[:3], tensors[3:]
        outcome = job.forward(*inputs, with_gradients=True)
        ctx.save_for_backward(*anchors)
        ctx.gradients = []
        for index, given in enumerate(inputs):
            total, outcome.sums[index] = outcome.sums[index], None  # one sum at a time beside its rounded copy
            if total is not None and given is not None and not job.in_bf16:
                # fp16 must wait for the upstream gradient: that is where loss scaling comes in
                early = total.dtype if given.dtype == torch.float16 else given.dtype
                total = job.labelled.scatter(total, given.shape, early) if index == 0 else total.to(early)
            ctx.gradients.append(total)
        ctx.dtypes = [None if given is None else given.dtype for given in inputs]
        ctx.scale = backend_for(inputs[0].device, job.call).scale
        ctx.mark_non_differentiable(*(x for x in outcome.stats if x is not None))
        return outcome.loss, *outcome.stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "vocab_parallel_linear_cross_entropy was differentiated a second time: with reduction='mean' or "
                "'sum' its gradients are made with the loss and handed over once. Call it again, or use "
                "reduction='none'."
            )
        ctx.scale([gradient for gradient in gradients if gradient is not None], upstream)
        cast = (None if grad is None else grad.to(dt) for grad, dt in zip(gradients, ctx.dtypes, strict=True))
        return *cast, None, None, None, None  # nothing for anchors and job


class _TokenLosses(torch.autograd.Function):
    """One loss a token. Keeps its inputs and a few numbers a token, and computes the logits anew in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_SH: Tensor, bias_S: Tensor | None, job: _Job
    ) -> tuple[Tensor | None, ...]:
        outcome = job.forward(hidden_TH, weight_SH, bias_S)
        ctx.job, ctx.handshake = job, outcome.result.handshake
        inputs = (hidden_TH, weight_SH, bias_S, job.call.target, job.call.prior)
        ctx.save_for_backward(*inputs, outcome.result.mean_row_H, *outcome.result.combined)
        ctx.mark_non_differentiable(*(x for x in outcome.stats if x is not None))
        return outcome.loss, *outcome.stats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        job, saved = ctx.job, ctx.saved_tensors
        inputs, (_target, _prior, mean_row_H, *combined) = saved[:3], saved[3:]  # the call has target and prior
        result = loop.Result(Combined(*combined), mean_row_H, ctx.handshake)
        grad_hidden, grad_weight, grad_bias = job.backward(result, upstream, *inputs)
        if grad_hidden is not None and not job.in_bf16:
            grad_hidden = job.labelled.scatter(grad_hidden, inputs[0].shape, inputs[0].dtype)
        rest = zip((grad_weight, grad_bias), inputs[1:], strict=True)
        return grad_hidden, *(None if grad is None else grad.to(given.dtype) for grad, given in rest), None


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What `F.linear` would compute in; operands that differ outside autocast are promoted."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype
