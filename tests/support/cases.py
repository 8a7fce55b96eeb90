"""Torture inputs: full fp64 logits, target, options, and who holds which columns. No loss in here is ours.

T tokens, V real vocabulary, W >= V columns in all (those past V are padding). `CASES[name](n)` builds the
case for n ranks; `dense_losses` is what every loss is held to, `F.cross_entropy` on the full logits.
"""

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

IGNORED = -100

# The worked example: 2.1185 unsmoothed, 1.9713 the uniform part alone, 2.1038 at a smoothing of 0.1.
EXAMPLE_LOGITS = torch.tensor(
    [
        [1.2215, -0.9342, -0.1349, -0.5035, 0.4492],
        [-0.1989, 0.2589, 2.1556, -0.5734, 0.8668],
        [0.1215, 0.5060, 0.5376, -1.7609, -0.6566],
    ],
    dtype=torch.float64,
)
EXAMPLE_TARGET = torch.tensor([2, 3, 2])


@dataclass(eq=False)
class Case:
    logits: torch.Tensor  # [T, W] fp64
    target: torch.Tensor  # [T] int64, or [T, W] fp64 rows of a distribution
    vocab_size: int
    bounds: list[tuple[int, int]]  # one (start, stop) a rank; together [0, W)
    options: dict = field(default_factory=dict)  # keywords of the loss; smoothing_prior is over all W columns

    @property
    def soft(self) -> bool:
        return self.target.is_floating_point()

    @property
    def valid(self) -> torch.Tensor:
        if self.soft:
            return torch.ones(len(self.target), dtype=torch.bool)
        return self.target != self.options.get("ignore_index", IGNORED)

    def share(self, rank: int, dtype: torch.dtype):
        """This rank's (logits, target, options); distributions are exact in every dtype, see `_dyadic`."""
        columns = slice(*self.bounds[rank])
        target = self.target[:, columns].to(dtype) if self.soft else self.target
        options = dict(self.options)
        if "smoothing_prior" in options:
            precise = dtype if dtype == torch.float64 else torch.float32
            options["smoothing_prior"] = options["smoothing_prior"][columns].to(precise)
        return self.logits[:, columns].to(dtype).contiguous(), target, options


def dense_losses(
    logits,
    target,
    vocab_size,
    *,
    label_smoothing=0.0,
    ignore_index=IGNORED,
    smoothing_prior=None,
    z_loss=0.0,
    logit_softcap=None,
):
    """Losses [T] by `F.cross_entropy` on full logits, in their dtype: fp64 is the truth, others the rival."""
    soft = target.is_floating_point()
    valid = torch.ones(len(target), dtype=torch.bool) if soft else target != ignore_index
    z = logits[valid, :vocab_size]
    q = target[valid, :vocab_size].to(z.dtype) if soft else target[valid]
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    if smoothing_prior is not None:
        q = q if soft else F.one_hot(q, vocab_size).to(z.dtype)
        q = (1 - label_smoothing) * q + label_smoothing * smoothing_prior[:vocab_size].to(z.dtype)
        label_smoothing = 0.0
    losses = F.cross_entropy(z, q, label_smoothing=label_smoothing, reduction="none")
    if z_loss:
        losses = losses + z_loss * z.logsumexp(-1) ** 2
    return losses.new_zeros(len(target)).index_put((valid,), losses)


# Who holds which columns.


def near_even(width, vocab, ranks):
    cuts = [width * rank // ranks for rank in range(ranks + 1)]
    return list(itertools.pairwise(cuts))


def lopsided(width, vocab, ranks):
    """Every rank but the last holds one column."""
    cuts = [*range(ranks), width]
    return list(itertools.pairwise(cuts))


def padding_last(width, vocab, ranks):
    """The last rank (of several) holds padding only."""
    if ranks == 1:
        return [(0, width)]
    return [*near_even(vocab, vocab, ranks - 1), (vocab, width)]


# What is done to random logits and targets. Each edits its draft in place.


def targets_in_shard(rank, draft):
    start, stop = draft.bounds[rank]
    draft.target[draft.valid] = start + draft.target[draft.valid] % (stop - start)


def all_ignored(draft):
    draft.target[:] = IGNORED


def one_valid(draft):
    draft.target[1:] = IGNORED


def none_ignored(draft):
    draft.target[~draft.valid] = 0


def poisoned_ignored_rows(draft):
    draft.target[1:4] = IGNORED
    draft.logits[1] = torch.nan
    draft.logits[2] = torch.inf
    draft.logits[3, ::2] = -torch.inf


def poisoned_padding(draft):
    draft.logits[:, draft.vocab_size :] = torch.nan
    draft.logits[::2, draft.vocab_size :] = torch.inf


def offset(by, draft):
    draft.logits += by


def spread(over, draft):
    draft.logits *= over / (draft.logits.max() - draft.logits.min())


def confident(by, draft):
    """The label stands `by` above the other logits, or below them."""
    rows = draft.valid.nonzero().squeeze(-1)
    draft.logits[rows, draft.target[rows]] += by


def minus_inf_columns(draft):
    draft.logits[:, 1::2] = -torch.inf
    draft.target[draft.valid] -= draft.target[draft.valid] % 2


def minus_inf_shard(draft):
    """All logits of the first shard are -inf (of half the columns, where there is one shard only)."""
    start = draft.bounds[0][1] if len(draft.bounds) > 1 else draft.vocab_size // 2
    draft.logits[:, :start] = -torch.inf
    draft.target[draft.valid] = start + draft.target[draft.valid] % (draft.vocab_size - start)


def unequal_masses(draft):
    """Rows of a soft target that sum to 1, 0.5, 2, 0, and so on again."""
    draft.target *= torch.tensor([1.0, 0.5, 2.0, 0.0], dtype=torch.float64).repeat(2)[:, None]


def ties(draft):
    draft.logits[:] = draft.logits.round().clamp(-1, 1)


def _dyadic(generator, rows, vocab, width):
    """Distributions [rows, width] in steps of 1/128, a few of them zero: exact in bf16, sum exactly 1."""
    draws = torch.randint(vocab, (rows, 128), generator=generator)
    return torch.zeros(rows, width, dtype=torch.float64).scatter_add_(
        1, draws, torch.full((rows, 128), 1 / 128, dtype=torch.float64)
    )


def build(
    ranks,
    *,
    seed=0,
    edit=None,
    tokens=8,
    vocab=23,
    pad=0,
    split=near_even,
    prior=False,
    soft=False,
    **options,
):
    generator = torch.Generator().manual_seed(seed)
    width = vocab + pad
    bounds = split(width, vocab, ranks) if callable(split) else split
    logits = 3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    logits[:, vocab:] += 50  # padding that is not excluded outweighs everything
    if soft:
        target = _dyadic(generator, tokens, vocab, width)
    else:
        target = torch.randint(vocab, (tokens,), generator=generator)
        target[5:6] = options.get("ignore_index", IGNORED)
    if prior:
        options["smoothing_prior"] = _dyadic(generator, 1, vocab, width)[0]
    case = Case(logits, target, vocab, bounds, options)
    if edit:
        edit(case)
    return case


# id: what is special about it, beside eight random rows, one of them ignored, 23 columns split near-evenly
_TABLE = {
    "smoothing-0": {},
    "smoothing-0.1": {"label_smoothing": 0.1},
    "smoothing-1": {"label_smoothing": 1.0},
    "lopsided": {"split": lopsided, "label_smoothing": 0.1},
    "padded": {"pad": 5, "label_smoothing": 0.1},
    "padding-nan": {"pad": 5, "edit": poisoned_padding, "label_smoothing": 0.1},
    "padding-shard": {"pad": 4, "split": padding_last, "label_smoothing": 0.1},
    "padding-shard-nan": {"pad": 4, "split": padding_last, "edit": poisoned_padding, "z_loss": 1e-3},
    "prior": {"prior": True, "label_smoothing": 0.1},
    "prior-1": {"prior": True, "label_smoothing": 1.0},
    "prior-padding-shard": {"prior": True, "pad": 4, "split": padding_last, "label_smoothing": 0.3},
    "soft": {"soft": True},
    "soft-smoothing": {"soft": True, "label_smoothing": 0.1},
    "soft-unequal-masses": {"soft": True, "edit": unequal_masses, "z_loss": 1e-2, "label_smoothing": 0.1},
    "soft-prior-padded": {"soft": True, "prior": True, "pad": 3, "label_smoothing": 0.2},
    "z-loss": {"z_loss": 1e-2, "label_smoothing": 0.1},
    "softcap": {"logit_softcap": 5.0, "label_smoothing": 0.1},
    "softcap-z-loss-prior-padded": {
        "logit_softcap": 4.0,
        "z_loss": 1e-2,
        "prior": True,
        "pad": 3,
        "label_smoothing": 0.1,
    },
    "softcap-saturated": {"edit": partial(spread, 300), "logit_softcap": 30.0, "label_smoothing": 0.1},
    "soft-softcap-z-loss": {"soft": True, "logit_softcap": 4.0, "z_loss": 1e-2, "label_smoothing": 0.1},
    "targets-first-shard": {"edit": partial(targets_in_shard, 0), "label_smoothing": 0.1},
    "targets-last-shard": {"edit": partial(targets_in_shard, -1), "label_smoothing": 0.1},
    "none-ignored": {"edit": none_ignored, "label_smoothing": 0.1},
    "all-ignored": {"edit": all_ignored, "label_smoothing": 0.1, "z_loss": 1e-2},
    "one-valid": {"edit": one_valid, "label_smoothing": 0.1},
    "ignored-nan-inf": {"edit": poisoned_ignored_rows, "label_smoothing": 0.1, "z_loss": 1e-2},
    "ignored-nan-inf-softcap": {"edit": poisoned_ignored_rows, "label_smoothing": 0.1, "logit_softcap": 5.0},
    "ignore-index-in-vocabulary": {"ignore_index": 3, "label_smoothing": 0.1},
    "offset+1e4": {"edit": partial(offset, 1e4), "label_smoothing": 0.1},
    "offset-1e4": {"edit": partial(offset, -1e4), "label_smoothing": 0.1},
    "offset+1e4-prior": {"edit": partial(offset, 1e4), "prior": True, "label_smoothing": 0.1},
    "offset-1e4-soft": {"edit": partial(offset, -1e4), "soft": True, "label_smoothing": 0.1},
    "offset-1e4-padded": {"edit": partial(offset, -1e4), "pad": 5, "label_smoothing": 0.1},
    "spread-60": {"edit": partial(spread, 60), "label_smoothing": 0.1},
    "spread-300": {"edit": partial(spread, 300), "label_smoothing": 0.1},
    "confident-right": {"edit": partial(confident, 120)},
    "confident-right-smoothed": {"edit": partial(confident, 120), "label_smoothing": 0.1},
    "confident-wrong": {"edit": partial(confident, -120)},
    "confident-wrong-smoothed": {"edit": partial(confident, -120), "label_smoothing": 0.1},
    "minus-inf-columns": {"edit": minus_inf_columns},
    "minus-inf-shard": {"edit": minus_inf_shard, "z_loss": 1e-3},
    "ties": {"edit": ties, "label_smoothing": 0.1},
    "one-token": {"tokens": 1, "label_smoothing": 0.1},
    "no-token": {"tokens": 0, "label_smoothing": 0.1},
    "one-word": {"vocab": 1, "pad": 7, "label_smoothing": 0.1},
}

CASES: dict[str, Callable[[int], Case]] = {
    name: partial(build, seed=zlib.crc32(name.encode()), **entry) for name, entry in _TABLE.items()
}


def in_rotation(names: Iterable, choices: Iterable, in_all: Sequence = (), shift: int = 0) -> list[tuple]:
    """Return pairs of each name with one of the choices in turn; names `in_all` with every choice.

    After each round the turn moves on by one more, so that names which come in rounds of as many meet every choice.
    """
    choices, pairs = list(choices), []
    for index, name in enumerate(names):
        turn = index + index // len(choices) + shift
        pairs += [(name, choice) for choice in (choices if name in in_all else [choices[turn % len(choices)]])]
    return pairs
