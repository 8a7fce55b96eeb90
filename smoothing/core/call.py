"""One call of a vocab-parallel loss: its checked arguments, and what follows from them for every kind of head.

Legend: T tokens, S columns of this rank (padding included), K real ones.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from smoothing.core import agreement
from smoothing.core.agreement import OFFSET, Handshake, Header
from smoothing.core.options import LossOptions
from smoothing.core.statistics import Combined, is_first_at_maximum
from smoothing.shard import VocabShard

HEADERS_KEPT = 64
_headers: dict[tuple[Header, torch.device], Tensor] = {}


class TokenStats(NamedTuple):
    """Statistics of each token at no further cost, each of the target's shape, detached; 0 where it is ignored.

    Attributes:
        nll: unsmoothed loss; for probabilities of mass m it is `m·lse - Σ p_v z_v`. Floats have the loss's dtype.
        lse: `log Σ exp z`.
        confidence: the largest probability.
        correct: bool, whether the target is `argmax` of the logits: of several largest ones, which bf16 logits often
            have, the first; None where targets are probabilities.
        valid: bool, whether the token has a label.
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
    batch_checksum: Tensor | None = None  # see `agreement`; None for one rank
    alike: tuple[object, ...] = ()  # whatever else the ranks must have alike
    with_stats: bool = False  # whether `token_stats` is asked for: only then is looked for logits equal to a label's

    @classmethod
    def of(
        cls,
        target: Tensor,
        shard: VocabShard,
        options: LossOptions,
        prior: Tensor | None,
        input_dtype: torch.dtype,
        num_items_in_batch: int | Tensor | None = None,
        alike: tuple[object, ...] = (),
        with_stats: bool = False,
    ) -> "LossCall":
        """Return a call of checked arguments.

        Args:
            target: labels of all tokens, `[T]` or `[T, S]`, which the ranks compare.
            shard: whose columns this rank holds.
            options: the scalar arguments.
            prior: this rank's slice, padding included, or None.
            input_dtype: what logits are computed in.
            num_items_in_batch: the divisor, which the ranks compare.
            alike: whatever else they must have alike.
            with_stats: whether `token_stats` is asked for.
        """
        statistics_dtype = torch.float64 if input_dtype == torch.float64 else torch.float32
        return cls(
            target=target,
            shard=shard,
            options=options,
            prior=None if prior is None else prior[: shard.real_size].to(statistics_dtype),
            statistics_dtype=statistics_dtype,
            input_dtype=input_dtype,
            batch_checksum=(agreement.batch_checksum(target, num_items_in_batch) if shard.world_size > 1 else None),
            alike=alike,
            with_stats=with_stats,
        )

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

    def start_handshake(self, labels_checked: bool = False) -> Callable[[], Handshake]:
        """Begin to find out whether all ranks can compute this loss; calling what is returned ends the handshake.

        Collectives: those of `agreement.start_handshake`; none with one rank.
        """
        if self.shard.world_size > 1:
            return agreement.start_handshake(self.header(), self.shard)
        self.check_alone(labels_checked)
        return lambda: Handshake(None, self.shard.size)

    def check_alone(self, labels_checked: bool = False) -> None:
        """Check on one rank what several find out together: `ValueError`, or on a device an assertion there.

        `labels_checked`: labels on a device are looked at elsewhere.
        """
        mass, on_cpu = self._prior_mass(), self.target.device.type == "cpu"
        if self.shard.group is not None or mass is not None:  # else the shard itself has refused wrong bounds
            header = self._constant_header()
            agreement.raise_disagreement(
                [replace(header, prior_mass=mass.item()) if on_cpu and mass is not None else header], 0
            )
        if on_cpu:
            return
        fine = [] if self.soft or labels_checked else [~self.targets_outside().any()]
        fine += [] if mass is None else [(mass - 1).abs() <= agreement.PRIOR_MASS_TOLERANCE]
        for condition in fine:
            torch._assert_async(condition)

    def header(self) -> Tensor:
        """This rank's header (see `agreement`), on the target's device."""
        header_H = _on_device(self._constant_header(), self.target.device).clone()
        header_H[OFFSET["tokens"]].fill_(self.tokens)
        if (mass := self._prior_mass()) is not None:
            header_H[OFFSET["prior_mass"]] = mass.view(torch.int64)
        if self.batch_checksum is not None:
            header_H[OFFSET["batch_checksum"]] = self.batch_checksum
        if not self.soft and header_H.device.type != "cpu":
            header_H[OFFSET["refused"]] = self.targets_outside().any()
        return header_H

    def _constant_header(self) -> Header:
        """This rank's header, as far as it is the same from step to step."""
        return Header(
            refused=False,
            start=self.shard.start,
            stop=self.shard.stop,
            vocab_size=self.shard.vocab_size,
            tokens=0,
            digest=self.options.digest(self.input_dtype, self.soft, self.prior is not None, *self.alike),
            batch_checksum=0,
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

    def gather(self, own_FT: Tensor, labels_checked: bool = False) -> tuple[Tensor, Tensor | None]:
        """All ranks' statistics `[R, F, T]` and headers `[R, HEADER_FIELDS]`; None for those of one rank.

        `labels_checked`: one rank's labels on a device are looked at elsewhere.

        Collectives: one all-gather; none with one rank.
        """
        if self.shard.world_size == 1:
            self.check_alone(labels_checked)
            return own_FT.unsqueeze(0), None
        header_H = self.header()
        agreement.shake_hands_once(header_H, self.shard)
        stats_RFT, headers_RH = agreement.exchange(own_FT, header_H, self.shard)
        agreement.check(headers_RH, self.shard.rank)
        return stats_RFT, headers_RH

    def token_stats(self, combined: Combined, shape: torch.Size) -> TokenStats:
        """Per-token statistics in the target's shape."""
        valid_T = self.valid_T
        nll_T = combined.label_mass * combined.log_sum_exp - combined.label
        lse_T = combined.maximum + combined.log_sum_exp
        confidence_T = (-combined.log_sum_exp).exp()
        correct_T = None if self.soft else (valid_T & is_first_at_maximum(combined.label)).view(shape)
        nll, lse, confidence = (x.masked_fill(~valid_T, 0.0).view(shape) for x in (nll_T, lse_T, confidence_T))
        return TokenStats(nll, lse, confidence, correct_T, valid_T.view(shape))

    def divisor(self, num_items_in_batch: int | Tensor | None, all_labelled: bool = False) -> Tensor:
        """What a scalar reduction divides the sum of losses by, `[]`, at least 1: so that without labels it is 0."""
        dtype, device = self.statistics_dtype, self.target.device
        items = 1 if self.options.reduction == "sum" else num_items_in_batch
        if items is None:
            items = self.tokens if self.soft or all_labelled else self.valid_T.sum()
        if isinstance(items, Tensor):
            return items.reshape(()).to(device, dtype).clamp(min=1)
        return torch.full((), max(items, 1), dtype=dtype, device=device)


def _on_device(header: Header, device: torch.device) -> Tensor:
    """A header copied to a device once, since each such copy makes the host wait."""
    if (header, device) not in _headers:
        if len(_headers) >= HEADERS_KEPT:
            _headers.clear()
        _headers[header, device] = header.encode().to(device)
    return _headers[header, device]
