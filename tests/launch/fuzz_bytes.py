"""Coverage-guided fuzzing of what reads files: `python -m tests.launch.fuzz_bytes --runs 100000` (atheris).

Bytes become a data file, a recipe or a DeepSpeed file; whatever is not read must be refused with a `UserError`. Ends
with the number of runs, or with the first input that raised anything else.
"""

import argparse
import gzip
import sys
import tempfile
from pathlib import Path

import atheris
import pyarrow

with atheris.instrument_imports(include=["launch"]):
    from launch.common.errors import UserError
    from launch.config.command_line import parse_options
    from launch.config.deepspeed import deepspeed_config
    from launch.config.options import SftOptions
    from launch.data.train_tokenizer import train_tokenizer
    from tests.support.data import prepared

FOLDER = Path(tempfile.mkdtemp(prefix="fuzz-"))
TOKENIZER = train_tokenizer(["some words to learn from"], 300)
SEEDS = [
    b'{"prompt": "a", "completion": "b"}\n',
    b'[{"question": "a", "answer": "b"}]',
    b'{"data": [\n{"question": "a", "answer": "b"}]\n}',
    b"prompt,completion\na,b\n",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    b"smoothing: 0.1\nmodel_config: {model_type: llama}\n",
    b'{"tensor_parallel": {"autotp_size": 2}, "zero_optimization": {"stage": 1}}',
]


def data(name: str, compress=bytes):
    def read(content: bytes) -> None:
        (FOLDER / name).write_bytes(compress(content))
        prepared(str(FOLDER / name), TOKENIZER, fraction=0.2)

    return read


def zstd(content: bytes) -> bytes:
    return pyarrow.Codec("zstd").compress(content, asbytes=True)


def recipe(content: bytes) -> None:
    (FOLDER / "recipe.yaml").write_bytes(content)
    parse_options(["--recipe", str(FOLDER / "recipe.yaml"), "--model", "somewhere"])


def deepspeed(content: bytes) -> None:
    (FOLDER / "ds.json").write_bytes(content)
    deepspeed_config(SftOptions(model="somewhere"), str(FOLDER / "ds.json"), 4)


READERS = [data("a.jsonl"), data("a.json"), data("a.csv"), data("a.tsv"), data("a.jsonl.gz", gzip.compress)]
READERS += [data("a.csv.gz", gzip.compress), data("a.json.zst", zstd)]
READERS += [data("torn.json.zst", lambda content: zstd(content)[:-4])]
READERS += [data("torn.jsonl.gz", lambda content: gzip.compress(content)[:-4]), data("a.parquet"), recipe, deepspeed]


def one_input(content: bytes) -> None:
    """The first byte says which reader gets the rest."""
    if not content:
        return
    try:
        READERS[content[0] % len(READERS)](content[1:])
    except UserError as error:
        assert str(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100_000)
    runs = parser.parse_args().runs
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS):
        for reader in range(len(READERS)):
            (corpus / f"{number}-{reader}").write_bytes(bytes([reader]) + seed)
    atheris.Setup([sys.argv[0], f"-runs={runs}", "-max_len=4096", "-timeout=20", str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
