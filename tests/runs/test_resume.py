"""The same command resumes: bit for bit the weights of a run that nobody interrupted.

Real launches, Adam, a schedule, dropout. An interrupted run is made of a whole one: its later checkpoints and its
model are taken away, and what a kill leaves behind is put there (`test_faults.py` kills for real).
"""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.run import checkpoints
from launch.run.manifest import MANIFEST
from tests.support.small_run import flags, launch_many, metrics, write_data, write_model

TIMES = {"tokens_per_second", "peak_memory_gib"}
COMMON = {
    "smoothing": 0.1,
    "smoothing_prior": "unigram",
    "learning_rate": 1e-2,
    "max_steps": 8,  # of 5 an epoch: the resumed run finishes one and begins another
    "logging_steps": 1,
    "eval_steps": 4,
    "eval_strategy": "steps",
    "save_steps": 3,
    "save_total_limit": 5,
    "max_length": 96,
    "samples": 1,
}
# ranks, tensor parallelism, accumulation, ZeRO stage, and --offload
ALONE = (1, 1, 1, 0)
LAYOUTS = [
    ALONE,
    (1, 1, 2, 2),
    (2, 1, 1, 1),
    (2, 1, 1, 2),
    (2, 1, 2, 3),
    (2, 1, 2, 3, True),
    (2, 2, 1, 0),
    (2, 2, 1, 1),
    (2, 2, 2, 2),
    (2, 2, 1, 3),
]
RESUMED_FROM = 3


def name(layout) -> str:
    ranks, tp, accumulation, zero, *offload = layout
    return f"ranks{ranks}-tp{tp}-accumulate{accumulation}-zero{zero}" + ("-offload" if offload else "")


def command(folder: Path, layout, output: str, **more) -> list[str]:
    ranks, tp, accumulation, zero, *offload = layout
    values = COMMON | {
        "model": folder / "model-tied",
        "data": folder / "train.jsonl",
        "eval_data": folder / "heldout.jsonl",
        "output_dir": folder / output,
        "tp": tp,
        "zero": zero,
        "offload": bool(offload),
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation // (ranks // tp),
    }
    return flags(values | more)


def interrupt(whole: Path, torn: Path) -> None:
    """As if a kill had hit the run `whole` between its checkpoints 3 and 6, while it was saving the latter."""
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "model")
    shutil.rmtree(torn / "checkpoint-8")
    (torn / "samples.jsonl").unlink()
    (torn / "checkpoint-6").rename(torn / "checkpoint.partial")
    lines = (torn / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[6])["step"] > RESUMED_FROM
    (torn / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])


def untimed(run: Path) -> list[dict]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in metrics(run)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_data(folder)
    write_model(folder, tied=True, attention_dropout=0.1)
    for ranks, tp in ((1, 1), (2, 1), (2, 2)):
        layouts = [layout for layout in LAYOUTS if layout[:2] == (ranks, tp)]
        launch_many(folder, ranks, [command(folder, layout, name(layout)) for layout in layouts])
        for layout in layouts:
            interrupt(folder / name(layout), folder / f"{name(layout)}-torn")
        said = launch_many(folder, ranks, [command(folder, layout, f"{name(layout)}-torn") for layout in layouts])
        assert said.count(f"checkpoint-{RESUMED_FROM}\n") == len(layouts)
        assert said.count("smoothing prior unigram: that of this run") == len(layouts)
    return folder


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_same_weights_and_metrics(runs, layout):
    whole, torn = runs / name(layout), runs / f"{name(layout)}-torn"
    assert (whole / "model/model.safetensors").read_bytes() == (torn / "model/model.safetensors").read_bytes()
    assert untimed(torn) == untimed(whole)
    assert (whole / "samples.jsonl").read_text() == (torn / "samples.jsonl").read_text()
    assert not list(torn.glob("*.partial")) and not list(torn.glob("damaged-*"))


def test_weights_and_optimizer_on_the_cpu_train_alike(runs):
    expected, got = (load_file(runs / name((2, 1, 2, 3, *more)) / "model/model.safetensors") for more in ([], [True]))
    assert got.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(got[key], weight, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


BY_EPOCH = {
    "evaluated": {"eval_strategy": "epoch", "save_steps": 5, "logging_steps": 3, "max_steps": 10},
    "saved": {"save_strategy": "epoch", "logging_steps": 3, "max_steps": 10},
}


def test_what_happens_at_the_end_of_an_epoch_is_not_lost(runs):
    """An epoch has 5 steps; the run is interrupted after the checkpoint of the fifth, and after the last."""
    whole = [command(runs, ALONE, f"by-epoch-{how}", **options) for how, options in BY_EPOCH.items()]
    launch_many(runs, 1, whole)
    todo = []
    for how, options in BY_EPOCH.items():
        for last in (5, 10):
            torn = runs / f"by-epoch-{how}-{last}"
            shutil.copytree(runs / f"by-epoch-{how}", torn)
            shutil.rmtree(torn / "model")
            if last == 5:
                shutil.rmtree(torn / "checkpoint-10")
            todo.append(command(runs, ALONE, torn.name, **options))
    launch_many(runs, 1, todo)
    for how in BY_EPOCH:
        whole = runs / f"by-epoch-{how}"
        evaluated = {row["step"] for row in metrics(whole) if "eval_nll" in row}
        assert evaluated >= ({5, 10} if how == "evaluated" else {4, 8})
        for last in (5, 10):
            torn = runs / f"by-epoch-{how}-{last}"
            assert (whole / "model/model.safetensors").read_bytes() == (torn / "model/model.safetensors").read_bytes()
            assert untimed(torn) == untimed(whole)


def test_evaluating_changes_nothing_of_the_training(runs):
    launch_many(runs, 1, [command(runs, ALONE, "unevaluated", eval_strategy="no", eval_on_start=False)])
    weights = [(runs / run / "model/model.safetensors").read_bytes() for run in (name(ALONE), "unevaluated")]
    assert weights[0] == weights[1]


def test_a_checkpoint_of_another_model_is_refused(runs):
    (runs / "other").mkdir()
    shutil.copy(runs / "train.jsonl", runs / "other")
    other = write_model(runs / "other", tied=True, hidden_size=32)
    given = {"model": other, "resume_from_checkpoint": runs / name(ALONE) / "checkpoint-3"}
    said = launch_many(runs, 1, [command(runs, ALONE, "another-model", **given)], code=1)
    assert "is not a checkpoint of this run's model" in said and "size mismatch" in said and "Traceback" not in said


def test_every_dropped_row_is_named_in_a_file(runs):
    rows = (runs / "train.jsonl").read_text() + '{"question": "a"}\n{"question": "", "answer": " "}\n' * 5
    (runs / "bad.jsonl").write_text(rows)
    said = launch_many(runs, 1, [command(runs, ALONE, "dropping", data=runs / "bad.jsonl", max_steps=1)])
    assert "10 rows dropped" in said and f"every dropped row is named in {runs / 'dropping/dropped.txt'}" in said
    lines = (runs / "dropping/dropped.txt").read_text().splitlines()
    assert sorted(int(line.split(":")[1]) for line in lines if "shortened" not in line) == list(range(41, 51))


def test_nothing_to_train(runs):
    few = {"max_steps": 1, "per_device_train_batch_size": 64, "dataloader_drop_last": True}
    said = launch_many(runs, 1, [command(runs, ALONE, "few", **few)], code=2)
    assert "no step was made" in said and "Traceback" not in said
    assert not (runs / "few/model").exists()


def test_a_checkpoint_past_the_end(runs):
    interrupt(runs / name(ALONE), runs / "past")
    said = launch_many(runs, 1, [command(runs, ALONE, "past", max_steps=2)], code=2)
    assert "checkpoint-3 is past --max_steps 2" in said and "Traceback" not in said
    assert not (runs / "past/model").exists()


def test_rows_grouped_by_length_are_taken_in_the_same_order(runs):
    """On two data-parallel ranks, whose random generators stand elsewhere than in the run that was interrupted."""
    layout, grouped = (2, 1, 1, 1), {"train_sampling_strategy": "group_by_length"}
    whole, torn = runs / "grouped", runs / "grouped-torn"
    launch_many(runs, 2, [command(runs, layout, "grouped", **grouped)])
    interrupt(whole, torn)
    second_epoch = runs / "grouped-second-epoch"
    shutil.copytree(whole, second_epoch)
    shutil.rmtree(second_epoch / "model")
    shutil.rmtree(second_epoch / "checkpoint-8")
    launch_many(runs, 2, [command(runs, layout, run.name, **grouped) for run in (torn, second_epoch)])
    for run in (torn, second_epoch):
        assert untimed(run) == untimed(whole) != untimed(runs / name(layout))
        assert (whole / "model/model.safetensors").read_bytes() == (run / "model/model.safetensors").read_bytes()


def test_the_best_checkpoint_is_looked_at_and_the_last_one_is_kept(runs):
    """A run that was killed before its export, whose best checkpoint is not its last, in a copied directory."""
    options = {"load_best_model_at_end": True, "save_steps": 4, "save_total_limit": 1}
    whole = runs / "best"
    launch_many(runs, 1, [command(runs, ALONE, "best", **options | {"save_total_limit": 5})])
    shutil.rmtree(whole / "model")
    last = whole / "checkpoint-8"
    facts = checkpoints.facts_of(last)
    state = json.loads((last / "trainer_state.json").read_text()) | {"best_global_step": 4, "best_metric": 0.0}
    (last / "trainer_state.json").write_text(json.dumps(state))
    (last / MANIFEST).unlink()
    checkpoints.seal(last, facts)
    for copied in ("best-copied", "best-damaged"):
        shutil.copytree(whole, runs / copied)
    file = next((runs / "best-damaged/checkpoint-4").rglob("*model_states.pt"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    said = launch_many(runs, 1, [command(runs, ALONE, "best-damaged", **options)], code=2)
    assert f"the best checkpoint, {runs / 'best-damaged/checkpoint-4'}, is not whole: " in said
    shutil.rmtree(whole)
    launch_many(runs, 1, [command(runs, ALONE, "best-copied", **options)])
    copied = runs / "best-copied"
    exported, best = (load_file(copied / part / "model.safetensors") for part in ("model", "checkpoint-4"))
    assert all(torch.equal(exported[key], best[key]) for key in exported)
    assert (copied / "checkpoint-8").exists()


def test_the_last_weights_are_exported_where_the_best_step_has_no_checkpoint(runs):
    """Without learning every evaluation is alike, and the first is the best: at step 2, between checkpoints."""
    options = {"load_best_model_at_end": True, "save_steps": 4, "eval_steps": 2, "learning_rate": 0}
    said = launch_many(runs, 1, [command(runs, ALONE, "unsaved-best", **options)])
    assert "step 2 evaluated best, but has no checkpoint (--save_steps), so the last weights are exported" in said
    assert (runs / "unsaved-best/model").exists()


def test_a_best_checkpoint_that_nothing_could_tell_is_refused(runs):
    bare = {"save_strategy": "best", "eval_data": runs / "heldout.jsonl", "eval_strategy": "no"}
    said = launch_many(runs, 1, [command(runs, ALONE, "untold", **bare)], code=2)
    assert "--save_strategy best needs evaluations" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("accelerator_config", '{"use_seedable_sampler": false}', "use_seedable_sampler=false is not supported"),
        ("accelerator_config", '{"split_batches": true}', "split_batches=true is not supported"),
        ("accelerator_config", '{"dispatch_batches": true}', "dispatch_batches=true is not supported"),
        ("train_sampling_strategy", "batch_rebalance", "batch_rebalance is not supported"),
    ],
)
def test_a_sampler_that_would_take_other_rows_is_refused(runs, flag, value, words):
    said = launch_many(runs, 1, [command(runs, ALONE, "unseeded", **{flag: value})], code=2)
    assert words in said and "Traceback" not in said


def test_a_loss_scale_that_nothing_is_multiplied_with_is_refused(runs):
    said = launch_many(runs, 1, [command(runs, ALONE, "unscaled", zero=0, fp16="true")], code=2)
    assert "--fp16 needs --zero 1 or more" in said and "Traceback" not in said


def test_a_run_that_goes_further_than_was_planned(runs):
    """The schedule is that of the new end from the first step on: the last rate of the old one was nothing."""
    layout = (2, 1, 1, 2)
    further = runs / "further"
    shutil.copytree(runs / name(layout), further)
    shutil.rmtree(further / "model")
    said = launch_many(runs, 2, [command(runs, layout, "further", max_steps=12)])
    assert "max_steps: 8 before, 12 now" in said
    rates = {row["step"]: row["lr"] for row in metrics(further) if "loss" in row}
    cosine = {step: 0.005 * (1 + math.cos(math.pi * (step - 2) / 11)) for step in range(9, 13)}
    assert {step: rates[step] for step in cosine} == pytest.approx(cosine)


def test_a_full_disk_while_exporting(runs):
    given = {"save_strategy": "no", "max_steps": 1}
    said = launch_many(runs, 1, [command(runs, ALONE, "export-full", **given)], code=1, file_bytes=200_000)
    assert "could not be read or written" in said and "Traceback" not in said
    assert not (runs / "export-full" / "model").exists()


def test_it_learned_after_the_checkpoint(runs):
    """Else the comparison above would compare nothing."""
    whole = runs / name(ALONE)
    early, late = (load_file(whole / f"checkpoint-{step}/model.safetensors") for step in (3, 8))
    assert any((early[key] != late[key]).any() for key in early)
    assert [row["step"] for row in metrics(whole) if "loss" in row] == list(range(1, 9))


def test_a_finished_run_is_left_alone(runs):
    layout = ALONE
    model = runs / name(layout) / "model/model.safetensors"
    before = model.stat().st_mtime_ns
    said = launch_many(runs, 1, [command(runs, layout, name(layout))])
    assert "is finished" in said and model.stat().st_mtime_ns == before


def test_a_run_killed_while_exporting_exports(runs):
    layout = ALONE
    whole, torn = runs / name(layout), runs / "exporting"
    shutil.copytree(whole, torn)
    (torn / "model").rename(torn / "model.partial")
    launch_many(runs, 1, [command(runs, layout, "exporting")])
    assert (whole / "model/model.safetensors").read_bytes() == (torn / "model/model.safetensors").read_bytes()
    assert metrics(torn) == metrics(whole)


def test_a_damaged_checkpoint_is_passed_over(runs):
    layout = ALONE
    whole, torn = runs / name(layout), runs / "damaged"
    shutil.copytree(whole, torn)
    shutil.rmtree(torn / "model")
    shutil.rmtree(torn / "checkpoint-8")
    states = next((torn / "checkpoint-6").rglob("mp_rank_00_model_states.pt"))
    states.write_bytes(states.read_bytes()[:-1])
    said = launch_many(runs, 1, [command(runs, layout, "damaged")])
    assert "checkpoint-6 is not whole" in said and "bytes" in said
    assert (whole / "model/model.safetensors").read_bytes() == (torn / "model/model.safetensors").read_bytes()


def test_a_full_disk_ends_the_run_in_a_sentence_and_loses_nothing(runs):
    """The limit on a file's size stands in for the disk; the run resumes from the checkpoint before."""
    layout = (2, 2, 1, 1)
    whole, torn = runs / name(layout), runs / "disk-full"
    interrupt(whole, torn)
    said = launch_many(runs, 2, [command(runs, layout, "disk-full")], code=1, file_bytes=200_000)
    assert "checkpoint-6 could not be written" in said and "checkpoint-3 stands" in said
    assert "Traceback" not in said
    assert {folder.name for folder in checkpoints.checkpoints(torn)} == {"checkpoint-3"}
    launch_many(runs, 2, [command(runs, layout, "disk-full")])
    assert (whole / "model/model.safetensors").read_bytes() == (torn / "model/model.safetensors").read_bytes()


class Bomb:
    """Reading it makes a directory."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("file", ["mp_rank_00_model_states.pt", "*optim_states.pt", "rng_state*.pth"])
def test_code_in_a_checkpoint_is_not_run(runs, file):
    """A checkpoint from somebody else, whole by its own digests, whose pickle does something when it is read."""
    layout = (1, 1, 2, 2)
    torn, trace = runs / f"bomb-{file[:4].strip('*')}", runs / "exploded"
    interrupt(runs / name(layout), torn)
    checkpoint = torn / f"checkpoint-{RESUMED_FROM}"
    facts = checkpoints.facts_of(checkpoint)
    (checkpoint / MANIFEST).unlink()
    torch.save({"module": Bomb(trace)}, next(checkpoint.rglob(file)))
    checkpoints.seal(checkpoint, facts)
    said = launch_many(runs, 1, [command(runs, layout, torn.name)], code=1)
    assert "asks for posix.mkdir where tensors" in said and "Traceback" not in said
    assert not trace.exists()
