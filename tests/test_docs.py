"""The documents name what exists: links, anchors, paths, flags, targets of make, names of the library."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

import smoothing
from docs.generate_api import PUBLIC, api
from docs.generate_tensor_parallelism import document as splits
from launch.config.options import SftOptions
from launch.config.training_arguments import SftTrainingArguments

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+(?:\n[^`\n]+)?)`")  # a span may break over one line
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"[\w.-]+/(?:[\w.*-]+/)*(?:[\w*-]+\.[a-z]+)?")  # a folder, or a file in one
MADE_BY_A_RUN = ("runs/", "model/")

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def _text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


@cache
def _prose(document: Path) -> str:
    """The document without its code blocks."""
    return FENCED.sub("", _text(document))


@cache
def _anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", _prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _commands(document: Path) -> list[list[str]]:
    """Every command of a shell block or a code span, as words, comments left out."""
    shell = "\n".join(body for language, body in FENCED.findall(_text(document)) if language == "sh")
    lines = [*shell.replace("\\\n", " ").splitlines(), *(span.replace("\n", " ") for span in _spans(document))]
    commands = ("deepspeed", "python", "pytest", "make", "pip")
    return [shlex.split(line, comments=True) for line in lines if line.split(" ")[0] in commands]


def _spans(document: Path) -> list[str]:
    return CODE.findall(_prose(document))


def _paths(document: Path) -> set[str]:
    """What looks like a path of this repository, in a code span or a command."""
    words = [word for span in _spans(document) for word in span.split()]
    words += [word for command in _commands(document) for word in command]
    words = [word.split("::")[0].rstrip(",;:)") for word in words]
    return {word for word in words if PATH.fullmatch(word) and not word.startswith(MADE_BY_A_RUN)}


def _flags(document: Path) -> set[str]:
    """The flags of `launch/sft.py` that a document names: alone in a code span, or in a command that starts it."""
    named = {span.split()[0].split("=")[0] for span in _spans(document) if span.startswith("--")}
    for command in _commands(document):
        if "launch/sft.py" in command:
            arguments = command[command.index("launch/sft.py") + 1 :]
            named |= {word.split("=")[0] for word in arguments if word.startswith("--")}
    return named


@each_document
def test_links_lead_somewhere(document):
    broken = []
    for link in LINK.findall(_prose(document)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


@each_document
def test_paths_exist(document):
    missing = [path for path in _paths(document) if not any(ROOT.glob(path.rstrip("/")))]
    assert not missing


@each_document
def test_flags_exist(document):
    known = SftOptions.__dataclass_fields__.keys() | SftTrainingArguments.__dataclass_fields__.keys()
    known |= {"help", "help-all"}
    unknown = {flag for flag in _flags(document) if flag.removeprefix("--") not in known}
    assert not unknown


@each_document
def test_flags_of_other_scripts_exist(document):
    for command in _commands(document):
        scripts = [ROOT / word for word in command if word.endswith(".py") and word != "launch/sft.py"]
        if command[0] == "python" and scripts:
            text = "".join(path.read_text() for path in scripts[0].parent.rglob("*.py"))
            assert all(f'"{word}"' in text for word in command if word.startswith("--")), command


@each_document
def test_targets_of_make_exist(document):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {word for command in _commands(document) if command[0] == "make" for word in command[1:2]}
    assert named <= targets


@each_document
def test_selections_of_pytest_name_tests(document):
    for command in _commands(document):
        if command[0] == "pytest" and "-k" in command:
            files = [ROOT / word for word in command if word.startswith("tests/")]
            text = "".join(file.read_text().lower() for file in files)
            selected = re.split(r" or | and ", command[command.index("-k") + 1])
            assert all(word in text for word in selected), command


@each_document
def test_python_blocks_compile_and_import_what_is_there(document):
    for language, body in FENCED.findall(_text(document)):
        if language != "python":
            continue
        compile(body, f"{document.name}: block", "exec")
        for name in re.findall(r"^from smoothing import (.+)$", body, re.MULTILINE):
            assert all(hasattr(smoothing, part.strip()) for part in name.split(","))


def test_lines_shown_are_in_the_examples():
    """Each block of adoption.md that a section with an example shows is in that example, line by line."""
    document = ROOT / "docs" / "adoption.md"
    shown = 0
    for section in _text(document).split("\n## ")[1:]:
        examples = [document.parent / link for link in LINK.findall(section) if link.startswith("examples/")]
        blocks = [body for language, body in FENCED.findall(section) if language == "python"]
        for example in examples:
            lines = {line.strip() for line in example.read_text().splitlines()}
            for line in filter(None, "\n".join(blocks).splitlines()):
                assert line.strip() in lines, f"{example.name}: {line}"
                shown += 1
    assert shown > 15


def test_the_api_is_what_the_docstrings_say():
    assert (ROOT / "docs" / "api.md").read_text() == api(), "run `make docs`"


def test_the_splits_are_those_of_the_kinds():
    assert (ROOT / "docs" / "tensor-parallelism.md").read_text() == splits(), "run `make docs`"


def test_the_api_has_every_public_name():
    described = {thing.__name__ for things in PUBLIC.values() for thing in things}
    assert described >= set(smoothing.__all__) - {"__version__"}
