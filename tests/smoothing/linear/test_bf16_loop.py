"""The fused head's loop in bf16, on a CPU: its kernels in Triton's interpreter, products of bf16 factors in fp32.

What a device computes, but for the order of its sums. `tests/smoothing/test_device.py` runs the real one where there
is a GPU; `tests/smoothing/test_gpu_path.py` counts what it asks of one.
"""

import contextlib
import importlib.util
import itertools
from unittest import mock

import pytest
import torch

from smoothing import vocab_parallel_linear_cross_entropy
from smoothing.core import arguments
from smoothing.kernels import dispatch
from smoothing.linear import chunks, labelled_tokens, matmul
from tests.smoothing.linear.test_device_products import DeviceTorch
from tests.smoothing.linear.test_fused_equiv import (
    NAMES,
    THROUGH_BIAS,
    assert_equals_plain,
    fused,
    nobody_error,
    upstream_for,
)
from tests.support.cases import CASES, build, in_rotation
from tests.support.kernel_memory import watched
from tests.support.ranks import Ranks

# not imported here: Triton reads TRITON_INTERPRET when it is imported, and the ranks import this file
if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

SERVED = [name for name in NAMES if not CASES[name](1).soft and "logit_softcap" not in CASES[name](1).options]
SERVED = [name for name in SERVED if name not in THROUGH_BIAS]


@contextlib.contextmanager
def on_a_device():
    """Products and kernels of a device; yields the launches."""
    with watched() as launches:
        from smoothing.kernels import triton_ops
        from smoothing.linear import bf16_loop

        plain, start = triton_ops.gradient, bf16_loop.start_all_reduce

        def late_all_reduce(part, shard):
            """Not done before it is waited for."""
            done = []
            return lambda: done or done.append(start(part, shard)())

        def gradient(*args, **kwargs):
            *rest, out = args
            # the interpreter cuts bf16 off where a device rounds to nearest
            return out.copy_(plain(*rest, torch.empty_like(out, dtype=torch.float32), **kwargs))

        with (
            mock.patch.object(matmul, "gemm_dtype", lambda compute, statistics, device: compute),
            mock.patch.object(matmul, "torch", DeviceTorch()),
            mock.patch.object(triton_ops, "gradient", gradient),
            mock.patch.object(bf16_loop, "start_all_reduce", late_all_reduce),
        ):
            yield launches


def fused_there(*args, least_piece: int = chunks.LEAST_PIECE, **kwargs):
    with on_a_device() as launches, mock.patch.object(chunks, "LEAST_PIECE", least_piece):
        result = fused(*args, **kwargs)
    assert any(launch.kernel == "gather_kernel" for launch in launches) or not kwargs["case"].valid.any()
    return result


@pytest.fixture(scope="module", params=[1, 2], ids="{}rank".format)
def few(request):
    with Ranks(request.param) as ranks:  # processes of their own, in which nothing has imported Triton
        yield ranks


@pytest.fixture(scope="module")
def alone():
    with Ranks(1) as ranks:
        yield lambda *args, **kwargs: ranks.run(*args, **kwargs)[0]


WAYS = list(itertools.product(["sum", "none"], [None, 150]))  # 150 bytes of logits: several groups


@pytest.mark.parametrize(("name", "way"), in_rotation(SERVED, WAYS, ("one-word",)))
def test_no_further_from_fp64_than_twice_the_plain_method(few, name, way):
    how, chunk_bytes = way
    case = CASES[name](few.size)
    upstream = upstream_for(case) if how == "none" else None
    options = {"dtype": torch.bfloat16, "reduction": how, "upstream": upstream, "chunk_bytes": chunk_bytes}
    results = few.run(fused_there, case=case, **options)
    reduce = torch.sum if how == "sum" else None
    assert_equals_plain(case, results, torch.bfloat16, reduce=reduce, rounded_logits=True)


def kept_there(*args, **kwargs):
    """As while a CUDA graph is captured: tokens without a label go through the head."""
    with mock.patch.object(labelled_tokens, "keeps_every_row", lambda device: True):
        return fused_there(*args, **kwargs)


ASKED = {
    "kept": {},
    "kept, none": {"reduction": "none"},
    "items": {"num_items_in_batch": 29},
    "items, tensor": {"num_items_in_batch": torch.tensor(29)},
    "kept, mean": {"reduction": "mean"},
    "told": {"label_tokens": 95},
}


@pytest.mark.parametrize("asked", ASKED)
def test_divisors_and_tokens_without_a_label(few, asked):
    """Of more tokens than a program has, in groups of two pieces."""
    case = build(few.size, tokens=100, vocab=19, pad=3, label_smoothing=0.1, z_loss=1e-3)
    case.target[[7, 40, 41, 99]] = -100
    case.logits[7] = torch.nan
    options = {"reduction": "mean", "chunk_bytes": 2 * 22 * 60, "least_piece": 8} | ASKED[asked]
    upstream = upstream_for(case) if options["reduction"] == "none" else None
    run = kept_there if asked.startswith("kept") else fused_there
    results = few.run(run, case=case, dtype=torch.bfloat16, upstream=upstream, **options)
    by = 29 if "items" in asked else 95
    reduce = None if upstream is not None else lambda losses: losses.sum() / by
    assert_equals_plain(case, results, torch.bfloat16, reduce=reduce, rounded_logits=True)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_changes_nothing_else(few, frozen):
    case = CASES["padded"](few.size)
    whole, part = (
        few.run(fused_there, case=case, dtype=torch.bfloat16, frozen=names, reduction="sum")
        for names in ((), (frozen,))
    )
    for all_of_it, got in zip(whole, part, strict=True):
        for name in ("loss", "hidden", "weight"):
            assert got[name] is None if name == frozen else torch.equal(got[name], all_of_it[name])


def smoothing_there(**kwargs) -> float:
    with on_a_device():
        return nobody_error("fused", torch.bfloat16, **kwargs)


def test_the_smoothing_part_of_an_fp32_weight(alone):
    """ε·u is rounded to bf16 with the gradient's tile, and nothing else is: at most half a unit in its last place."""
    assert alone(smoothing_there, scale=0.5, tokens=16) <= 2**-8
    assert nobody_error("plain", torch.bfloat16, 0.5, tokens=16) >= 2e-2


def of_one_token_more(count: int, label: int) -> None:
    """A step that is told a number of labels, and given so many: three, and one that may be no label."""
    with on_a_device():
        hidden, weight = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(11, 8).bfloat16()
        target = torch.tensor([1, -100, 10, 0])
        with mock.patch.object(arguments, "_target_problem", lambda *_: None):  # on a device none are looked at
            target[3] = label
            vocab_parallel_linear_cross_entropy(hidden, weight, target, label_smoothing=0.1, label_tokens=count)


@pytest.mark.parametrize(("count", "label", "fine"), [(3, 10, 1), (2, 10, 0), (4, 10, 0), (3, 11, 0), (3, -1, 0)])
def test_labels_and_their_number_are_asserted(alone, count, label, fine):
    with contextlib.nullcontext() if fine else pytest.raises(AssertionError, match="_assert_async"):
        alone(of_one_token_more, count, label)


def logged() -> str:
    with on_a_device(), mock.patch.object(dispatch, "_logged", set()), mock.patch.object(dispatch.log, "log") as log:
        hidden, weight, target = torch.randn(4, 8).bfloat16(), torch.randn(11, 8).bfloat16(), torch.arange(4)
        for more in ({"fp32_logits": True}, {"bias": torch.zeros(11).bfloat16()}, {"logit_softcap": 5.0}):
            vocab_parallel_linear_cross_entropy(hidden, weight, target, **more)
        before = str(log.mock_calls)
        for _ in range(2):
            vocab_parallel_linear_cross_entropy(hidden, weight, target)
        return before, str(log.mock_calls)


def test_which_loop_runs_is_logged_once(alone):
    before, after = alone(logged)
    assert before.count("fused head on") == 0 and after.count("fused head on cpu: logits in bf16") == 1


SIZES = {
    "as much as the sum": ((8192, 128256, 4096), [8192]),
    "more than it": ((8200, 128256, 4096), [2736, 2736, 2728]),
    "of an fp32 weight": ((8192, 128256, 4096, False), [4096, 4096]),
    "small": ((8192, 16032, 512), [8192]),
    "told": ((1000, 1000, 64, True, False, 2 * 1000 * 300), [256, 256, 256, 232]),
}


@pytest.mark.parametrize("name", SIZES)
def test_groups(name):
    given, lengths = SIZES[name]
    tokens, widest, hidden, rounded, several, chunk_bytes = given + (True, False, None)[len(given) - 3 :]
    for ranks in (several, True):
        groups = chunks.bf16_groups(tokens, widest, hidden, rounded, ranks, chunk_bytes)
        flat = [piece for group in groups for piece in group]
        assert [group[-1].stop - group[0].start for group in groups] == lengths
        assert flat[0].start == 0 and flat[-1].stop == tokens
        assert all(first.stop == second.start for first, second in itertools.pairwise(flat))
        assert all(
            len(group) == (2 if ranks and length >= 1024 else 1)
            for group, length in zip(groups, lengths, strict=True)
        )
