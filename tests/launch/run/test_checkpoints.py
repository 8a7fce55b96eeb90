"""A checkpoint is whole or it is recognised: every way to damage one, without starting a run."""

import errno
import hashlib
import json
import os
import resource
import shutil

import pytest
import torch

from launch.common.errors import LocalError
from launch.common.paths import CHECKPOINT_PARTIAL
from launch.run import checkpoints
from launch.run.manifest import Manifest

FACTS = {"tp": 1}


def write(run, step: int):
    name = f"checkpoint-{step}"
    with checkpoints.written_aside(run, name, FACTS) as aside:
        (aside / name / "deep").mkdir(parents=True)
        (aside / name / "latest").write_text("deep")
        (aside / name / "deep" / "mp_rank_00_model_states.pt").write_text("")
        (aside / name / "rng_state_0.pth").write_text("")
        (aside / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))
        torch.save({"weights": torch.full((1000,), float(step))}, aside / name / "deep" / "weights.pt")
        (aside / name / "state.json").write_text(json.dumps({"step": step}))
    return run / name


def last_whole(run):
    return checkpoints.last_whole(checkpoints.checkpoints(run))


@pytest.fixture
def run(tmp_path):
    for step in (9, 10, 100):  # in the order of numbers, not of letters
        write(tmp_path, step)
    return tmp_path


def test_the_last_one_is_taken_and_knows_its_run(run):
    last = last_whole(run)
    assert last == run / "checkpoint-100"
    assert checkpoints.facts_of(last) == FACTS
    assert not (run / CHECKPOINT_PARTIAL).exists()


def flip(path, at: int):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "a bit of the weights": lambda folder: flip(folder / "deep/weights.pt", 2000),
    "the first byte": lambda folder: flip(folder / "deep/weights.pt", 0),
    "the last byte": lambda folder: flip(folder / "state.json", -1),
    "truncated": lambda folder: (folder / "deep/weights.pt").write_bytes(b"torn"),
    "emptied": lambda folder: (folder / "state.json").write_bytes(b""),
    "longer": lambda folder: (folder / "state.json").open("a").write(" "),
    "a file gone": lambda folder: (folder / "state.json").unlink(),
    "a directory for a file": lambda folder: [(folder / "state.json").unlink(), (folder / "state.json").mkdir()],
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"facts": {'),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text(""),
    "a list for a manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "binary manifest": lambda folder: (folder / "manifest.json").write_bytes(b"\xff\xfe\x00"),
    "a manifest of fewer files": lambda folder: edit_manifest(folder, lambda m: m["files"].pop("state.json")),
    "a manifest of other facts": lambda folder: edit_manifest(folder, lambda m: m["facts"].update(tp=2)),
    "a manifest of other digests": lambda folder: edit_manifest(
        folder, lambda m: m["files"]["state.json"].update(sha256="0" * 64)
    ),
}


def resealed(folder, facts=FACTS, files=None):
    """As somebody else could: other contents under a digest that is right."""
    kept = Manifest.read(folder).model_dump()
    content = {"facts": facts, "files": kept["files"] | files if files else kept["files"]}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(content | {"digest": digest}))


def without(folder, *names: str):
    """Files taken away, and sealed as if they had never been."""
    facts, files = FACTS, {key: entry.model_dump() for key, entry in Manifest.read(folder).files.items()}
    for name in names:
        (folder / name).unlink()
        del files[name]
    (folder / "manifest.json").unlink()
    Manifest(facts=facts, files=files).write(folder)


def rewritten(folder, name: str, content: bytes):
    (folder / name).write_bytes(content)
    resealed(folder, files={name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}})


ENTRY = {"bytes": 0, "sha256": hashlib.sha256().hexdigest()}


def pipe(folder):
    os.mkfifo(folder / "pipe")
    resealed(folder, files={"pipe": ENTRY})


DAMAGES |= {
    "no facts": lambda folder: resealed(folder, facts=None),
    "facts that are a list": lambda folder: resealed(folder, facts=[1]),
    "facts that hold more than numbers and words": lambda folder: resealed(folder, facts={"zero": [1]}),
    "an entry that is a number": lambda folder: resealed(folder, files={"state.json": 1}),
    "a size that is a word": lambda folder: resealed(folder, files={"state.json": ENTRY | {"bytes": "0"}}),
    "a negative size": lambda folder: resealed(folder, files={"state.json": ENTRY | {"bytes": -1}}),
    "a file above": lambda folder: resealed(folder, files={"../other": ENTRY}),
    "a file far above": lambda folder: resealed(folder, files={"deep/../../../other": ENTRY}),
    "a file of the machine": lambda folder: resealed(folder, files={"/dev/null": ENTRY}),
    "a file without a name": lambda folder: resealed(folder, files={"": ENTRY}),
    "a pipe": pipe,
    "a binary state": lambda folder: rewritten(folder, "trainer_state.json", b"\xff\x00"),
    "an empty state": lambda folder: rewritten(folder, "trainer_state.json", b""),
    "a state that is a list": lambda folder: rewritten(folder, "trainer_state.json", b"[1]"),
    "a state of unknown keys": lambda folder: rewritten(folder, "trainer_state.json", b'{"global_stop": 100}'),
    "a state of another step": lambda folder: rewritten(folder, "trainer_state.json", b'{"global_step": 99}'),
    "a state of no step": lambda folder: rewritten(folder, "trainer_state.json", b'{"global_step": "100"}'),
    "a deep state": lambda folder: rewritten(folder, "trainer_state.json", b"[" * 100_000),
    "a state whose log is a number": lambda folder: rewritten(
        folder, "trainer_state.json", b'{"global_step": 100, "log_history": 5}'
    ),
    "without the model's states": lambda folder: without(folder, "deep/mp_rank_00_model_states.pt"),
    "without the generators' states": lambda folder: without(folder, "rng_state_0.pth"),
    "nothing that is sealed": lambda folder: without(folder, *Manifest.read(folder).files),
    "latest names nothing": lambda folder: rewritten(folder, "latest", b"global_step100"),
    "latest leads above": lambda folder: rewritten(folder, "latest", b".."),
    "latest names a file": lambda folder: rewritten(folder, "latest", b"state.json"),
    "a binary latest": lambda folder: rewritten(folder, "latest", b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_one_is_said_and_the_one_before_is_taken(run, damage, capsys):
    damage(run / "checkpoint-100")
    assert last_whole(run) == run / "checkpoint-10"
    said = capsys.readouterr().out
    assert "checkpoint-100 is not whole" in said and "damaged-checkpoint-100" in said
    assert (run / "damaged-checkpoint-100").is_dir() and not (run / "checkpoint-100").exists()


def test_every_damaged_one_is_kept(run):
    for _ in range(3):
        flip(run / "checkpoint-100/state.json", 0)
        assert last_whole(run) == run / "checkpoint-10"
        write(run, 100)
    names = ["damaged-checkpoint-100", "damaged-checkpoint-100.1", "damaged-checkpoint-100.2"]
    assert sorted(path.name for path in run.glob("damaged-*")) == names


def test_every_file_is_brought_to_disk_before_the_renaming(run, monkeypatch):
    flushed, fsync = set(), os.fsync

    def noted(descriptor):
        flushed.add(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder = write(run, 200)
    assert flushed >= {path.name for path in folder.rglob("*")} | {folder.name, run.name}


def test_a_file_that_somebody_added_is_no_damage(run):
    (run / "checkpoint-100/notes.txt").write_text("the good one")
    assert last_whole(run) == run / "checkpoint-100"


def test_only_plain_numbers_are_steps(run):
    (run / "checkpoint-\N{ARABIC-INDIC DIGIT FOUR}").mkdir()
    (run / "checkpoint-").mkdir()
    assert [checkpoints.step_of(folder) for folder in checkpoints.checkpoints(run)] == [100, 10, 9]


def test_none_is_left(run):
    for step in (9, 10, 100):
        (run / f"checkpoint-{step}" / "manifest.json").unlink()
    assert last_whole(run) is None


def test_a_kill_between_any_two_writes_leaves_the_earlier_one(run):
    """What a killed writer leaves lies aside, whatever it holds, and is no checkpoint."""
    shutil.copytree(run / "checkpoint-100", run / CHECKPOINT_PARTIAL / "checkpoint-200")
    assert last_whole(run) == run / "checkpoint-100"
    assert write(run, 200) == last_whole(run)


def test_a_step_done_again_replaces_its_checkpoint(run):
    before = checkpoints.facts_of(run / "checkpoint-100")
    write(run, 100)
    assert checkpoints.damage(run / "checkpoint-100") is None
    assert checkpoints.facts_of(run / "checkpoint-100") == before


def test_a_full_disk_is_said_and_the_earlier_one_stands(run):
    """The limit on a file's size stands in for the disk: the same errors of the same calls."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(LocalError, match=r"checkpoint-200 could not be written.*checkpoint-100 stands"):
            write(run, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert last_whole(run) == run / "checkpoint-100"
    assert not (run / CHECKPOINT_PARTIAL).exists()


def test_a_full_disk_while_sealing(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        Exception, match=r"(?s)checkpoint-200 could not be written.*No space left.*checkpoint-100 stands"
    ):
        write(run, 200)
    assert last_whole(run) == run / "checkpoint-100"


def test_errors_of_the_computation_are_not_taken_for_a_full_disk(run):
    with pytest.raises(RuntimeError, match="Connection closed by peer"):  # noqa: SIM117
        with checkpoints.written_aside(run, "checkpoint-200", FACTS):
            raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")


@pytest.mark.parametrize(
    ("keep", "left"), [(None, {9, 10, 100}), (2, {10, 100}), (1, {100}), (0, {100}), (5, {9, 10, 100})]
)
def test_rotation_keeps_the_last(run, keep, left):
    checkpoints.rotate(run, keep, best=None)
    assert {checkpoints.step_of(folder) for folder in checkpoints.checkpoints(run)} == left
    assert not list(run.glob("damaged-*"))


def test_rotation_keeps_the_best(run):
    checkpoints.rotate(run, 1, best=str(run / "checkpoint-9"))
    assert {checkpoints.step_of(folder) for folder in checkpoints.checkpoints(run)} == {9, 100}


def test_rotation_passes_a_damaged_one_that_was_kept(run):
    flip(run / "checkpoint-100/state.json", 0)
    assert last_whole(run) == run / "checkpoint-10"
    for step in (100, 110, 120):
        write(run, step)
        checkpoints.rotate(run, 2, best=None)
    assert {checkpoints.step_of(folder) for folder in checkpoints.checkpoints(run)} == {110, 120}
    assert [path.name for path in run.glob("damaged-*")] == ["damaged-checkpoint-100"]
    assert not list(run.glob("removed-*"))
