"""docs/examples with the libraries themselves, each held to `F.cross_entropy(label_smoothing=)` on one process.

Losses and weights after four steps of plain gradient descent in fp32.
"""

import contextlib
import os
from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.examples import example
from tests.support.ranks import pool

pytest.importorskip("transformers")


@contextlib.contextmanager
def launched(name: str):
    """What a launcher tells a process, and nothing left behind: ranks serve one example after another.

    accelerate takes FSDP and DeepSpeed on GPUs only unless it is told which state it is in.
    """
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState, GradientState, PartialState

    before, rank = dict(os.environ), str(dist.get_rank())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(dist.get_world_size()), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", HF_HUB_OFFLINE="1")
    try:
        if name == "accelerate_deepspeed":
            os.environ.update(ACCELERATE_USE_DEEPSPEED="true")
            state = PartialState(backend="gloo")
        elif name.startswith("accelerate"):
            state = PartialState(cpu=True)
            if name == "accelerate_fsdp2":
                state.distributed_type = DistributedType.MULTI_GPU
        yield
        if name.startswith("accelerate"):
            assert AcceleratorState().num_processes == state.num_processes == dist.get_world_size()
            assert AcceleratorState().distributed_type.name == STATES[name]
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(before)


STATES = {"accelerate_ddp": "MULTI_CPU", "accelerate_fsdp2": "FSDP", "accelerate_deepspeed": "DEEPSPEED"}


def run(name: str, *args, **kwargs):
    """An example on this rank: losses, and weights, which are whole on the first rank at least."""
    if name.endswith(("deepspeed", "autotp")):
        from launch.common.library_patches import skip_shared_memory_op

        skip_shared_memory_op()
    with launched(name):
        losses, weights = example(name).train(*args, **kwargs)
    return losses, {key: weight.clone() for key, weight in (weights or {}).items()}


def descend(model, batches) -> tuple[list[float], dict]:
    """The same steps by the plain loss on one process: `batches` are of inputs, and labels in their places."""
    small, losses = example("small"), []
    optimizer = torch.optim.SGD(model.parameters(), lr=small.RATE)
    for inputs, labels in batches:
        outputs = model(**inputs)
        logits = outputs if isinstance(outputs, torch.Tensor) else outputs.logits
        logits, target = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(logits, target, label_smoothing=small.SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


@cache
def plain() -> tuple[list[float], dict]:
    small = example("small")
    batches = [small.batch(step) for step in range(small.STEPS)]
    return descend(small.small_model(), [({"input_ids": each["input_ids"]}, each["labels"]) for each in batches])


def assert_same(have, want) -> None:
    (losses, weights), (plain_losses, plain_weights) = have, want
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert not weights or weights.keys() == plain_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, plain_weights[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", [*STATES, "deepspeed_autotp"])
def test_examples_on_two_ranks(name):
    results = pool(2).run(run, name, time_limit=120)
    for result in results:
        assert_same(result, plain())
    assert results[0][1]


def test_transformers_trainer(tmp_path):
    assert_same(example("transformers_trainer").train(str(tmp_path), use_cpu=True), plain())


def test_transformers_trainer_on_two_ranks(tmp_path):
    for result in pool(2).run(
        run, "transformers_trainer", str(tmp_path), use_cpu=True, per_device_train_batch_size=2, time_limit=120
    ):
        assert_same(result, plain())


def test_trl_sft(tmp_path):
    """Rows and labels are those that TRL has made of prompts and completions."""
    pytest.importorskip("trl")
    small, trainer = example("small"), example("trl_sft").train(str(tmp_path), use_cpu=True)
    rows = [trainer.train_dataset[i] for i in range(small.STEPS * small.ROWS)]
    batches = [trainer.data_collator(rows[start : start + small.ROWS]) for start in range(0, len(rows), small.ROWS)]
    expected = descend(small.small_model(), [(each, each.pop("labels")) for each in batches])
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert_same(([log["loss"] for log in logs], trainer.model.state_dict()), expected)
    assert all({"entropy", "mean_token_accuracy", "num_tokens"} <= log.keys() for log in logs)


def sft(folder: str) -> tuple[list[dict], dict]:
    with launched("trl_sft"):
        trainer = example("trl_sft").train(folder, use_cpu=True, per_device_train_batch_size=2)
        weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
        return [log for log in trainer.state.log_history if "loss" in log], weights


def test_trl_sft_on_two_ranks(tmp_path):
    """Also the figures that TRL logs are those of one process."""
    pytest.importorskip("trl")
    alone = example("trl_sft").train(str(tmp_path), use_cpu=True)
    want = [log for log in alone.state.log_history if "loss" in log]
    for logs, weights in pool(2).run(sft, str(tmp_path), time_limit=120):
        assert_same(([], weights), ([], alone.model.state_dict()))
        for log, expected in zip(logs, want, strict=True):
            assert log == pytest.approx(expected, rel=1e-5)


def test_torch_tensor_parallel():
    module, small = example("torch_tensor_parallel"), example("small")
    torch.manual_seed(0)
    batches = [small.batch(step) for step in range(small.STEPS)]
    expected = descend(module.Model(), [({"ids_BL": each["input_ids"]}, each["labels"]) for each in batches])
    for result in pool(2).run(run, "torch_tensor_parallel", time_limit=60):
        assert_same(result, expected)
