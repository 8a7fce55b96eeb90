"""The wheel: what it holds, what it declares, and that it works where nothing but torch is installed."""

import email
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import smoothing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built as pip builds it, from a copy of what is in the repository."""
    source = tmp_path_factory.mktemp("source")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (built,) = (source / "dist").glob("*.whl")
    return built


def _files(wheel: Path) -> list[str]:
    return zipfile.ZipFile(wheel).namelist()


def _metadata(wheel: Path) -> email.message.Message:
    (name,) = [name for name in _files(wheel) if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def test_the_wheel_holds_the_library_alone(wheel):
    shipped = {name for name in _files(wheel) if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "smoothing").rglob("*.py")}
    assert shipped == modules | {"smoothing/py.typed"}


def test_the_metadata_is_complete(wheel):
    metadata = _metadata(wheel)
    assert metadata["Name"] == "sharded-label-smoothing"
    assert metadata["Version"] == smoothing.__version__
    assert metadata["Summary"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["License-File"] == "LICENSE"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert "label smoothing" in metadata["Keywords"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    description = metadata.get_payload(decode=True).decode()
    assert "`smoothing` needs torch alone" in description
    assert "](" not in description  # links and pictures that only a clone has


def test_the_library_requires_torch_and_the_job_bounds_what_it_adapts(wheel):
    requirements = [Requirement(line) for line in _metadata(wheel).get_all("Requires-Dist")]
    assert [need.name for need in requirements if need.marker is None] == ["torch"]
    upper = {need.name: any(bound.operator == "<" for bound in need.specifier) for need in requirements}
    assert upper["transformers"] and upper["deepspeed"]


def _required_by(name: str) -> set[str]:
    """The names of the distributions that an installed one needs, itself included."""
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        if name in needed:
            continue
        needed.add(name)
        for requirement in map(Requirement, distribution(name).requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return needed


def _environment_with(names: set[str], folder: Path) -> Path:
    """A virtual environment with links to these installed distributions and to nothing else."""
    venv.create(folder, with_pip=False)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(installed.locate_file(top))
    return packages


CLEAN_PROGRAM = """
import importlib.metadata, importlib.util, json
import torch
import smoothing

torch.manual_seed(0)
hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
labels = torch.tensor([1, 0, -100, 15, 3, 3])
losses = [
    smoothing.vocab_parallel_cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1),
    smoothing.vocab_parallel_linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1),
    torch.nn.functional.cross_entropy(hidden @ weight.T, labels, label_smoothing=0.1),
]
gradients = [torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in losses]
print(json.dumps({
    "losses": [loss.item() for loss in losses],
    "gradient_errors": [(gradient - gradients[-1]).abs().max().item() for gradient in gradients],
    "version": [smoothing.__version__, importlib.metadata.version("sharded-label-smoothing")],
    "installed": [name for name in ("transformers", "deepspeed", "numpy", "launch")
                  if importlib.util.find_spec(name)],
    "from": smoothing.__file__,
}))
"""


def test_it_computes_a_loss_where_torch_alone_is_installed(wheel, tmp_path):
    packages = _environment_with(_required_by("torch"), tmp_path / "clean")
    zipfile.ZipFile(wheel).extractall(packages)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    program = [tmp_path / "clean/bin/python", "-c", CLEAN_PROGRAM]
    done = subprocess.run(program, cwd=tmp_path, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout)
    assert Path(got["from"]).is_relative_to(packages)
    assert got["installed"] == []
    assert got["losses"] == pytest.approx([got["losses"][-1]] * 3, rel=1e-6)
    assert max(got["gradient_errors"]) < 1e-6
    assert got["version"] == [smoothing.__version__] * 2
