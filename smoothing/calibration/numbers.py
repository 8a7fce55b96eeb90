"""Numbers of each token that calibration is measured with, from logits or hidden states, sharded or whole.

Legend: T tokens, N of them with a label, n those of a chunk, S columns of this rank, K real ones, H hidden, G
temperatures.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from smoothing.calibration.sums import FIXED, Figures, combine, shard_sums, unsmoothed_sums
from smoothing.core import agreement
from smoothing.core.agreement import Handshake
from smoothing.core.arguments import argument_problem, dtype_problem, head_problem, tensor_problem
from smoothing.core.call import LossCall
from smoothing.core.collectives import all_gather
from smoothing.core.options import DEFAULT_IGNORE_INDEX, LossOptions
from smoothing.core.refusal import refuse_at_handshake
from smoothing.kernels.torch_ops import CHUNK_ELEMENTS, DEVICE_CHUNK_ELEMENTS
from smoothing.linear.chunks import chunk_bytes_problem
from smoothing.linear.head import LinearHead
from smoothing.linear.labelled_tokens import LabelledTokens
from smoothing.shard import VocabShard

FLOOR = 0.01
Chunks = Iterator[tuple[slice, Tensor]]  # tokens, and a working copy of their real logits


class TokenNumbers(NamedTuple):
    """Of each token, each of the target's shape, in fp32 (fp64 for fp64 inputs); 0 where it has no label.

    Attributes:
        nll: `-log p_y`.
        confidence: the largest probability.
        correct: 1 where the label is `argmax` of the logits (of several largest ones the first), else 0.
        entropy: `-Σ p log p`.
        sum_square: `Σ p²`; the Brier score over the vocabulary is `1 - 2·exp(-nll) + Σ p²`.
        nll_at: nll at each temperature, `[..., G]`: of the softmax of `z / T`.
        confidence_at: the largest probability at each temperature, `[..., G]`.
        valid: bool, whether the token has a label.
        unsmoothed: the same numbers of the distribution that `unsmooth` makes; None unless asked for.
    """

    nll: Tensor
    confidence: Tensor
    correct: Tensor
    entropy: Tensor
    sum_square: Tensor
    nll_at: Tensor
    confidence_at: Tensor
    valid: Tensor
    unsmoothed: "TokenNumbers | None" = None


@torch.no_grad()
def token_numbers(
    logits: Tensor,
    target: Tensor,
    shard: VocabShard | None = None,
    *,
    temperatures: Sequence[float] = (),
    unsmooth: float = 0.0,
    smoothing_prior: Tensor | None = None,
    floor: float = FLOOR,
    temperature: float = 1.0,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    logit_softcap: float | None = None,
) -> TokenNumbers:
    """Compute what calibration is measured with from sharded logits, none of which are gathered; no gradient.

    Args:
        logits: `[..., S]` fp32, bf16, fp16 or fp64: this rank's columns, padding included.
        target: labels, `[...]` int64 global ids.
        shard: which columns this rank holds, and whose group holds the rest; None for a whole vocabulary on one rank.
        temperatures: those of `nll_at` and `confidence_at`, each above 0.
        unsmooth: the ε that the model was trained with: also return the numbers without it. 0: do not.
        smoothing_prior: `[S]` floating point, this rank's slice of the prior it was trained with; None: uniform.
        floor: see `unsmooth`.
        temperature: what all logits are divided by first.
        ignore_index: label of tokens that have none.
        logit_softcap: `cap` of `cap·tanh(z / cap)`, applied to the logits first; None: none.

    Returns:
        The numbers, the same on every rank.

    Raises:
        ValueError: on every rank, if any rank's arguments are wrong or the ranks' differ.

    Collectives:
        One all-gather of 72 bytes, and one of 5 + G numbers a token; with `unsmooth` one more of those.
    """
    given = _Given(temperatures, unsmooth, floor, temperature, ignore_index, logit_softcap)
    try:
        call, labelled = given.call(logits, target, shard, smoothing_prior, {"logits": logits})
    except Exception as error:  # whatever it is, the other ranks must learn of it
        refuse_at_handshake(error, shard, logits, target)
    handshake = call.start_handshake()()
    logits_TS = logits.reshape(target.numel(), logits.shape[-1])
    rows_N = torch.arange(len(logits_TS), device=logits.device) if labelled.rows_N is None else labelled.rows_N
    elements = CHUNK_ELEMENTS if logits.device.type == "cpu" else DEVICE_CHUNK_ELEMENTS
    step = max(1, elements // max(1, logits.shape[-1]))

    def chunks() -> Chunks:
        for start in range(0, call.tokens, step):
            tokens = slice(start, min(start + step, call.tokens))
            z_nK = logits_TS[rows_N[tokens]][:, : call.shard.real_size]
            yield tokens, given.shaped(z_nK.to(call.statistics_dtype))

    return given.numbers(call, handshake, labelled, chunks, target)


@torch.no_grad()
def linear_token_numbers(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    shard: VocabShard | None = None,
    *,
    bias: Tensor | None = None,
    temperatures: Sequence[float] = (),
    unsmooth: float = 0.0,
    smoothing_prior: Tensor | None = None,
    floor: float = FLOOR,
    temperature: float = 1.0,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    logit_softcap: float | None = None,
    chunk_bytes: int | None = None,
) -> TokenNumbers:
    """Compute `token_numbers(hidden @ weight.T + bias, ...)` with the logits of a few tokens at a time.

    Args:
        hidden: `[..., H]` fp32, bf16, fp16 or fp64, alike on all ranks.
        weight: `[S, H]` floating point: this rank's rows, padding included.
        target: labels, `[...]` int64 global ids.
        shard: which columns this rank holds, and whose group holds the rest; None for a whole vocabulary on one rank.
        bias: `[S]` floating point: this rank's rows; None: none.
        temperatures: those of `nll_at` and `confidence_at`, each above 0.
        unsmooth: the ε that the model was trained with; the logits are then computed twice. 0: do not.
        smoothing_prior: `[S]` floating point, this rank's slice of the prior it was trained with; None: uniform.
        floor: see `unsmooth`.
        temperature: what all logits are divided by first.
        ignore_index: label of tokens that have none; they do not go through the head.
        logit_softcap: `cap` of `cap·tanh(z / cap)`, applied to the logits first; None: none.
        chunk_bytes: what the logits of a chunk may take; None: see `vocab_parallel_linear_cross_entropy`.

    Returns:
        The numbers, the same on every rank.

    Raises:
        ValueError: on every rank, if any rank's arguments are wrong or the ranks' differ.

    Collectives:
        As `token_numbers`.
    """
    given = _Given(temperatures, unsmooth, floor, temperature, ignore_index, logit_softcap)
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    try:
        call, labelled = given.call(hidden, target, shard, smoothing_prior, tensors, chunk_bytes)
    except Exception as error:  # whatever it is, the other ranks must learn of it
        refuse_at_handshake(error, shard, hidden, target)
    handshake = call.start_handshake()()
    hidden_NH = labelled.select(hidden.reshape(target.numel(), hidden.shape[-1]))
    with torch.autocast(hidden.device.type, enabled=False):
        head = LinearHead.of(call, hidden_NH, weight, bias, chunk_bytes)
        slices, buffers = head.chunks(handshake.widest, 1)

        def chunks() -> Chunks:
            for tokens in slices:
                yield tokens, given.shaped(head.logits(tokens, buffers[0]))

        return given.numbers(call, handshake, labelled, chunks, target)


class _Given(NamedTuple):
    """The arguments that both functions share."""

    temperatures: Sequence[float]
    unsmooth: float
    floor: float
    temperature: float
    ignore_index: int
    logit_softcap: float | None

    def problem(self) -> str | None:
        for temperature in (self.temperature, *self.temperatures):
            if not _above_0(temperature):
                return f"a temperature must be a finite number above 0, got {temperature!r}"
        if not _above_0(self.floor) or self.floor > 1:
            return f"floor must lie in (0, 1], got {self.floor!r}"
        if self.unsmooth == 1:
            return "a model that was trained with label_smoothing 1 knows nothing that could be unsmoothed"
        return None

    def call(
        self, given: Any, target: Any, shard: Any, prior: Any, tensors: dict[str, Any], chunk_bytes: int | None = None
    ) -> tuple[LossCall, LabelledTokens]:
        """The call, its arguments looked at. Raises `ValueError` for one that is wrong."""
        options = LossOptions(self.unsmooth, self.ignore_index, "none", 0.0, self.logit_softcap)
        if problem := tensor_problem(**tensors) or dtype_problem(**tensors) or self.problem():
            raise ValueError(problem)
        weight, bias = tensors.get("weight"), tensors.get("bias")
        if weight is not None and (problem := head_problem(given, weight, bias) or chunk_bytes_problem(chunk_bytes)):
            raise ValueError(problem)
        width = given.shape[-1] if weight is None else len(weight)
        shard = VocabShard.whole(width) if shard is None else shard
        if problem := argument_problem(given, target, shard, options, prior, None, width):
            raise ValueError(problem)
        if target.is_floating_point():
            raise ValueError("target must be int64 token ids; calibration is not measured against probabilities")
        dtype = given.dtype if weight is None else torch.promote_types(given.dtype, weight.dtype)
        flat_T = target.reshape(-1)
        labelled = LabelledTokens.of(given.shape[:-1], flat_T, self.ignore_index, None)
        own = (*map(float, self.temperatures), self.floor, self.temperature, chunk_bytes, bias is None)
        call = LossCall.of(flat_T, shard, options, prior, dtype, alike=("numbers", *own))
        return replace(call, target=labelled.select(flat_T)), labelled

    def shaped(self, z_nK: Tensor) -> Tensor:
        """These logits with softcap and temperature."""
        if self.logit_softcap is not None:
            z_nK = (z_nK / self.logit_softcap).tanh_().mul_(self.logit_softcap)
        return z_nK if self.temperature == 1 else z_nK / self.temperature

    def numbers(
        self,
        call: LossCall,
        handshake: Handshake,
        labelled: LabelledTokens,
        chunks: Callable[[], Chunks],
        target: Tensor,
    ) -> TokenNumbers:
        """Exchange the sums of all chunks, and those of the unsmoothed distribution once lse is known."""
        at = tuple(map(float, self.temperatures))
        owner_N = _owner(call.target, handshake)
        sums = [shard_sums(z_nK, call.target[tokens], call, at) for tokens, z_nK in chunks()]
        figures, base = combine(_exchange(sums, call, len(at)), owner_N, at)
        unsmoothed = None
        if self.unsmooth > 0:
            sums = [
                unsmoothed_sums(z_nK, base.of(tokens), call.target[tokens], call, self.floor, at)
                for tokens, z_nK in chunks()
            ]
            without, _ = combine(_exchange(sums, call, len(at)), owner_N, at)
            unsmoothed = self._scattered(without, labelled, target, None)
        return self._scattered(figures, labelled, target, unsmoothed)

    def _scattered(
        self, figures: Figures, labelled: LabelledTokens, target: Tensor, unsmoothed: TokenNumbers | None
    ) -> TokenNumbers:
        """The numbers in the target's shape."""
        valid = target != self.ignore_index

        def spread(x_N: Tensor) -> Tensor:
            shape = torch.Size([*target.shape, *x_N.shape[1:]])
            if labelled.masked:  # all tokens went through
                x_N = x_N.masked_fill(~valid.reshape(-1, *[1] * (x_N.dim() - 1)), 0.0)
            return labelled.scatter(x_N, shape)

        nll, confidence, correct, entropy, sum_square, nll_at, confidence_at = map(spread, figures)
        return TokenNumbers(nll, confidence, correct, entropy, sum_square, nll_at, confidence_at, valid, unsmoothed)


def _owner(target_N: Tensor, handshake: Handshake) -> Tensor:
    """The rank that holds each label."""
    if handshake.headers_RH is None:
        return torch.zeros_like(target_N)
    last = handshake.headers_RH[0, agreement.OFFSET["vocab_size"]] - 1
    starts_R = agreement.starts(handshake.headers_RH)
    return torch.bucketize(torch.minimum(target_N.clamp(min=0), last), starts_R, right=True) - 1


def _exchange(sums: list[Tensor], call: LossCall, temperatures: int) -> Tensor:
    """All ranks' sums, `[R, FIXED + G, N]`. Collectives: one all-gather, none with one rank."""
    fields = FIXED + temperatures
    empty = torch.empty(fields, 0, dtype=call.statistics_dtype, device=call.target.device)
    own_FN = torch.cat([empty, *sums], dim=1)
    return all_gather(own_FN, call.shard).view(call.shard.world_size, fields, call.tokens)


def _above_0(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < float("inf")
