"""One call of a vocab-parallel loss: its arguments looked at once, for every kind of head.

Legend: T tokens, S columns of this rank (padding included), K real ones.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Real
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from smoothing.core import agreement
from smoothing.core.agreement import Header, Meeting
from smoothing.core.options import LossOptions
from smoothing.core.statistics import Combined, ShardStatistics
from smoothing.shard import VocabShard

HEADERS_KEPT = 64
_headers: dict[tuple[Header, torch.device], Tensor] = {}
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TokenStats(NamedTuple):
    """What is known of each token at no further cost, each of the target's shape, detached; 0 where ignored.

    `nll`: unsmoothed loss. `lse`: log Σ exp z. `confidence`: the largest probability. `correct`: the target
    attains the largest logit (None where targets are distributions). `valid`: the token has a label.
    """

    nll: Tensor
    lse: Tensor
    confidence: Tensor
    correct: Tensor | None
    valid: Tensor


@dataclass(frozen=True)
class LossCall:
    """The arguments that every head shares, checked, with tokens flattened to one dimension."""

    target: Tensor  # [T] int64 or [T, S] floating point
    shard: VocabShard
    options: LossOptions
    prior: Tensor | None  # [K], in the statistics' dtype
    statistics_dtype: torch.dtype
    input_dtype: torch.dtype
    batch: Tensor | None = None  # `agreement.batch_checksum`; None for one rank, or a call that is to be refused
    alike: tuple = ()  # whatever else the ranks must have alike

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def tokens(self) -> int:
        return self.target.shape[0]

    @property
    def valid_T(self) -> Tensor:
        """Tokens that have a label."""
        if self.soft:
            return torch.ones(self.tokens, dtype=torch.bool, device=self.target.device)
        return self.target != self.options.ignore_index

    def local_target(self, target_n: Tensor) -> tuple[Tensor, Tensor]:
        """Of these labels: which this rank owns, and their columns here (0 where it does not)."""
        column = target_n - self.shard.start
        owned = (column >= 0) & (column < self.shard.real_size) & (target_n != self.options.ignore_index)
        return owned, torch.where(owned, column, 0)

    def softmax_scale(self, combined: Combined) -> Tensor:
        """What `exp(z - maximum)` is multiplied by to give ∂loss/∂lse · softmax, for these tokens."""
        epsilon, z_loss = self.options.label_smoothing, self.options.z_loss
        lse_gradient_T = (1 - epsilon) * combined.label_mass + epsilon
        if z_loss > 0:
            lse_gradient_T = lse_gradient_T + 2 * z_loss * (combined.maximum + combined.log_sum_exp)
        return lse_gradient_T * (-combined.log_sum_exp).exp()

    def meet(self) -> Callable[[], Meeting]:
        """Begin to find out whether all ranks can compute this loss; calling what is returned ends that.

        Collectives: those of `agreement.start_meeting`; none with one rank.
        """
        if self.shard.world_size > 1:
            return agreement.start_meeting(self.header(), self.shard)
        self.check_alone()
        return lambda: Meeting(None, self.shard.size)

    def check_alone(self) -> None:
        """What ranks find out together, where there is one: `ValueError`, or on a device an assertion there."""
        header, mass = self._said(), self._prior_mass()
        if self.target.device.type == "cpu":
            agreement.raise_disagreement([header if mass is None else replace(header, prior_mass=mass.item())], 0)
            return
        agreement.raise_disagreement([header], 0)
        fine = [] if self.soft else [~self.targets_outside().any()]
        fine += [] if mass is None else [(mass - 1).abs() <= agreement.PRIOR_MASS_TOLERANCE]
        for condition in fine:
            torch._assert_async(condition)

    def header(self, refused: bool = False) -> Tensor:
        """This rank's header (see `agreement`), on the target's device."""
        if refused:
            return Header.refusal().encode().to(self.target.device)
        header_H = _on_device(self._said(), self.target.device).clone()
        header_H[agreement.TOKENS].fill_(self.tokens)
        if (mass := self._prior_mass()) is not None:
            header_H[agreement.PRIOR_MASS] = mass.view(torch.int64)
        if self.batch is not None:
            header_H[agreement.BATCH] = self.batch
        if not self.soft and header_H.device.type != "cpu":
            header_H[agreement.REFUSED] = self.targets_outside().any()
        return header_H

    def _said(self) -> Header:
        """Of this rank's header, what is the same from step to step."""
        return Header(
            refused=False,
            start=self.shard.start,
            stop=self.shard.stop,
            vocab_size=self.shard.vocab_size,
            tokens=0,
            digest=self.options.digest(self.input_dtype, self.soft, self.prior is not None, *self.alike),
            batch=0,
            label_smoothing=self.options.label_smoothing,
            prior_mass=self.shard.real_size / self.shard.vocab_size,
        )

    def _prior_mass(self) -> Tensor | None:
        """Of this shard, `[]` fp64; NaN if a number is negative. None where the prior is uniform."""
        if self.prior is None:
            return None
        return self.prior.sum(dtype=torch.float64).masked_fill((self.prior < 0).any(), torch.nan)

    def targets_outside(self) -> Tensor:
        """`[T]`: labels that no vocabulary entry answers to."""
        return self.valid_T & (self.target.clamp(0, self.shard.vocab_size - 1) != self.target)

    def gather(self, own: ShardStatistics) -> tuple[Tensor, Tensor | None]:
        """All ranks' statistics `[R, F, T]` and headers `[R, 9]`; None for those of one rank.

        Collectives: one all-gather; none with one rank.
        """
        if self.shard.world_size == 1:
            self.check_alone()
            return own.stack().unsqueeze(0), None
        header_H = self.header()
        agreement.meet_once(header_H, self.shard)
        stats_RFT, headers_RH = agreement.exchange(own.stack(), header_H, self.shard)
        agreement.check(headers_RH, self.shard.rank)
        return stats_RFT, headers_RH

    def refuse_at_meeting(self, fault: Exception) -> NoReturn:
        """Raise `fault` as a `ValueError` here; the other ranks learn of it in `agreement.start_meeting`."""
        if self.shard.world_size > 1:
            with suppress(ValueError):  # the meeting tells this rank what it already knows
                agreement.start_meeting(self.header(refused=True), self.shard)()
        raise _as_value_error(fault)

    def refuse_at_exchange(self, fault: Exception) -> NoReturn:
        """Raise `fault` as a `ValueError` here; the other ranks learn of it in `gather`."""
        if self.shard.world_size > 1:
            header_H = self.header(refused=True)
            with suppress(ValueError):
                agreement.meet_once(header_H, self.shard)
                nothing = ShardStatistics.nothing(
                    self.tokens, self.soft, dtype=self.statistics_dtype, device=header_H.device
                )
                agreement.exchange(nothing.stack(), header_H, self.shard)
        raise _as_value_error(fault)

    def token_stats(self, combined: Combined, shape: torch.Size) -> TokenStats:
        """Per-token statistics in the target's shape."""
        valid_T = self.valid_T
        nll_T = combined.label_mass * combined.log_sum_exp - combined.label
        lse_T = combined.maximum + combined.log_sum_exp
        confidence_T = (-combined.log_sum_exp).exp()
        correct_T = None if self.soft else (valid_T & (combined.label == 0)).view(shape)
        zeroed = [x.masked_fill(~valid_T, 0.0).view(shape) for x in (nll_T, lse_T, confidence_T)]
        return TokenStats(*zeroed, correct=correct_T, valid=valid_T.view(shape))

    def divisor(self, num_items_in_batch: int | Tensor | None, all_labelled: bool = False) -> Tensor:
        """What a scalar reduction divides the sum of losses by, `[]`, at least 1: so that without labels it is 0."""
        options = {"dtype": self.statistics_dtype, "device": self.target.device}
        items = 1 if self.options.reduction == "sum" else num_items_in_batch
        if items is None:
            items = self.tokens if self.soft or all_labelled else self.valid_T.sum()
        if isinstance(items, Tensor):
            return items.reshape(()).to(**options).clamp(min=1)
        return torch.full((), max(items, 1), **options)


def _on_device(header: Header, device: torch.device) -> Tensor:
    """A header copied to a device once, since each such copy makes the host wait."""
    if (header, device) not in _headers:
        if len(_headers) >= HEADERS_KEPT:
            _headers.clear()
        _headers[header, device] = header.encode().to(device)
    return _headers[header, device]


def refused_call(given, target, shard: VocabShard | None) -> LossCall:
    """A stand-in for a call whose own arguments cannot be trusted, so that its rank can still refuse.

    Of as many tokens as there seem to be, so that what the other ranks wait for comes.
    """
    tokens, device = 0, torch.device("cpu")
    if isinstance(given, Tensor) and given.dim():
        tokens, device = given.shape[:-1].numel(), given.device
    elif isinstance(target, Tensor):
        tokens = target.shape[0] if target.is_floating_point() and target.dim() else target.numel()
        device = target.device
    target_T = torch.zeros(tokens, dtype=torch.int64, device="cpu" if device.type == "meta" else device)
    shard = shard if isinstance(shard, VocabShard) else VocabShard.whole(1)
    return LossCall(target_T, shard, LossOptions(), None, torch.float32, torch.float32)


def _as_value_error(fault: Exception) -> ValueError:
    return fault if isinstance(fault, ValueError) else ValueError(f"{type(fault).__name__}: {fault}")


def tensor_fault(**given) -> str | None:
    """Which of these is no dense tensor with a last dimension on the first one's device, or None."""
    first, *_ = given
    for name, value in given.items():
        if not isinstance(value, Tensor):
            return f"{name} must be a tensor, got {type(value).__name__}"
        if value.dim() == 0:
            return f"{name} must have at least one dimension, got none"
        if fault := _place_fault(name, value, given[first].device):
            return fault
    return None


def _place_fault(name: str, given: Tensor, device: torch.device) -> str | None:
    if given.layout != torch.strided:
        return f"{name} must be a dense tensor, got {given.layout}"
    if given.device.type == "meta":
        return f"{name} must hold data, got a tensor on the device meta"
    if given.device != device:
        return f"{name} must lie on the input's device, {device}, got {given.device}"
    return None


def dtype_fault(**tensors: Tensor | None) -> str | None:
    """Which of these has a dtype that no loss can be computed in, or None."""
    for name, given in tensors.items():
        if given is not None and given.dtype not in FLOAT_DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
            return f"{name} must have a floating-point dtype ({known}), got {given.dtype}"
    return None


def argument_fault(given: Tensor, target, shard, options, prior, num_items_in_batch, width: int) -> str | None:
    """What is wrong with a call's arguments, whatever its head, or None. `given`: logits or hidden states."""
    if not isinstance(shard, VocabShard):
        return f"shard must be a VocabShard or None, got {type(shard).__name__}"
    if fault := options.fault() or shard.fault():
        return fault
    leading = given.shape[:-1]
    if width != shard.size:
        return (
            f"this rank's shard is [{shard.start}, {shard.stop}), so {shard.size} vocabulary columns were expected, "
            f"got {width}"
        )
    if not isinstance(target, Tensor):
        return f"target must be a tensor, got {type(target).__name__}"
    if fault := _place_fault("target", target, given.device):
        return fault
    if target.is_floating_point():
        if target.shape != (*leading, width):
            return f"probabilities must have the logits' shape {(*leading, width)}, got {tuple(target.shape)}"
    elif target.dtype != torch.int64:
        return f"target must be int64 token ids (or floating-point probabilities), got {target.dtype}"
    elif target.shape != leading:
        return f"target must have shape {tuple(leading)}, one id for each token, got {tuple(target.shape)}"
    elif target.device.type == "cpu" and (fault := _target_fault(target, shard, options)):
        return fault
    if prior is not None and (not isinstance(prior, Tensor) or prior.shape != (width,)):
        got = tuple(prior.shape) if isinstance(prior, Tensor) else type(prior).__name__
        return f"smoothing_prior must be this rank's slice of a distribution, of shape {(width,)}, got {got}"
    if prior is not None and (fault := _place_fault("smoothing_prior", prior, given.device)):
        return fault
    for name, given in (("target", target), ("smoothing_prior", prior)):
        if given is not None and given.requires_grad and torch.is_grad_enabled():
            return f"{name} gets no gradient from this loss; pass {name}.detach()"
    if num_items_in_batch is not None:
        if options.reduction != "mean":
            return f"num_items_in_batch replaces the divisor of reduction='mean', got reduction={options.reduction!r}"
        return _items_fault(num_items_in_batch)
    return None


def _items_fault(items) -> str | None:
    """What is wrong with `num_items_in_batch`, or None; on a device it is not looked at."""
    if isinstance(items, Tensor):
        if items.numel() != 1:
            return f"num_items_in_batch must be one number, got shape {tuple(items.shape)}"
        if items.device.type != "cpu":
            return None
        items = items.item()
    if isinstance(items, bool) or not isinstance(items, Real) or not 0 <= items < 2**63:
        return f"num_items_in_batch must be a number of tokens, got {items!r}"
    return None


def _target_fault(target: Tensor, shard: VocabShard, options: LossOptions) -> str | None:
    outside = (target != options.ignore_index) & ((target < 0) | (target >= shard.vocab_size))
    if not bool(outside.any()):
        return None
    worst = target[outside][0].item()
    return (
        f"target must lie in [0, {shard.vocab_size}) or be ignore_index ({options.ignore_index}), "
        f"got {worst} ({int(outside.sum())} such)"
    )
