"""Loss and head on one GPU, side by side: time against the floor, memory, host synchronisations, CUDA graphs.

    python benchmarks/gpu.py                    # `make bench-gpu`
    python benchmarks/gpu.py --device cpu       # a dry run on small sizes, which writes nothing

Every contender is checked against fp64, then all take turns in one process: with the host ahead of the device, so
that only the device's time counts, and cold, where the device waits for the host. What fails the check is timed all
the same, and marked. What is not installed is left out, and named as such. Rounds end when the time is up. Writes
`benchmarks/results/gpu.json` and `gpu.md`.
"""

import argparse
import importlib.util
import json
import math
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch
import torch.nn.functional as F
from gpu_contenders import HEADS, LOSSES, SMOOTHING, Contender, Given, Loss, Sizes
from torch import Tensor

PACKAGES = ("torch", "triton", "liger-kernel", "fla-core", "cut-cross-entropy", "quack-kernels", "deepspeed")
PACKAGES += ("transformers",)
AHEAD_CYCLES = 20_000_000  # that the device sleeps before a call that is timed with the host ahead: some 10 ms
LEAST_ROUNDS = 3


# Checked, then measured.


def check(contender: Contender, loss: Loss, sizes: Sizes, device: str) -> str:
    """ "ok" or what is wrong: loss and gradients at most twice as far from fp64 as `F.cross_entropy` in bf16.

    So is the gradient's sum over the vocabulary, which is zero, where there is smoothing: that it is lost or has the
    wrong sign shows there alone, by ε or 2ε. A loss may be rounded to the dtype that it comes in. The head here makes
    two chunks of the few tokens.
    """
    tokens = min(sizes.tokens, 300)
    given = Given.make(replace(sizes, tokens=tokens), device, seed=1)
    given.chunk_bytes = 4 * sizes.vocab * math.ceil(tokens / 2)
    epsilon = SMOOTHING if contender.smooths else 0.0

    def plain(dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (given.hidden, given.weight) if x is not None]
        z = F.linear(*leaves) if len(leaves) == 2 else leaves[0]
        value = F.cross_entropy(z if dtype == torch.float64 else z.float(), given.target, label_smoothing=epsilon)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves)]

    truth, rival = plain(torch.float64), plain(torch.bfloat16)  # first: a loss may take the logits' memory
    try:
        value = loss(given)
        value.backward()
    except Exception as error:
        return one_line(error)
    got = [value.detach(), *(x.grad for x in (given.hidden, given.weight) if x is not None)]
    for name, mine, theirs, exact in zip(("loss", "first gradient", "second"), got, rival, truth, strict=False):
        error, allowed = relative_error(mine, exact), relative_error(theirs, exact)
        rounding = torch.finfo(mine.dtype).eps if name == "loss" else 1e-5
        if not error <= 2 * allowed + rounding:
            return f"{name} is {error:.1e} off, F.cross_entropy in bf16 {allowed:.1e}"
    over_vocabulary = 1 if given.hidden is None else 0
    error, allowed = (
        float((grads[-1].sum(over_vocabulary, dtype=torch.float64) - truth[-1].sum(over_vocabulary)).norm())
        / float(truth[-1].norm())
        for grads in (got, rival)
    )
    if contender.smooths and not error <= 2 * allowed + SMOOTHING / 10:
        return f"a gradient's sum over the vocabulary is {error:.1e} off, F.cross_entropy in bf16 {allowed:.1e}"
    return "ok"


def ours(name: str) -> bool:
    return "here" in name


def one_line(error: Exception) -> str:
    """What an exception says, shortened to one line."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """In the 2-norm; a few rows at a time, since a gradient in fp64 is large."""
    blocks = zip(torch.atleast_2d(got).split(4096), torch.atleast_2d(exact).split(4096), strict=True)
    return float(sum((mine.double() - true).square().sum() for mine, true in blocks).sqrt() / exact.norm())


class Clock:
    """Milliseconds of work on a device."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def time(self, work: Callable[[], object], ahead: bool = False) -> float:
        """Of one call; `ahead`: the device first sleeps while the host prepares the call."""
        if not self.cuda:
            start = time.perf_counter()
            work()
            return 1e3 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(AHEAD_CYCLES)
        before.record()
        work()
        after.record()
        torch.cuda.synchronize()
        return before.elapsed_time(after)


def step(loss: Loss, given: Given) -> None:
    given.clear()
    value = loss(given)
    if value is not None:
        value.backward()


def peak_bytes(loss: Loss, given: Given) -> int:
    """Over the inputs, gradients included."""
    given.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(loss, given)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def synchronisations(loss: Loss, given: Given) -> int:
    """Host synchronisations in one forward and backward, as CUDA reports them."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step(loss, given)
        return sum("synchroniz" in str(w.message).lower() for w in seen)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(loss: Loss, given: Given) -> str:
    """Whether forward and backward can be captured in a CUDA graph that gives the same loss."""
    inputs = given.weight.detach().clone()  # a loss may take their memory

    def whole() -> Tensor:
        given.clear()
        value = loss(given)
        value.backward()
        return value.detach()

    def restored() -> None:
        given.weight.detach().copy_(inputs)

    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                restored()
                want = whole()
            restored()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            value = whole()
        restored()
        graph.replay()
        torch.cuda.synchronize()
        return "yes" if torch.equal(value, want) else f"another loss: {value.item()} for {want.item()}"
    except Exception as error:
        return f"no: {error}".splitlines()[0][:120]


def measure(contenders: list[Contender], sizes: Sizes, device: str, rounds: int, until: float) -> dict:
    """Every contender at one point: verdict, then interleaved times, peak memory, synchronisations, graphs.

    No round begins after `until` but the first few.
    """
    losses, verdicts = {}, {}
    for contender in contenders:
        if contender.needs and importlib.util.find_spec(contender.needs) is None:
            verdicts[contender.name] = "not installed"
            continue
        try:
            loss = contender.make()
        except Exception as error:
            verdicts[contender.name] = one_line(error)
            continue
        verdicts[contender.name] = check(contender, loss, sizes, device) if contender.checked else "ok"
        losses[contender.name] = loss
    for name, verdict in verdicts.items():
        print(f"{sizes}: {name}: {verdict}", flush=True)
    clock, memory, more = Clock(device), {}, {}
    milliseconds = {name: {"ahead": [], "cold": []} for name in losses}
    for index in range(rounds + 1):  # the first one warms up
        if index > LEAST_ROUNDS and time.monotonic() > until:
            break
        names = list(losses)
        for name in names if index % 2 else reversed(names):
            given = None  # the last one's memory is free
            try:
                given = Given.make(sizes, device)
                if index == 0 and device == "cuda":
                    step(losses[name], given)
                    memory[name] = peak_bytes(losses[name], given)
                taken = {
                    how: clock.time(lambda n=name, g=given: step(losses[n], g), ahead=how == "ahead")
                    for how in milliseconds[name]
                }
            except Exception as error:  # the contender is out, the others continue
                if verdicts[name] == "ok":
                    verdicts[name] = one_line(error)
                losses.pop(name), milliseconds.pop(name)
                continue
            if index:
                for how, values in milliseconds[name].items():
                    values.append(taken[how])
    given = None
    if device == "cuda":
        for name in filter(ours, losses):
            given = Given.make(sizes, device)
            more[name] = {"synchronisations": synchronisations(losses[name], given)}
            more[name]["captured"] = captured(losses[name], given)
    return {
        "sizes": asdict(sizes),
        "verdicts": verdicts,
        "milliseconds": {
            name: {how: _summary(times) for how, times in ms.items()} for name, ms in milliseconds.items()
        },
        "peak_bytes": memory,
        "more": more,
    }


def bandwidth(clock: Clock, device: str, count: int) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.ones(count, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / (1e-3 * statistics.median(clock.time(lambda: target.copy_(source)) for _ in range(9)))


def _summary(values: list[float]) -> dict:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "least": ordered[0], "most": ordered[-1]}


# Written.


def table(result: dict) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    lines = [
        "# One GPU, bf16, forward and backward",
        "",
        f"`{result['command']}`",
        "",
        f"{result['device']}; {versions}; {result['date']}. A copy moves {result['bandwidth'] / 1e12:.2f} TB/s. "
        f"Smoothing {SMOOTHING:g} where the contender has it; each checked against fp64 first.",
    ]
    for point in result["points"]:
        sizes = Sizes(**point["sizes"])
        from_logits = not sizes.hidden
        title = f"T={sizes.tokens}, V={sizes.vocab}" + ("" if from_logits else f", H={sizes.hidden}")
        lines += ["", f"## {'From logits' if from_logits else 'From hidden states'}: {title}", ""]
        floor = "of the floor (3 passes)" if from_logits else "of the products' rate alone"
        lines += [
            f"| contender | ms, host ahead: median (least to most) | {floor} | ms, cold | peak MiB over inputs | |",
            "|---|---|---|---|---|---|",
        ]
        best = 3 * 2 * sizes.tokens * sizes.vocab / result["bandwidth"] * 1e3
        if not from_logits:
            products = point["milliseconds"].get("the three products alone")
            best = products["ahead"]["median"] if products else math.nan
        for name, ms in point["milliseconds"].items():
            memory = point["peak_bytes"].get(name)
            notes = [f"{key} {value}" for key, value in point["more"].get(name, {}).items()]
            if (verdict := point["verdicts"][name]) != "ok":
                notes.insert(0, f"**fails the check**: {verdict}")
            spread, cold = (
                f"{t['median']:.2f} ({t['least']:.2f} to {t['most']:.2f})" for t in (ms["ahead"], ms["cold"])
            )
            shown = "" if memory is None else f"{memory / 2**20:.0f}"
            share = best / ms["ahead"]["median"]
            lines.append(f"| {name} | {spread} | {share:.0%} | {cold} | {shown} | {'; '.join(notes)} |")
        lines += [
            f"\nNot timed, {name}: {verdict}"
            for name, verdict in point["verdicts"].items()
            if name not in point["milliseconds"]
        ]
    return "\n".join(lines) + "\n"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--seconds", type=float, default=210, help="after which no further round begins")
    parser.add_argument("--name", default="gpu", help="of the files in results/")
    return parser.parse_args()


def main() -> int:
    args, began = arguments(), time.monotonic()
    dry = args.device == "cpu"
    if not dry and not torch.cuda.is_available():
        print("error: no GPU is at hand, and nothing else can give its figures; `--device cpu` is a dry run")
        return 2
    tokens = 64 if dry else args.tokens
    losses = (1000, 500) if dry else (128256, 16032)
    heads = ((1000, 32),) if dry else ((128256, 4096), (16032, 4096), (131072, 4096), (128256, 8192), (262144, 4096))
    points = [(LOSSES, Sizes(tokens, vocab)) for vocab in losses]
    points += [(HEADS, Sizes(tokens, vocab, hidden)) for vocab, hidden in heads]
    result = {
        "command": "python benchmarks/gpu.py " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "device": "a dry run on the CPU" if dry else torch.cuda.get_device_name(),
        "versions": versions(),
        "bandwidth": bandwidth(Clock(args.device), args.device, 1 << (16 if dry else 30)),
        "points": [],
    }
    for index, (contenders, sizes) in enumerate(points):
        left = args.seconds - (time.monotonic() - began)
        until = time.monotonic() + left / (len(points) - index)
        result["points"].append(measure(contenders, sizes, args.device, 2 if dry else args.rounds, until))
        if not dry:
            (HERE / "results" / f"{args.name}.json").write_text(json.dumps(result, indent=1) + "\n")
            (HERE / "results" / f"{args.name}.md").write_text(table(result))
    print(table(result))
    wrong = {name for point in result["points"] for name, verdict in point["verdicts"].items() if verdict != "ok"}
    if failed := sorted(filter(ours, wrong)):
        print(f"error: of the losses here these failed, see above: {'; '.join(failed)}")
        return 1
    return 0


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
