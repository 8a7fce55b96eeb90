"""Which label is correct where several logits are the largest: the first, as in `argmax`, in every head alike.

Logits of a few whole numbers, nearly all of whose rows have several largest ones; hidden states that are these
logits, and a head that is the identity, so that products keep them exact.
"""

import contextlib
import importlib.util

import pytest
import torch
import torch.distributed as dist

from smoothing import (
    VocabShard,
    linear_token_numbers,
    token_numbers,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from smoothing.model.dense_loss import dense_cross_entropy
from tests.support.ranks import Ranks

TOKENS, VOCAB, PADDING = 48, 43, 6
CUTS = {1: [], 2: [17], 3: [5, 19]}
TRITON = importlib.util.find_spec("triton") is not None


def tied_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `[T, V]` of 0 to 3, and labels, most of which are among the largest; the last rows have none."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (TOKENS, VOCAB), generator=draw).to(torch.float64)
    logits[::7] = 2.0
    top = (logits == logits.amax(1, keepdim=True)).to(torch.float64)
    target = torch.multinomial(top + 0.02, 1, generator=draw).squeeze(1)
    target[-9:] = -100
    return logits, target


def guesses() -> torch.Tensor:
    logits, target = tied_rows()
    return (logits.argmax(1) == target) & (target != -100)


def sharded(logits, eye, target, shard):
    return vocab_parallel_cross_entropy(logits @ eye.T, target, shard, label_smoothing=0.1, return_stats=True)


def fused(logits, eye, target, shard):
    logits.requires_grad_()
    options = {"label_smoothing": 0.1, "return_stats": True, "chunk_bytes": 4096}
    return vocab_parallel_linear_cross_entropy(logits, eye, target, shard, **options)


def fused_with_softcap(logits, eye, target, shard):
    """Its gradient is not factored: the statistics are those of the backend."""
    options = {"logit_softcap": 1e6, "return_stats": True}
    return vocab_parallel_linear_cross_entropy(logits, eye, target, shard, **options)


def numbers(logits, eye, target, shard):
    return None, token_numbers(logits @ eye.T, target, shard)


def linear_numbers(logits, eye, target, shard):
    return None, linear_token_numbers(logits, eye, target, shard)


HEADS = {head.__name__: head for head in (sharded, fused, fused_with_softcap, numbers, linear_numbers)}


def correct_of(head: str, dtype: torch.dtype, where: str) -> torch.Tensor:
    """Which tokens are correct; on several ranks the shards are unequal, and the last one ends in padding."""
    from tests.smoothing.kernels.test_kernels import interpreter
    from tests.smoothing.linear.test_bf16_loop import on_a_device

    logits, target = tied_rows()
    rank, size = dist.get_rank(), dist.get_world_size()
    edges = [0, *CUTS[size], VOCAB + PADDING]
    start, stop = edges[rank : rank + 2]
    eye = torch.eye(VOCAB + PADDING, VOCAB, dtype=dtype)[start:stop]
    shard = VocabShard(start, stop, VOCAB, dist.group.WORLD)
    place = {"cpu": contextlib.nullcontext, "kernels": interpreter, "bf16 loop": on_a_device}[where]
    with place():
        _, stats = HEADS[head](logits.to(dtype), eye, target, shard)
    return stats.correct.bool()


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{}rank".format)
def few(request):
    with Ranks(request.param) as ranks:  # processes of their own, in which nothing has imported Triton
        yield ranks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", HEADS)
def test_the_first_of_several_largest_logits(few, head, dtype):
    for correct in few.run(correct_of, head, dtype, "cpu"):
        assert torch.equal(correct, guesses())


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("where", ["kernels", "bf16 loop"])
@pytest.mark.parametrize("head", ["sharded", "fused", "fused_with_softcap"])
def test_the_first_in_the_kernels(few, head, where):
    for correct in few.run(correct_of, head, torch.bfloat16, where, time_limit=120):
        assert torch.equal(correct, guesses())


def correct_of_wide_rows(wide: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """By the kernels, from rows of several blocks; two ranks hold a half each."""
    from tests.smoothing.kernels.test_kernels import interpreter

    rank, size, vocab = dist.get_rank(), dist.get_world_size(), wide.shape[1]
    start, stop = rank * vocab // size, (rank + 1) * vocab // size
    with interpreter():
        own, shard = wide[:, start:stop].contiguous(), VocabShard(start, stop, vocab, dist.group.WORLD)
        return vocab_parallel_cross_entropy(own, target, shard, return_stats=True)[1].correct


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("vocab", [8192, 20_001])
def test_the_first_in_rows_of_several_blocks(few, vocab):
    draw = torch.Generator().manual_seed(1)
    wide = torch.randn(20, vocab, generator=draw).clamp_(max=4).to(torch.bfloat16)
    largest = torch.stack([torch.randperm(vocab, generator=draw)[:2] for _ in wide]).sort(1).values
    largest[::5, 1] = largest[::5, 0] + 1  # in one block
    wide.scatter_(1, largest.clamp_(max=vocab - 1), 9.0)
    target = largest.gather(1, torch.arange(20).unsqueeze(1) % 2).squeeze(1)
    for correct in few.run(correct_of_wide_rows, wide, target, time_limit=120):
        assert torch.equal(correct, wide.float().argmax(1) == target)
    assert 6 <= (wide.float().argmax(1) == target).sum() <= 14


def test_the_first_in_whole_logits():
    logits, target = tied_rows()
    _, stats = dense_cross_entropy(logits, target, label_smoothing=0.0, ignore_index=-100)
    assert torch.equal(stats.correct, guesses())
    top = logits.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1) == logits.amax(1)
    assert guesses().sum() < 0.5 * (top & (target != -100)).sum()  # the rule decides in most rows
