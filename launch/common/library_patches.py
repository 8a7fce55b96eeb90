"""Every patch of torch, DeepSpeed and transformers, and why. Those of Trainer: `training.trainer_overrides`.

Each entry names the version it was last seen necessary with, where the library's behaviour is discussed or stands,
and the test in `tests/launch/common/test_library_patches.py` that fails once the patch is no longer needed. DeepSpeed
and transformers are imported in the functions, since the first two patches come before anything else of them.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import torch
import torch.distributed.distributed_c10d as c10d
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def skip_shared_memory_op() -> None:
    """Make DeepSpeed run on a CPU without its C++ op for all-reduces, which is meant for inference.

    DeepSpeed 0.19.8 builds it at its first start (`deepspeed/comm/torch.py`, `build_shm_op`). The build takes a
    compiler and minutes, and an interrupted one leaves a lock that all later starts wait for. Before it, DeepSpeed
    probes which of its ops could be built, which starts compilers and warns about toolkits that nothing here needs.
    Upstream: no switch found; the lock: deepspeedai/DeepSpeedExamples#302. Test: `test_deepspeed_builds_an_op`.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def load_weights_only() -> None:
    """Make `torch.load` refuse pickles that run code: a checkpoint may come from somebody else.

    DeepSpeed 0.19.8 passes weights_only=False for its own checkpoints (deepspeedai/DeepSpeed#6751); torch lets the
    environment overrule that. The classes beside tensors in such checkpoints are allowed here. `ZeroStageEnum` is
    pickled by its value, since some Pythons (3.11.2, in Debian 12) write a call of getattr, which torch refuses.
    Tests: `test_deepspeed_loads_full_pickles`, `test_a_zero_stage_is_pickled_by_value`.
    """
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
    ZeroStageEnum.__reduce_ex__ = lambda member, protocol: (type(member), (member.value,))


def set_collective_timeout(timeout: timedelta) -> None:
    """Set how long collectives wait: those of the present group, and of all groups made later.

    DeepSpeed 0.19.8 makes groups without a timeout (`deepspeed.comm.new_group(ranks)`), so they get torch's default,
    for NCCL ten minutes; torch 2.13 has no public way to change that default. Upstream: deepspeedai/DeepSpeed#2927,
    huggingface/transformers#32036. Test: `test_deepspeed_makes_groups_without_a_timeout`.
    """
    c10d.default_pg_timeout = timeout
    if c10d.default_pg_nccl_timeout is not None:
        c10d.default_pg_nccl_timeout = timeout
    if c10d.is_initialized():
        c10d._set_pg_timeout(timeout)


@contextmanager
def weightless() -> Iterator[None]:
    """Build models on the meta device inside, also under ZeRO 3.

    transformers 5.24's `from_config` under ZeRO 3 partitions even weights on the meta device, unless it believes to
    be inside `zero.Init` already. Upstream: none found. Test: `test_zero_3_partitions_models_on_the_meta_device`.
    """
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import set_zero3_state

    with ExitStack() as stack:
        for context in (torch.device("meta"), no_init_weights(), set_zero3_state()):
            stack.enter_context(context)
        yield


@contextmanager
def without_tensor_parallel() -> Iterator[None]:
    """Load models inside as if the DeepSpeed configuration had no tensor parallelism.

    transformers 5.24 under ZeRO 3 refuses to load a checkpoint of any model with weight renamings if the
    configuration has tensor parallelism, though the renamings are applied to whole weights, and DeepSpeed splits
    layers only later, in `initialize`. Upstream: none found
    (huggingface/transformers#43303 is the loading path).
    Test: `test_transformers_refuses_to_load_under_tensor_parallelism`.
    """
    from transformers.integrations.deepspeed import deepspeed_config

    config = deepspeed_config() or {}
    hidden = config.pop("tensor_parallel", None)
    try:
        yield
    finally:
        if hidden is not None:
            config["tensor_parallel"] = hidden


def look_inside_adapters() -> None:
    """Make DeepSpeed split the layers inside peft's, from now on.

    DeepSpeed 0.19.8 takes a module with a weight of two dimensions for a linear layer and looks no further
    (`AutoTP._replace_module`). peft's layers show their base layer's weight as their own (`BaseTunerLayer.weight`),
    for code of transformers' T5. Upstream: none found. Test: `test_peft_shows_the_weight_of_a_base_layer`.
    """
    from deepspeed.module_inject.auto_tp import AutoTP
    from peft.tuners.tuners_utils import BaseTunerLayer

    replace = AutoTP._replace_module
    if getattr(replace, "looks_inside", False):
        return

    def replace_inside(self, *place):
        shown = BaseTunerLayer.__dict__.get("weight")
        if shown is None:  # called by itself
            return replace(self, *place)
        del BaseTunerLayer.weight
        try:
            return replace(self, *place)
        finally:
            BaseTunerLayer.weight = shown

    replace_inside.looks_inside = True  # type: ignore[attr-defined]
    AutoTP._replace_module = replace_inside


def keep_fp32_grad_norm(engine) -> None:
    """Make an engine without ZeRO keep the gradient norm, and skip the update if the norm is not finite.

    DeepSpeed 0.19.8 computes the norm when it clips fp32 gradients and drops it, and updates the weights with NaN;
    with ZeRO it does neither. Upstream: deepspeedai/DeepSpeed#7255 (the norm); the update: none found.
    Test: `test_deepspeed_drops_the_gradient_norm`. For engines of ZeRO stage 0 only.
    """
    from deepspeed.runtime.utils import clip_grad_norm_

    def clip() -> None:
        parameters, limit = engine.module.parameters(), engine.gradient_clipping()
        norm = engine._global_grad_norm = clip_grad_norm_(parameters, limit, mpu=engine.mpu)
        overflow = not torch.isfinite(torch.as_tensor(norm)).item()
        if overflow:
            engine.optimizer.zero_grad(set_to_none=True)
        engine.optimizer.overflow = overflow

    engine.clip_fp32_gradients = clip


def consolidate_buffers(engine) -> None:
    """Put persistent buffers into an engine's consolidated state, which exports and checkpoints' models are made of.

    DeepSpeed 0.19.8 takes parameters only under tensor parallelism with ZeRO 0 to 2
    (`_replace_module_consolidated_state_dict`), so that the biases of DeepSeek-V3's routers would be missing. Every
    rank holds all of a buffer. Upstream: none found. Test: `test_deepspeed_consolidates_no_buffers`.
    """
    consolidated = engine._replace_module_consolidated_state_dict

    def with_buffers():
        state = consolidated()
        if state is not None:
            for prefix, module in engine.module.named_modules():
                for name, buffer in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set:
                        state.setdefault(f"{prefix}.{name}" if prefix else name, buffer.detach().cpu())
        return state

    engine._replace_module_consolidated_state_dict = with_buffers


def keep_4bit_weights(model: nn.Module) -> None:
    """Make the layers of a model in 4 bits compute alike in training and evaluation, on every CPU.

    bitsandbytes 0.50 packs the weights anew for CPUs with AVX512 and bf16, scales rounded to bf16, when a layer is
    first evaluated (`nn/modules.py`, `Linear4bit.forward`), and fails where the sizes of a layer do not divide by its
    blocks. Upstream: none found. Test: `test_bitsandbytes_packs_weights_anew`.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def find_infinities_by_norm(engine) -> None:
    """Make an engine in bf16 at ZeRO 1 or 2 look for infinities and NaN in the gradient norm alone.

    DeepSpeed 0.19.8 reads every gradient for them (`DeepSpeedZeroOptimizer.has_overflow`: ten operations each, a
    collective, and the host waits), then takes the norm of all gradients and skips the update if that is not finite,
    which it is not if any gradient in it is not. ZeRO 3 goes by the norm alone. Under tensor parallelism the search
    stays: the norm has what every rank holds whole from the first one alone, and the others may have come apart.
    Upstream: none found. Test: `test_deepspeed_looks_for_infinities_twice`.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.dtype != torch.bfloat16:
        return
    if optimizer.compute_grad_norm and not optimizer.cpu_offload and optimizer.model_parallel_world_size == 1:
        optimizer.check_overflow = lambda **_: None


def keep_flat_weights(engine) -> None:
    """Make weights share the memory of an optimizer's flat copy again after each step.

    DeepSpeed 0.19.8 gathers split layers for a checkpoint (`module_inject/layers.py`, `GatherReplacedLayerParams`),
    then gives their weights other memory. `DeepSpeedZeroOptimizer` points weights to its flat copy after each step;
    `BF16_Optimizer` (bf16 with fp32 gradients at ZeRO 1) does not, so the weights would stay as they were.
    Upstream: none found. Test: `test_deepspeeds_bf16_optimizer_leaves_weights_where_they_are`.
    """
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, BF16_Optimizer):
        return
    update = optimizer.update_lp_params

    def update_and_point() -> None:
        update()
        for weights, flat in zip(optimizer.bf16_groups, optimizer.bf16_groups_flat, strict=True):
            optimizer._update_storage_to_flattened_tensor(tensor_list=weights, flat_tensor=flat)

    optimizer.update_lp_params = update_and_point


def name_defaults(optimizer) -> None:
    """Give optimizers that wrap another the `defaults` of that one, which some schedules read.

    DeepSpeed 0.19.8's optimizers for ZeRO have none; transformers 5.24 takes the learning rate from there for a
    schedule with min_lr, and for a polynomial one. Upstream: none found.
    Test: `test_deepspeeds_optimizers_have_no_defaults`.
    """
    if hasattr(optimizer, "defaults"):
        return
    name_defaults(optimizer.optimizer)
    if not hasattr(optimizer, "defaults"):  # accelerate's wrapper has those of what it wraps
        optimizer.defaults = optimizer.optimizer.defaults


def place_step_counts(optimizer: Optimizer) -> None:
    """Move a fused optimizer's step counts to the devices of their parameters, after a checkpoint is loaded.

    DeepSpeed 0.19.8 loads those of a universal checkpoint to the CPU (`universal_checkpoint.py`,
    `load_hp_checkpoint_state`), and a fused optimizer on a GPU refuses them. Upstream: none found.
    Test: `test_deepspeed_loads_step_counts_to_where_they_were_saved`.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"] if group.get("fused") else ():
            state = optimizer.state[parameter]
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to(parameter.device)


def follow_this_schedule(schedule: LRScheduler, optimizer: Optimizer) -> None:
    """Set the next learning rate by this run's schedule, after a checkpoint is loaded.

    torch 2.13 restores the last learning rate of the saved schedule, which may have had another end (--max_steps).
    Upstream: pytorch/pytorch#52911. Test: `test_torch_restores_the_rate_of_the_saved_schedule`.
    """
    if not isinstance(schedule, LambdaLR):
        return
    pairs = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [base * at(schedule.last_epoch) for base, at in pairs]
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
