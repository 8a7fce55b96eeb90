"""The fused head's cost model (`cost.py`): held against 1, 2 and 4 ranks here, or tabulated for machines not at hand.

    python benchmarks/scaling.py            measures; writes results/scaling.json and scaling.md
    python benchmarks/scaling.py --plan     prints the tables of docs/scaling.md

The two constants of the time model (products, the passes between them) are measured at one rank, what a byte on the
wire costs by an all-reduce alone at each number of ranks; the times at 2 and 4 ranks are then predictions.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from dataclasses import replace

from heads import HERE, hardware  # sets the import path for those below

# isort: split
from cost import DEVICE_TILE_BYTES, Machine, Sizes
from workers import collectives, on_ranks, peak_memory, summary, time_all_reduce, time_interleaved

RANKS = (1, 2, 4)
NAMES = ["fused", "products"]
# On paper: what a rank of an eight-device node might sustain, bf16. Assumed, not measured.
ASSUMED = {"operations": 400e12, "memory": 2.5e12, "wire": 300e9, "wire_across_nodes": 40e9, "latency": 20e-6}
PLAN_TOKENS = 8192


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=64000)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def measured(args, ranks: int) -> dict:
    """What one number of ranks took: seconds of each round, peak memory, and the collectives of one call."""
    sizes = {"tokens": args.tokens, "vocab": args.vocab, "hidden": args.hidden, "smoothing": 0.1}
    taken = on_ranks(time_interleaved, ranks, NAMES, sizes, [0.0], 0, args.rounds)
    numbers = args.tokens * args.hidden
    return {
        "seconds": {name: summary(taken[f"{name}@0"]) for name in NAMES},
        "peak_bytes": on_ranks(peak_memory, ranks, "fused", sizes, 0.0),
        "collectives": on_ranks(collectives, ranks, "fused", sizes) if ranks > 1 else [],
        "all_reduce_seconds": on_ranks(time_all_reduce, ranks, numbers) if ranks > 1 else 0.0,
    }


def compared(args, seen: dict[int, dict]) -> list[dict]:
    """One row for each number of ranks: model against measurement."""
    one = Sizes(args.tokens, args.vocab, args.hidden)
    products, fused = (min(seen[1]["seconds"][name]["all"]) for name in reversed(NAMES))
    rows = []
    for ranks, found in seen.items():
        sizes = replace(one, ranks=ranks)
        turns = max(1, ranks / os.cpu_count())  # ranks that take turns on one core
        wire = sizes.wire_bytes / found["all_reduce_seconds"] if ranks > 1 else 1.0
        machine = Machine(
            one.operations / products / turns, one.tile_elements / (fused - products) / turns, wire, 0.0
        )
        rows.append(
            {
                "ranks": ranks,
                "gathered_bytes": (sizes.gathered_bytes, given(found, "gather")),
                "reduced_bytes": (sizes.reduced_bytes, given(found, "reduce")),
                "messages": (sizes.messages, len(found["collectives"])),
                "peak_bytes": (sizes.peak_bytes, found["peak_bytes"]),
                "seconds": (machine.seconds(sizes), statistics.median(found["seconds"]["fused"]["all"])),
            }
        )
    return rows


def given(found: dict, kind: str) -> int:
    """Bytes that a rank gave to collectives of this kind."""
    return sum(sent for operation, sent in found["collectives"] if operation == kind)


def comparison_table(result: dict) -> str:
    machine, sizes = result["hardware"], "N={tokens}, V={vocab}, H={hidden}".format(**result["settings"])
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    lines = [
        f"# Cost model against measurement: fp32, {sizes}",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, one thread a rank; {versions}; {result['date']}.",
        "Model / measured. Bytes are what one rank gives to the collectives of one call.",
        "",
        "| ranks | to all-gathers, B | to all-reduces, B | collectives | peak over inputs, MB | time, s |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        counts = [" / ".join(f"{n:,}" for n in row[key]) for key in ("gathered_bytes", "reduced_bytes", "messages")]
        peak, seconds = (row[key] for key in ("peak_bytes", "seconds"))
        counts += [f"{peak[0] / 1e6:.0f} / {peak[1] / 1e6:.0f}", f"{seconds[0]:.2f} / {seconds[1]:.2f}"]
        lines.append(f"| {row['ranks']} | " + " | ".join(counts) + " |")
    return "\n".join(lines) + "\n"


def plan() -> str:
    """What cannot be measured here, on paper: a bf16 head on a device that sustains `ASSUMED`."""
    lines = []
    for hidden, vocab in ((4096, 32_000), (4096, 128_256), (8192, 262_144), (8192, 1_048_576)):
        lines += [
            f"\nH={hidden}, V={vocab:,}\n",
            "| ranks | GFLOP a token | peak over inputs, MiB | of the logits' fp32 size | wire, kB a token "
            "| gathering logits, kB a token | collectives | µs a token | of it products |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for ranks in (1, 2, 4, 8, 16, 32, 64):
            sizes = Sizes(PLAN_TOKENS, vocab, hidden, ranks, device=True)
            wire = ASSUMED["wire" if ranks <= 8 else "wire_across_nodes"]
            tile = ASSUMED["memory"] / DEVICE_TILE_BYTES
            machine = Machine(ASSUMED["operations"], tile, wire, ASSUMED["latency"], ASSUMED["memory"])
            seconds = machine.seconds(sizes)
            share = sizes.operations / ASSUMED["operations"] / seconds
            lines.append(
                f"| {ranks} | {sizes.operations / PLAN_TOKENS / 1e9:.3f} | {sizes.peak_bytes / 2**20:,.0f} "
                f"| {sizes.peak_bytes / (4 * sizes.tile_elements):.2f} | {sizes.wire_bytes / PLAN_TOKENS / 1e3:.1f} "
                f"| {sizes.gathering_wire_bytes / PLAN_TOKENS / 1e3:,.0f} | {sizes.messages} "
                f"| {seconds / PLAN_TOKENS * 1e6:.2f} | {share:.0%} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    if args.plan:
        print(plan())
        return
    seen = {ranks: measured(args, ranks) for ranks in RANKS}
    result = {
        "command": shlex.join(["python", "benchmarks/scaling.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "settings": vars(args),
        "measured": seen,
        "rows": compared(args, seen),
    }
    (HERE / "results/scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results/scaling.md").write_text(comparison_table(result))
    print(comparison_table(result))


if __name__ == "__main__":
    main()
