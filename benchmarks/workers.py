"""What the gloo ranks of `heads.py` do: check, time, or measure the memory of contenders, one thread each."""

import contextlib
import io
import os
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from contenders import CONTENDERS, Problem

from launch.common.library_patches import skip_shared_memory_op
from tests.support.ranks import Collectives

CHECK_TOKENS = 32
TOLERANCE = 1e-4


def on_ranks(work, ranks: int, *args):
    """`work(*args)` on fresh gloo ranks; rank 0's answer."""
    context = mp.get_context("spawn")
    answer = context.SimpleQueue()
    port = 20000 + os.getpid() % 20000
    mp.spawn(_rank, (ranks, port, work, args, answer), nprocs=ranks)
    return answer.get()


def _rank(rank: int, ranks: int, port: int, work, args, answer):
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    with contextlib.redirect_stdout(io.StringIO()):
        import deepspeed

        skip_shared_memory_op()
        deepspeed.init_distributed("gloo", verbose=False)
    result = work(*args)
    if rank == 0:
        answer.put(result)
    _leave(store, rank, ranks)


def _leave(store, rank: int, ranks: int) -> None:
    """End this process once every rank has come here, the store's own rank last.

    At once, since threads of some contenders' own groups abort an orderly exit now and then.
    """
    with contextlib.suppress(Exception):  # the store is gone: so is everybody's work
        store.add("leaving", 1)
        while store.add("leaving", 0) < ranks:
            time.sleep(0.02)
    time.sleep(0.5 if rank == 0 else 0)
    os._exit(0)


def check(names: list[str], vocab: int, hidden: int, smoothing: float, ignored: float) -> dict[str, str]:
    """ "ok" or what went wrong: loss and both gradients against fp64 on the full logits, on fewer tokens."""
    problem = Problem.make(CHECK_TOKENS, vocab, hidden, smoothing, ignored)
    shard = problem.shard
    sizes = [stop - start for start, stop in shard.bounds(vocab, shard.world_size)]
    parts = [torch.empty(size, hidden) for size in sizes]
    for source, part in enumerate(parts):
        part.copy_(problem.weight.detach()) if source == shard.rank else None
        dist.broadcast(part, source)
    exact = torch.cat(parts).double().requires_grad_(), problem.hidden.detach().double().requires_grad_()
    truth = {}
    for epsilon in {0.0, smoothing}:
        exact[0].grad = exact[1].grad = None
        loss = F.cross_entropy(exact[1] @ exact[0].T, problem.target, label_smoothing=epsilon)
        loss.backward()
        truth[epsilon] = loss.detach(), exact[1].grad, exact[0].grad[shard.start : shard.stop]
    verdicts = {}
    for name in names:
        contender = CONTENDERS[name]
        if not contender.backward:
            continue
        try:
            loss = contender.run(problem)
        except Exception as error:
            verdicts[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            continue
        loss = loss.full_tensor() if hasattr(loss, "full_tensor") else loss
        got = loss.detach(), problem.hidden.grad, problem.weight.grad
        want = truth[smoothing if contender.smooths else 0.0]
        errors = [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, want, strict=True)]
        verdicts[name] = "ok" if max(errors) < TOLERANCE else f"relative errors {errors}"
    return verdicts


def time_interleaved(
    names: list[str], sizes: dict, shares: list[float], turn: int, turns: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender at each share of ignored labels, "name@share": one round; the slowest rank's.

    Every contender has run once on a small problem before. The order turns round from one turn to the next.
    """
    small = Problem.make(**{**sizes, "tokens": 16, "vocab": 512}, ignored=0.0)
    for name in names:
        CONTENDERS[name].run(small)
    seconds = {f"{name}@{share:g}": [] for share in shares for name in names}
    for share in shares:
        problem = Problem.make(**sizes, ignored=share)
        for order in range(turn, turn + turns):
            for name in reversed(names) if order % 2 else names:
                dist.barrier()
                start = time.perf_counter()
                CONTENDERS[name].run(problem)
                dist.barrier()
                seconds[f"{name}@{share:g}"].append(time.perf_counter() - start)
                problem.clear()
    return seconds


def peak_memory(name: str, sizes: dict, ignored: float) -> float:
    """Bytes of the process's high-water mark over what it held with its inputs; the most of any rank."""
    small = {**sizes, "tokens": 16, "vocab": 512}
    CONTENDERS[name].run(Problem.make(**small, ignored=ignored))
    problem = Problem.make(**sizes, ignored=ignored)
    before = _status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    CONTENDERS[name].run(problem)
    peak = torch.tensor(float(_status("VmHWM") - before))
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return peak.item()


def collectives(name: str, sizes: dict) -> list[tuple[str, int]]:
    """The collectives of forward and backward: "gather" or "reduce", and the bytes that this rank gives."""
    problem = Problem.make(**sizes, ignored=0.0)
    with Collectives() as noted:
        CONTENDERS[name].run(problem)
    return [("gather" if "gather" in kind else "reduce", sent) for kind, sent in noted.seen]


def time_all_reduce(numbers: int, repeats: int = 9) -> float:
    """Median seconds of one all-reduce of so many fp32 numbers with nothing beside it."""
    part, taken = torch.ones(numbers), []
    for _ in range(repeats):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(part)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def summary(seconds: list[float]) -> dict:
    ordered = sorted(seconds)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1], "all": seconds}


def paired_ratio(first: list[float], second: list[float]) -> dict:
    """Of times taken in the same round, so that what else the machine does weighs on both."""
    return summary([a / b for a, b in zip(first, second, strict=True)])
