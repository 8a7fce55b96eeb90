"""Which directory a run gets, and what it refuses to resume."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch.distributed as dist
import yaml

from launch.common.errors import UserError
from launch.run import checkpoints
from launch.run.compare import check_facts, same_base
from launch.run.directory import open_run
from tests.support.processes import ROOT
from tests.support.ranks import Ranks

RECIPE = {"learning_rate": 0.01, "data": "train.jsonl", "logging_steps": 1, "max_steps": 8}
FACTS = {"tp": 1, "data_parallel": 2, "zero": 1, "rows_a_step": 8, "data": "abc"}


def write_checkpoint(run, step: int, **facts) -> None:
    name = f"checkpoint-{step}"
    with checkpoints.written_aside(run, name, FACTS | facts) as aside:
        (aside / name / "global_step").mkdir(parents=True)
        (aside / name / "latest").write_text("global_step")
        (aside / name / "global_step/mp_rank_00_model_states.pt").write_text("")
        (aside / name / "rng_state_0.pth").write_text("")
        (aside / name / "trainer_state.json").write_text(json.dumps({"global_step": step}))


@pytest.fixture
def run(tmp_path):
    """A run that was interrupted after step 5."""
    path = tmp_path / "run"
    assert open_run(str(path), RECIPE, None, FACTS).checkpoint is None
    write_checkpoint(path, 4)
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"step')
    return path


def test_runs_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = [str(open_run(None, RECIPE, None, FACTS).path) for _ in range(2)]
    assert paths == ["runs/0001", "runs/0002"]
    assert yaml.safe_load((tmp_path / "runs/0002/recipe.yaml").read_text()) == RECIPE


@pytest.mark.parametrize("name", ["²", "٣", "9" * 255, "12a", "-5", "0003.old"])
def test_what_is_no_number_of_a_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs/0003").mkdir()
    assert str(open_run(None, RECIPE, None, FACTS).path) == "runs/0004"


def test_the_same_command_resumes(run, capsys):
    again = open_run(str(run), RECIPE, None, FACTS)
    assert again.checkpoint == run / "checkpoint-4" and not again.finished
    assert "resuming from" in capsys.readouterr().out
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_half_a_line_of_metrics_is_forgotten(run):
    deep = "[" * 100_000 + "\n"
    (run / "metrics.jsonl").write_text(deep + '{"step": 3}\n{"step": 4}')
    open_run(str(run), RECIPE, None, FACTS)
    assert (run / "metrics.jsonl").read_text() == '{"step": 3}\n'


def test_without_a_checkpoint_it_starts_over(run):
    for path in (run / "checkpoint-4").rglob("*"):
        if path.is_file():
            path.unlink()
    again = open_run(str(run), RECIPE, None, FACTS)
    assert again.checkpoint is None and (run / "metrics.jsonl").read_text() == ""


def test_what_a_kill_left_is_removed(run):
    for name in ("checkpoint.partial", "model.partial", "removed-checkpoint-2"):
        (run / name).mkdir()
        (run / name / "torn").write_text("")
    open_run(str(run), RECIPE, None, FACTS)
    assert not list(run.glob("*.partial")) and not list(run.glob("removed-*"))


def test_a_kill_before_the_recipe_was_written_leaves_nothing_in_the_way(tmp_path):
    (tmp_path / ".recipe.yaml.partial").write_text("learning")
    assert open_run(str(tmp_path), RECIPE, None, FACTS).checkpoint is None


def write_model(run) -> None:
    (run / "model").mkdir()
    (run / "model/config.json").write_text("{}")
    (run / "model/model.safetensors").write_text("")


@pytest.mark.parametrize("torn", ["config.json", "model.safetensors"])
def test_half_a_model_is_not_taken_for_a_finished_run(run, torn):
    write_model(run)
    (run / "model" / torn).unlink()
    with pytest.raises(UserError, match=r"run/model is not a complete model .* remove it"):
        open_run(str(run), RECIPE, None, FACTS)
    assert (run / "model").is_dir()


def test_a_finished_run_is_left_alone(run):
    write_model(run)
    before = (run / "metrics.jsonl").read_text()
    assert open_run(str(run), RECIPE, None, FACTS).finished
    assert (run / "metrics.jsonl").read_text() == before


LONGER = {
    "more steps": (RECIPE, {"max_steps": 20}, "--max_steps 8, .* --max_steps 20, move"),
    "epochs instead": (
        RECIPE,
        {"max_steps": -1, "num_train_epochs": 2.0},
        "--max_steps 8, .* --num_train_epochs 2, ",
    ),
    "more epochs": (
        {"num_train_epochs": 1.0},
        {"num_train_epochs": 1.5},
        "--num_train_epochs 1, .* --num_train_epochs 1.5,",
    ),
    "fewer steps": (RECIPE, {"max_steps": 4}, None),
    "the same": (RECIPE, {}, None),
}


@pytest.mark.parametrize(("before", "change", "words"), LONGER.values(), ids=LONGER)
def test_a_finished_run_that_is_to_go_further_says_how(run, before, change, words):
    (run / "recipe.yaml").write_text(yaml.safe_dump(before))
    write_model(run)
    if words is None:
        assert open_run(str(run), before | change, None, FACTS).finished
        return
    with pytest.raises(UserError, match=f"is finished with {words}.*resumes from {run}/checkpoint-4"):
        open_run(str(run), before | change, None, FACTS)
    (run / "model").rename(run / "model-before")  # what it says
    assert open_run(str(run), before | change, None, FACTS).checkpoint == run / "checkpoint-4"


def test_what_a_run_shows_and_how_far_it_goes_may_change(run, capsys):
    again = open_run(str(run), RECIPE | {"logging_steps": 2, "max_steps": 20}, None, FACTS)
    assert again.checkpoint is not None
    assert "max_steps: 8 before, 20 now" in capsys.readouterr().out


def test_a_recipe_of_a_version_with_fewer_flags_has_their_defaults(run, capsys):
    assert open_run(str(run), RECIPE | {"packing": False, "max_dropped": 0.2}, None, FACTS).checkpoint is not None
    assert "changed since" not in capsys.readouterr().out


REFUSED = {
    "another rate": (RECIPE | {"learning_rate": 0.02}, FACTS, "learning_rate: 0.01 before, 0.02 now"),
    "a key more": (RECIPE | {"weight_decay": 0.1}, FACTS, "weight_decay: None before, 0.1 now"),
    "a new flag that is set": (
        RECIPE | {"packing": True},
        FACTS,
        "packing: False before, True now",
    ),
    "a key less": ({"data": "train.jsonl"}, FACTS, "learning_rate: 0.01 before, None now"),
    "another file of data": (RECIPE | {"data": "other.jsonl"}, FACTS, "data: train.jsonl before, other.jsonl now"),
    "other rows in the same file": (RECIPE, FACTS | {"data": "xyz"}, "training data differs from the data of"),
    "from ZeRO 1 to 3": (
        RECIPE,
        FACTS | {"zero": 3},
        "ZeRO 1 cannot be resumed under another layout .ZeRO stage 1 -> 3",
    ),
    "ZeRO 3 on fewer ranks": (RECIPE, FACTS | {"zero": 3, "data_parallel": 1}, "only checkpoints of ZeRO 1 and 2"),
    "from ZeRO 1 to 0": (RECIPE, FACTS | {"zero": 0}, "ZeRO stage 1 -> 0"),
    "an adapter from all weights": (
        RECIPE,
        FACTS | {"adapter": "LoRA of rank 4"},
        "a run with all weights trained, and this one has LoRA of rank 4 trained",
    ),
    "other rows a step": (RECIPE, FACTS | {"rows_a_step": 16}, "8 rows a step, and this run would take 16"),
}


def test_the_checkpoint_of_an_adapter_is_for_its_own_layout(tmp_path):
    facts = FACTS | {"adapter": "LoRA of rank 4"}
    assert check_facts(tmp_path, facts, facts) == []
    with pytest.raises(UserError, match=r"an adapter cannot be resumed under another layout .ZeRO stage 1 -> 2."):
        check_facts(tmp_path, facts, facts | {"zero": 2})
    for other in (FACTS, facts | {"adapter": "LoRA of rank 8"}):
        with pytest.raises(UserError, match="a run with LoRA of rank 4 trained"):
            check_facts(tmp_path, facts, other)


def test_an_adapter_is_resumed_beside_the_model_that_it_was_trained_beside(run):
    write_checkpoint(run, 6, base="abc")
    assert same_base(None, "abc") == same_base(run / "checkpoint-6", "abc") == "abc"
    with pytest.raises(UserError, match="configuration of --model differ from those that the adapter of"):
        same_base(run / "checkpoint-6", "xyz")
    with pytest.raises(UserError, match="checkpoint-4 does not name its base: it was written by another version"):
        same_base(run / "checkpoint-4", "abc")


@pytest.mark.parametrize(("recipe", "facts", "words"), REFUSED.values(), ids=REFUSED)
def test_another_run_is_refused_and_nothing_is_touched(run, recipe, facts, words):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=words):
        open_run(str(run), recipe, None, facts)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_corrected_recipe_starts_anew_where_nothing_was_trained(run, capsys):
    shutil.rmtree(run / "checkpoint-4")
    assert open_run(str(run), RECIPE | {"learning_rate": 0.02}, None, FACTS).checkpoint is None
    assert yaml.safe_load((run / "recipe.yaml").read_text())["learning_rate"] == 0.02
    assert "starting from the beginning" in capsys.readouterr().out


LINKS = [".lock", "recipe.yaml", "metrics.jsonl", "deepspeed.json", "samples.jsonl", ".recipe.yaml.partial"]
LINKS += ["model", "runs", "dropped.txt", "about.json", "report.html"]


@pytest.mark.parametrize("name", [*LINKS, "checkpoint.partial", "model.partial"])
@pytest.mark.parametrize("leads_to", ["a file", "a directory", "nothing"])
def test_nothing_is_written_through_a_symbolic_link(run, tmp_path, name, leads_to):
    elsewhere = tmp_path / "elsewhere"
    if leads_to == "a directory":
        elsewhere.mkdir()
        (elsewhere / "thesis.tex").write_text("all of it")
    elif leads_to == "a file":
        elsewhere.write_text("all of it")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(elsewhere)
    with pytest.raises(
        UserError, match=rf"symbolic links where a run writes \({re.escape(name)}\)|not a complete model"
    ):
        open_run(str(run), RECIPE, None, FACTS)
    assert (run / name).is_symlink()
    texts = [path.read_text() for path in (elsewhere, elsewhere / "thesis.tex") if path.is_file()]
    assert texts == ([] if leads_to == "nothing" else ["all of it"])


def test_a_model_that_was_moved_to_where_there_is_room(run, tmp_path):
    write_model(run)
    (run / "model").rename(tmp_path / "moved")
    (run / "model").symlink_to(tmp_path / "moved")
    assert open_run(str(run), RECIPE, None, FACTS).finished


def test_a_run_resumes_from_a_checkpoint_that_lies_elsewhere(run, tmp_path):
    (run / "checkpoint-4").rename(tmp_path / "kept")
    (run / "checkpoint-4").symlink_to(tmp_path / "kept")
    assert open_run(str(run), RECIPE, None, FACTS).checkpoint == run / "checkpoint-4"


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_run(str(tmp_path / "file"), RECIPE, None, FACTS)


def test_somebody_elses_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="not a run's"):
        open_run(str(tmp_path), RECIPE, None, FACTS)


@pytest.mark.parametrize(
    "content", [b"", b"[1, 2]", b"\xff\xfe\x00", b"a: [", b"!!python/object/apply:os.system [ls]"]
)
def test_a_recipe_that_cannot_be_read(run, content):
    (run / "recipe.yaml").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        open_run(str(run), RECIPE, None, FACTS)


def test_an_explicit_checkpoint(run, tmp_path):
    other = open_run(str(tmp_path / "other"), RECIPE, str(run / "checkpoint-4"), FACTS)
    assert other.checkpoint == run / "checkpoint-4"
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_run(str(tmp_path / "third"), RECIPE, str(tmp_path), FACTS)
    (run / "checkpoint-4/trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not whole: trainer_state\.json has 2 bytes"):
        open_run(str(tmp_path / "fourth"), RECIPE, str(run / "checkpoint-4"), FACTS)


def test_the_last_whole_checkpoint_of_another_run(run, tmp_path, capsys):
    """Its checkpoints stay as they are, whole or not: the run may be somebody else's, and may go on."""
    write_checkpoint(run, 10)
    assert open_run(str(tmp_path / "a"), RECIPE, str(run), FACTS).checkpoint == run / "checkpoint-10"
    assert f"resuming from {run}/checkpoint-10" in capsys.readouterr().out
    (run / "checkpoint-10/latest").write_text("torn")
    assert open_run(str(tmp_path / "b"), RECIPE, str(run), FACTS).checkpoint == run / "checkpoint-4"
    assert f"{run}/checkpoint-10 is not whole: latest has 4 bytes" in capsys.readouterr().out
    assert (run / "checkpoint-10").is_dir()
    (run / "checkpoint-4/latest").write_text("torn")
    with pytest.raises(UserError, match="checkpoint-4 is not whole"):
        open_run(str(tmp_path / "c"), RECIPE, str(run), FACTS)


def test_a_directory_prefers_its_own_checkpoint(run, tmp_path, capsys):
    """And reports that it ignores the one that is given."""
    assert open_run(str(run), RECIPE, str(tmp_path), FACTS).checkpoint == run / "checkpoint-4"
    assert "--resume_from_checkpoint is for a directory without" in capsys.readouterr().out


def test_two_starts_at_once(run):
    """The second is refused, and nothing of the first is touched."""
    (run / "checkpoint.partial").mkdir()
    second = f"from launch.run.directory import open_run; open_run({str(run)!r}, {RECIPE!r}, None, {FACTS!r})"
    done = subprocess.run([sys.executable, "-c", second], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and "is in use by another run" in done.stderr
    assert (run / "checkpoint.partial").exists()


@pytest.mark.parametrize("wanted", ["{file}/run", "{folder}/" + "x" * 300, "/proc/nope/x", "{folder}/a\0b"])
def test_a_directory_that_cannot_be_made(tmp_path, wanted):
    (tmp_path / "file").write_text("")
    wanted = wanted.format(file=tmp_path / "file", folder=tmp_path)
    with pytest.raises(UserError, match="cannot be written to"):
        open_run(wanted, RECIPE, None, FACTS)


def test_a_checkpoint_of_another_version(run):
    facts = {key: value for key, value in FACTS.items() if key != "data"}
    (run / "checkpoint-4" / "manifest.json").unlink()
    checkpoints.seal(run / "checkpoint-4", facts)
    with pytest.raises(UserError, match=r"does not name its data.*another version"):
        open_run(str(run), RECIPE, None, FACTS)


def test_an_evaluation_that_was_left_out_is_owed(run):
    assert not open_run(str(run), RECIPE, None, FACTS).evaluation_owed
    (run / "checkpoint-4" / "manifest.json").unlink()
    checkpoints.seal(run / "checkpoint-4", FACTS | {"evaluation_owed": True})
    assert open_run(str(run), RECIPE, None, FACTS).evaluation_owed


def open_in(folders: list[str]):
    os.environ["RANK"] = str(dist.get_rank())  # a launcher's
    os.chdir(folders[dist.get_rank()])
    return open_run("run", RECIPE, None, FACTS).path


def test_a_rank_that_does_not_see_the_directory(tmp_path):
    """Two nodes whose storage is their own."""
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    for folder in folders:
        os.mkdir(folder)
    ranks = Ranks(2)
    try:
        assert [outcome.error for outcome in ranks.attempt(open_in, folders[:1] * 2, time_limit=120)] == [None] * 2
        outcomes = ranks.attempt(open_in, folders, time_limit=120)
    finally:
        ranks.close()
    assert [outcome.error for outcome in outcomes] == ["UserError"] * 2
    assert all("rank 1 on " in outcome.message and "all nodes share" in outcome.message for outcome in outcomes)


def count_collectives(run: str) -> int:
    os.environ["RANK"] = str(dist.get_rank())
    counts = []
    broadcast, gather = dist.broadcast_object_list, dist.all_gather_object
    dist.broadcast_object_list = lambda *args, **kwargs: (counts.append(1), broadcast(*args, **kwargs))
    dist.all_gather_object = lambda *args, **kwargs: (counts.append(1), gather(*args, **kwargs))
    try:
        open_run(run, RECIPE, None, FACTS)
    finally:
        dist.broadcast_object_list, dist.all_gather_object = broadcast, gather
    return len(counts)


def test_opening_takes_few_collectives(run, tmp_path):
    with Ranks(2) as ranks:
        assert ranks.run(count_collectives, str(tmp_path / "fresh"), time_limit=120) == [3, 3]
        assert ranks.run(count_collectives, str(shutil.copytree(run, tmp_path / "resumed")), time_limit=120) == [5, 5]
        write_model(tmp_path / "resumed")
        assert ranks.run(count_collectives, str(tmp_path / "resumed"), time_limit=120) == [2, 2]
