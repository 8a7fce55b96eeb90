"""Rows a second and memory of preparing chats, beside `datasets.map` with TRL's own preparation, on the same file.

    python benchmarks/data.py --rows 10000

Chats of about 1,200 tokens are generated from the docstrings of the standard library, with a byte-level BPE of 16,000
pieces that is trained on them, or with the tokenizer of --tokenizer. Ids and labels of 100 rows are compared before
anything is timed. Each contender has fresh processes. Memory is what a process holds for itself over its imports: the
first process, and a second rank that maps the rows, reads one in a hundred, and counts no pages of files. TRL is used
if it is installed (`pip install trl`). Writes `benchmarks/results/data.json` and `data.md`.
"""

import argparse
import json
import os
import random
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

from heads import HERE, hardware  # sets the import path for those below

CORES = len(os.sched_getaffinity(0))
COMPARED = 100
MAX_LENGTH = 4096
TEMPLATE = (
    "{% for m in messages %}{{ '' if loop.first else '\n' }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>"
    "{% endfor %}{{ '\n<|im_start|>assistant\n' if add_generation_prompt }}"
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", help="directory of another tokenizer")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write_chats(path: Path, rows: int) -> None:
    from launch.data.sources.stdlib_docstrings import docstring_corpus

    texts = [record.fields["completion"] for record in docstring_corpus().train]
    draw = random.Random(0)

    def text(length: int) -> str:
        parts: list[str] = []
        while sum(map(len, parts)) < length:
            parts.append(draw.choice(texts))
        return "\n\n".join(parts)

    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            question = {"role": "user", "content": text(draw.randint(600, 2600))}
            answer = {"role": "assistant", "content": text(draw.randint(1200, 3800))}
            file.write(json.dumps({"prompt": [question], "completion": [answer]}) + "\n")


def train_tokenizer(folder: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    from launch.data.sources.stdlib_docstrings import docstring_corpus

    pieces = ByteLevelBPETokenizer()
    special = ["<|im_start|>", "<|im_end|>"]
    texts = (record.fields["completion"] for record in docstring_corpus().train)
    pieces.train_from_iterator(texts, 16_000, special_tokens=special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def here(folder: Path, tokenizer, rows: Path):
    """What a run does on its first rank."""
    from launch.data.encode import Encoder
    from launch.data.encode_batch import BatchEncoder
    from launch.data.prepare import prepare
    from launch.data.prepared import open_prepared
    from launch.data.read import sources_of

    rows.mkdir()
    yield
    prepare(
        sources_of([str(folder / "chats.jsonl")], None, 0.0),
        BatchEncoder(tokenizer, Encoder(tokenizer, MAX_LENGTH)),
        rows,
        CORES,
    )
    yield open_prepared(rows).train


def mapping(folder: Path, tokenizer, rows: Path):
    """What a run does on its other ranks, with the rows of `here`."""
    from launch.data.prepared import open_prepared

    yield
    split = open_prepared(folder / "here").train
    for row in range(0, len(split), 100):
        split[row]
    yield split


def trl(folder: Path, tokenizer, rows: Path):
    """TRL's preparation of a data set, without the trainer around it."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(max_length=MAX_LENGTH, dataset_num_proc=CORES, use_cpu=True, bf16=False)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True)
    yield
    split = datasets.load_dataset(
        "json", data_files=str(folder / "chats.jsonl"), split="train", cache_dir=str(rows), keep_in_memory=False
    )
    yield SFTTrainer._prepare_dataset(trainer, split, tokenizer, config, False, None, "train")


CONTENDERS = {"here": here, "mapping": mapping, "trl": trl}


def learned(row: dict) -> tuple[list[int], list[int]]:
    labels = row["labels"]
    if "completion_mask" in row:
        labels = [label if mask else -100 for label, mask in zip(labels, row["completion_mask"], strict=True)]
    return row["input_ids"], labels


def measure(name: str, folder: Path) -> dict:
    """Run one contender in this process."""
    from transformers import AutoTokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    contender = CONTENDERS[name](folder, tokenizer, folder / name)
    next(contender)
    with peak_memory() as memory:
        start, processors = time.monotonic(), processor_seconds()
        split = next(contender)
        seconds, processors = time.monotonic() - start, processor_seconds() - processors
    first = [learned(row) for row in split.select(range(min(COMPARED, len(split))))]
    return {"seconds": seconds, "processor_seconds": processors, "peak_mib": memory[0], "first": first}


def processor_seconds() -> float:
    """Return the time of this process and those it has waited for."""
    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(sum(resource.getrusage(who)[:2]) for who in both)


@contextmanager
def peak_memory():
    """Yield a list that holds, in the end, the most anonymous memory of this process over what it began with, MiB."""

    def anonymous() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))

    found, over, before = [0.0], threading.Event(), anonymous()

    def watch() -> None:
        while not over.wait(0.05):
            found[0] = max(found[0], anonymous() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    over.set()
    thread.join()


def in_fresh_process(name: str, folder: Path) -> dict:
    shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, __file__, "--one", name, str(folder)]
    environment = os.environ | {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed; its error is above")
    return json.loads(done.stdout.splitlines()[-1])


def table(result: dict) -> str:
    machine, rows = result["hardware"], result["settings"]["rows"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items() if number)
    lines = [
        f"# Preparing {rows:,} chats of about {result['tokens']:,} tokens",
        "",
        f"`{result['command']}`",
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {versions}; {result['date']}. Best of "
        f"{result['settings']['rounds']} rounds. Processor time counts all processes of a contender; other programs "
        "disturb it least.",
        "",
        "| | rows/s | processor time a row, ms | memory of the first process over its imports, MiB |",
        "|---|---|---|---|",
    ]
    for name, found in result["measured"].items():
        best = min(found, key=lambda one: one["seconds"])
        work = min(one["processor_seconds"] for one in found) / rows * 1e3
        speed = f"{rows / best['seconds']:,.0f}" if name != "mapping" else "-"
        lines.append(f"| {name} | {speed} | {work:.2f} | {max(one['peak_mib'] for one in found):.0f} |")
    return "\n".join([*lines, "", *result["notes"]]) + "\n"


def main() -> None:
    args = arguments()
    if args.one:
        print(json.dumps(measure(args.one[0], Path(args.one[1]))))
        return
    names = [name for name in CONTENDERS if name != "trl" or find_spec("trl")]
    notes = [] if "trl" in names else ["TRL is not installed (`pip install trl`), so its preparation was not timed."]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_chats(folder / "chats.jsonl", args.rows)
        if args.tokenizer:
            (folder / "tokenizer").symlink_to(Path(args.tokenizer).absolute())
        else:
            train_tokenizer(folder / "tokenizer")
        measured: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(args.rounds):
            for name in names:
                measured[name].append(in_fresh_process(name, folder))
    firsts = {name: found[0]["first"] for name, found in measured.items()}
    ours, tokens = firsts["here"], [len(ids) for ids, _ in firsts["here"]]
    for name, rows in firsts.items():
        same = sum(one == other for one, other in zip(rows, ours, strict=True))
        notes.append(f"{name}: ids and labels of {same} of the first {len(ours)} rows are those of here.")
    for found in measured.values():
        for one in found:
            del one["first"]
    result = {
        "command": shlex.join(["python", "benchmarks/data.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware(),
        "settings": {"rows": args.rows, "rounds": args.rounds},
        "tokens": round(sum(tokens) / len(tokens)),
        "measured": measured,
        "notes": notes,
    }
    (HERE / "results/data.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "results/data.md").write_text(table(result))
    print(table(result))


if __name__ == "__main__":
    main()
