"""Runs whose model and data are of a hub: those of the local files, and one rank downloads the data for all."""

import shutil
from pathlib import Path

import pytest

from tests.support.hub import Hub
from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

COMMON = {
    "smoothing": 0.1,
    "max_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "eval_on_start": False,
    "max_length": 96,
    "samples": 0,
    "save_steps": 1,
    "per_device_train_batch_size": 4,
}
KINDS = {"prepared": {}, "streamed": {"streaming": True, "shuffle_buffer": 8}}


def steps(run: Path) -> list[dict]:
    timed = ("tokens_per_second", "peak_memory_gib")
    return [{key: value for key, value in row.items() if key not in timed} for row in metrics(run)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    """The runs of both kinds, from a file and from a hub whose data then change; how the last one was refused."""
    folder = tmp_path_factory.mktemp("hub-runs")
    write_data(folder)
    file, model = folder / "train.jsonl", write_model(folder, tied=True)

    def command(name: str, kind: str, **places: object) -> list[str]:
        return flags(COMMON | KINDS[kind] | {"output_dir": folder / f"{name}-{kind}"} | places)

    with Hub(folder) as hub:
        data = hub.add("owner/sums", {"train.jsonl": file.read_bytes()})
        shutil.copytree(model, hub.add("owner/model"), dirs_exist_ok=True)
        named = {"model": "owner/model", "data": "owner/sums"}
        todo = [command("file", kind, model=model, data=file) for kind in KINDS]
        said = launch_many(folder, 2, [*todo, command("hub", "prepared", **named)])
        assert hub.downloads("train.jsonl") == 1
        (data / "train.jsonl").write_text(file.read_text().replace("Add", "Put"))
        pinned = next(word for word in said.split() if word.startswith("owner/sums@"))
        for name in ("resumed", "changed"):
            shutil.copytree(folder / "hub-prepared", folder / f"{name}-prepared")
            for later in ("model", "checkpoint-2"):
                shutil.rmtree(folder / f"{name}-prepared" / later)
        places = named | {"data": pinned}
        todo = [command("hub", "streamed", **places), command("resumed", "prepared", **places)]
        return folder, launch_many(folder, 2, [*todo, command("changed", "prepared", **named)], code=2)


@pytest.mark.parametrize("name", ["hub-prepared", "hub-streamed", "resumed-prepared"])
def test_the_run_of_the_file(runs, name):
    assert steps(runs[0] / name) == steps(runs[0] / f"file-{name.partition('-')[2]}")


def test_changed_data_are_refused_at_a_resume(runs):
    assert "error: the training data differs from the data of" in runs[1]
