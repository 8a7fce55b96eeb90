"""Rooms of the code import only from rooms below them, so that each can be read without those above."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# lowest first; names of one set are on one level and may import each other
LAUNCH = [
    {"common"},
    {"config"},
    {"process"},
    {"data"},
    {"model"},
    {"run"},
    {"evaluation"},
    {"training"},
    {"reporting"},
    {"preflight"},
    {"assemble"},
    {"sft", "evaluate", "report"},
]
SMOOTHING = [
    {"shard"},
    {"core"},
    {"kernels"},
    {"linear"},
    {"logits_loss", "linear_loss", "reference", "calibration"},
    {"model"},
    {"install", "hf", "trl", "__init__"},
]


def room(path: Path, package: str) -> str:
    return path.relative_to(ROOT / package).parts[0].removesuffix(".py")


def imported(path: Path, package: str) -> Iterator[str]:
    """The rooms of `package` that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == package:
                inside = len(parts) > 1 and any((ROOT / package / f"{parts[1]}{end}").exists() for end in ("", ".py"))
                yield parts[1] if inside else "__init__"


@pytest.mark.parametrize(("package", "order"), [("launch", LAUNCH), ("smoothing", SMOOTHING)])
def test_imports_point_downwards(package, order):
    level = {name: index for index, names in enumerate(order) for name in names}
    files = [path for path in sorted((ROOT / package).rglob("*.py")) if path != ROOT / "launch" / "__init__.py"]
    assert len(files) > 20
    upwards = [
        f"{path.relative_to(ROOT)} imports {package}.{other}"
        for path in files
        for other in imported(path, package)
        if level[other] > level[room(path, package)]
    ]
    assert upwards == []


def test_the_library_does_not_import_the_job():
    assert [path for path in sorted((ROOT / "smoothing").rglob("*.py")) if list(imported(path, "launch"))] == []
