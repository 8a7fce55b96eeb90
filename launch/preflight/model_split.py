"""The run's split of its model, done for real: one step of plain gradient descent on N processes and on one.

Losses can agree where gradients do not: a norm whose gradient is one rank's share changes no loss in the first step.
So the step is compared, weight by weight, which also shows that the exported weights are whole.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from launch.common.library_patches import consolidate_buffers, skip_shared_memory_op
from launch.common.messages import typed_error_line
from launch.config.options import SftOptions
from launch.model.adapters import PEFT_PREFIX, is_adapted, targets_problem, with_adapter
from launch.model.tensor_parallel.apply import finish_adapters, split_adapters, split_model
from launch.preflight.ranks import join, run_ranks
from launch.preflight.small_copy import small_copy
from launch.preflight.table import Check
from smoothing import install_smoothed_loss
from smoothing.install import causal_lm

MOST_PARAMETERS = 20_000_000  # of a model that is split as it is
RATE = 1024.0  # so large that the step, not the weights, decides about rounding
ROWS, TOKENS, PROMPT = 2, 24, 6
BOUND = 1e-4


def check_model_split(
    model: PreTrainedModel, options: SftOptions, section: dict[str, Any], settings: dict[str, Any]
) -> Check:
    """Compare loss, gradients and consolidated weights of the model on `--tp` ranks with those of one process.

    Of a model of more than `MOST_PARAMETERS` a small copy is split. What cannot be tried is a row without a verdict.
    With `--lora_rank` it is done with adapters, drawn anew.

    Args:
        model: without adapters.
        section: `tensor_parallel` of the DeepSpeed configuration.
        settings: Those of the loss (`loss_settings`).
    """
    name = f"model split over {options.tp} ranks"
    if not type(model).__module__.startswith("transformers."):
        return Check(name, "not tried: the model has code of its own")
    whole, what = model, "the model itself"
    if model.num_parameters() > MOST_PARAMETERS:
        what = f"a small copy of the architecture ({model.num_parameters():,} parameters are too many to try here)"
        try:
            torch.manual_seed(0)
            whole = type(model)(small_copy(model.config, options.tp))
            if problem := targets_problem(whole, options.lora_targets):
                return Check(name, f"not tried: {what.removeprefix('a ')} has other layers: {problem}")
            with torch.no_grad():
                whole(input_ids=_batch(whole)["input_ids"])
        except Exception as error:
            return Check(name, f"not tried: no {what.removeprefix('a ')} can be built: {typed_error_line(error)}")
    with tempfile.TemporaryDirectory() as folder:
        weights = {key: _fp32(value) for key, value in whole.state_dict().items()}
        whole.save_pretrained(folder, state_dict={key: value.clone() for key, value in weights.items()})
        settings = settings | {"head": options.head}
        if settings["smoothing_prior"] is not None:
            settings["smoothing_prior"] = settings["smoothing_prior"].cpu()
        torch.save((section, settings, asdict(options)), Path(folder) / "settings.pt")
        try:
            run_ranks("launch.preflight.model_split", options.tp, folder)
        except RuntimeError as error:
            return Check(name, f"{what}: {str(error).strip().splitlines()[-1]}", "", False)
        alone = _adapted(_loaded(folder), options)
        before = {key: value.clone() for key, value in alone.state_dict().items()}
        losses = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(options.tp)]
        state = torch.load(Path(folder) / "state.pt", weights_only=True)
        loss = _loss(alone, settings)
        loss.backward()
    difference, worst = _gradient_error(alone, before, state)
    far = max(abs(each - loss.item()) / abs(loss.item()) for each in losses)
    figure = f"{what}: loss {far:.1e}, gradients {difference:.1e} of one process's ({worst})"
    return Check(name, figure, f"{BOUND / 10:.0e}, {BOUND:.0e}", far <= BOUND / 10 and difference <= BOUND)


def _fp32(value: Tensor) -> Tensor:
    return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()


def _loaded(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()  # eval: no dropout


def _adapted(model: PreTrainedModel, options: SftOptions):
    adapted = with_adapter(model, options, 0, quiet=True).eval()  # no dropout here either
    with torch.no_grad():  # peft's B is zero, so that A would have no gradient
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted


def _batch(model: PreTrainedModel) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (ROWS, TOKENS), generator=draw)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "labels": labels}


def _loss(model: PreTrainedModel, settings: dict[str, Any]) -> Tensor:
    with install_smoothed_loss(model, **settings):
        return model(**_batch(model)).loss


def _gradient_error(alone: PreTrainedModel, before: dict[str, Tensor], state: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative error of a weight's gradient, and whose; a thousandth of the largest gradient is small."""
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    small = 1e-3 * max(gradient.norm() for gradient in gradients.values())
    prefix = PEFT_PREFIX if is_adapted(alone) else ""
    tied = {f"{prefix}{name}" for name in causal_lm(alone).all_tied_weights_keys}
    errors = {name: float("inf") for name in before.keys() - state.keys() - tied}
    for name, gradient in gradients.items():
        if name in state:
            got = (before[name] - state[name]) / RATE
            errors[name] = ((got - gradient).norm() / gradient.norm().clamp(min=small)).item()
    worst = max(errors, key=lambda name: errors[name])
    return errors[worst], worst


def _one_rank(rank: int, ranks: int, folder: str) -> None:
    import deepspeed

    join(rank, ranks, folder)
    skip_shared_memory_op()
    deepspeed.init_distributed(dist_backend="gloo", dist_init_required=False)
    section, settings, given = torch.load(Path(folder) / "settings.pt", weights_only=True)
    options, section = SftOptions(**given), section | {"autotp_size": ranks}
    model = _loaded(folder)
    model.config.use_cache = False
    split = split_model(model, section)
    model = _adapted(model, options)
    if split is not None and options.lora_rank:
        split_adapters(section, split)
    config = {"train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": 0.0, "tensor_parallel": section}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    consolidate_buffers(engine)
    finish_adapters(engine.module)
    engine.module.eval()
    loss = _loss(engine.module, settings)
    engine.backward(loss)
    engine.step()
    state = engine._consolidated_16bit_state_dict()
    (Path(folder) / f"{rank}.json").write_text(json.dumps(loss.item()))
    if rank == 0:
        torch.save({name: value.clone() for name, value in state.items()}, Path(folder) / "state.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    _one_rank(rank=int(sys.argv[3]), ranks=int(sys.argv[1]), folder=sys.argv[2])
