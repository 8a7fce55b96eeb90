"""A corpus that is on every machine: the docstrings of the Python standard library.

The prompt is what precedes a docstring (file, enclosing class, signature, opening quotes) and the
completion is the docstring. Whole modules are held out, so no part of a held-out module is trained on.
"""

import ast
import hashlib
import inspect
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launch.data.records import Record

SKIPPED_DIRECTORIES = {
    "__pycache__", "dist-packages", "idle_test", "idlelib", "lib2to3", "site-packages", "test", "tests",
    "turtledemo",
}  # fmt: skip
HELDOUT_PERCENT = 5
# Longer ones are whole manuals (module docstrings mostly) that would not fit beside a prompt.
MAX_DOCSTRING_CHARS = 2000
INDENT = "    "


@dataclass(frozen=True)
class Corpus:
    """Docstring records, split by top-level module; `unparsable` counts skipped files."""

    train: list[Record]
    heldout: list[Record]
    unparsable: int = 0


def docstring_corpus(stdlib: str | Path | None = None) -> Corpus:
    """Collect the docstrings of the standard library, in the same order on every call."""
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    train: list[Record] = []
    heldout: list[Record] = []
    unparsable = 0
    for path in _files(root):
        relative = path.relative_to(root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError, OSError):
            unparsable += 1
            continue
        split = heldout if is_heldout(relative.parts[0].removesuffix(".py")) else train
        split.extend(_docstrings(tree, relative.as_posix()))
    return Corpus(train, heldout, unparsable)


def corpus_fingerprint(stdlib: str | Path | None = None) -> str:
    """Return a hash of the Python version, and of the name, size and time of each file of its standard library."""
    root = Path(stdlib or sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256(sys.version.encode())
    for path in _files(root):
        about = path.stat()
        digest.update(f"{path.relative_to(root)}\0{about.st_size}\0{about.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _files(root: Path) -> list[Path]:
    files = sorted(root.rglob("*.py"))
    return [path for path in files if not SKIPPED_DIRECTORIES.intersection(path.relative_to(root).parts)]


def is_heldout(module: str) -> bool:
    """Whether a top-level module is held out, by a hash that is the same in every process."""
    return zlib.crc32(module.encode()) % 100 < HELDOUT_PERCENT


def _docstrings(tree: ast.Module, file: str) -> Iterator[Record]:
    context = f"# {file}\n"
    yield from _record(tree, context, f"{file}:1", depth=0)
    yield from _definitions(tree.body, context, file, depth=0)


def _definitions(body: list[ast.stmt], context: str, file: str, depth: int) -> Iterator[Record]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            indent = INDENT * depth
            signature = "".join(f"{indent}{line}\n" for line in _signature(node))
            yield from _record(node, context + signature, f"{file}:{node.lineno}", depth + 1)
            if isinstance(node, ast.ClassDef):
                class_line = signature.splitlines()[-1] + "\n"
                yield from _definitions(node.body, context + class_line, file, depth + 1)
        elif isinstance(node, ast.If | ast.Try):
            branches = [node.body, node.orelse, getattr(node, "finalbody", [])]
            branches += [handler.body for handler in getattr(node, "handlers", [])]
            for branch in branches:
                yield from _definitions(branch, context, file, depth)


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the decorators and the `def` or `class` line; leaves `node` unchanged."""
    body, node.body = node.body, [ast.Pass()]
    try:
        return ast.unparse(node).splitlines()[:-1]
    finally:
        node.body = body


def _record(node, context: str, where: str, depth: int) -> Iterator[Record]:
    docstring = ast.get_docstring(node, clean=False)
    docstring = inspect.cleandoc(docstring).strip() if docstring else ""
    if docstring and len(docstring) <= MAX_DOCSTRING_CHARS:
        prompt = f'{context}{INDENT * depth}"""'
        yield Record({"prompt": prompt, "completion": docstring}, where)
