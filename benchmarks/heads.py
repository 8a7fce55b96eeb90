"""Time and memory of head and loss, forward and backward, side by side on gloo ranks with one thread each.

    python benchmarks/heads.py --ranks 2 --tokens 1024 --vocab 64000 --hidden 768
    python benchmarks/heads.py --tokens 256 --vocab 32000 64000 128000 256000 --ignored 0 --name vocabulary

Contenders are checked against fp64 before anything is timed, then take turns in one set of processes a round. Memory
is the high-water mark of a fresh process for each contender, over its inputs. Writes `benchmarks/results/NAME.json`
and `NAME.md`; `plot.py` draws several of them.
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of torch's old names, of packages that peers can do without

from contenders import CONTENDERS  # noqa: E402
from workers import check, on_ranks, paired_ratio, peak_memory, summary, time_interleaved  # noqa: E402

PACKAGES = ("torch", "deepspeed", "transformers", "megatron-core")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[64000])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--ignored", type=float, nargs="+", default=[0.0, 0.6], help="shares of ignored labels")
    parser.add_argument("--rounds", type=int, default=5, help="each in fresh processes")
    parser.add_argument("--turns", type=int, default=1, help="of each contender in a round")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--name", default=None, help="of the files in results/; default: made of the sizes")
    return parser.parse_args()


def hardware() -> dict:
    with open("/proc/cpuinfo") as file:
        names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {"cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(), "versions": versions}


def point(args, ranks: int, tokens: int, vocab: int, save) -> None:
    """Measure one combination of sizes: verdicts, peak memory, times, ratios; `save(entry)` after each step."""
    sizes = {"tokens": tokens, "vocab": vocab, "hidden": args.hidden, "smoothing": args.smoothing}
    verdicts = on_ranks(check, ranks, args.contenders, vocab, args.hidden, args.smoothing, args.ignored[0])
    for name, verdict in verdicts.items():
        print(f"R={ranks} T={tokens} V={vocab} {name}: {verdict}", flush=True)
    names = [name for name in args.contenders if verdicts.get(name, "ok") == "ok"]
    entry = {"ranks": ranks, "tokens": tokens, "vocab": vocab, "checked": verdicts, "load": os.getloadavg()[0]}
    entry["peak_bytes"] = {name: on_ranks(peak_memory, ranks, name, sizes, args.ignored[0]) for name in names}
    seconds = {f"{name}@{share:g}": [] for share in args.ignored for name in names}
    for index in range(args.rounds):
        taken = on_ranks(time_interleaved, ranks, names, sizes, args.ignored, index, args.turns)
        for key, values in taken.items():
            seconds[key] += values
        entry["load"] = max(entry["load"], os.getloadavg()[0])
        entry["seconds"] = {key: summary(values) for key, values in seconds.items()}
        entry["ratios"] = ratios(seconds, names, args.ignored)
        save(entry)


def ratios(seconds: dict, names: list[str], shares: list[float]) -> dict:
    """Paired ratios of the fused head here to each other contender, at each share of ignored labels."""
    if "fused" not in names:
        return {}
    pairs = [(share, other) for share in shares for other in names if other != "fused"]
    found = {
        f"fused / {other} @{share:g}": paired_ratio(seconds[f"fused@{share:g}"], seconds[f"{other}@{share:g}"])
        for share, other in pairs
    }
    for share in shares[1:]:
        for other in names:
            key = f"fused @{share:g} / {other} @{shares[0]:g}"
            found[key] = paired_ratio(seconds[f"fused@{share:g}"], seconds[f"{other}@{shares[0]:g}"])
    return found


def table(result: dict) -> str:
    """The result as Markdown, with its command and hardware."""
    settings, machine = result["settings"], result["hardware"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"# Heads: one thread a rank, fp32, H={settings['hidden']}",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {versions}; {result['date']}. Smoothing "
        f"{settings['smoothing']:g} where the contender has it. Load average up to "
        f"{max(p['load'] for p in result['points']):.1f}: where it exceeds the ranks, other work ran on the machine. "
        "Read the paired ratios (both sides in the same round), not the seconds.",
    ]
    for entry in result["points"]:
        lines += ["", f"## {entry['ranks']} ranks, T={entry['tokens']}, V={entry['vocab']}", ""]
        head = "| contender | smooths | ignored | s, median (least to most) | fused / it (paired median) | peak MB |"
        lines += [head, "|---|---|---|---|---|---|"]
        for key, times in entry["seconds"].items():
            name, share = key.rsplit("@", 1)
            ratio = entry["ratios"].get(f"fused / {name} @{share}")
            seen = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})" if ratio else ""
            memory = f"{entry['peak_bytes'][name] / 1e6:.0f}" if share == f"{settings['ignored'][0]:g}" else ""
            spread = f"{times['median']:.2f} ({times['least']:.2f} to {times['most']:.2f})"
            smooths = "yes" if CONTENDERS[name].smooths else "no"
            lines.append(f"| {CONTENDERS[name].title} | {smooths} | {share} | {spread} | {seen} | {memory} |")
        bad = {name: verdict for name, verdict in entry["checked"].items() if verdict != "ok"}
        lines += [f"\nNot timed, {CONTENDERS[name].title} ({name}): {verdict}" for name, verdict in bad.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = arguments()
    result = {
        "command": "python benchmarks/heads.py " + shlex.join(sys.argv[1:]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "settings": vars(args),
        "points": [],
    }
    name = args.name or f"heads-r{args.ranks[0]}-t{args.tokens[0]}-v{args.vocab[0]}-h{args.hidden}"
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)

    def save(entry: dict) -> None:
        sizes = ("ranks", "tokens", "vocab")
        result["points"] = [p for p in result["points"] if any(p[key] != entry[key] for key in sizes)] + [entry]
        (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / f"{name}.md").write_text(table(result))

    for ranks, tokens, vocab in product(args.ranks, args.tokens, args.vocab):
        point(args, ranks, tokens, vocab, save)
    print(table(result))


if __name__ == "__main__":
    main()
