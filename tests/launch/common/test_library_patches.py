"""Libraries still do what they are patched for. A test that fails here says that its patch can go."""

import inspect
import pickle
import re
import tomllib
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed.distributed_c10d as c10d
from deepspeed.checkpoint import universal_checkpoint
from deepspeed.comm.torch import build_shm_op
from deepspeed.module_inject import auto_tp
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from packaging.specifiers import SpecifierSet
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, optimization
from transformers.integrations import deepspeed as integration
from transformers.trainer_pt_utils import LengthGroupedSampler

from launch.common import library_patches as patches
from launch.training.trainer_overrides import TrainerWithHooks
from tests.support.small_run import ROOT


def test_deepspeed_builds_an_op():
    assert "builder.load()" in inspect.getsource(build_shm_op)


def test_deepspeed_loads_full_pickles(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "load", lambda *_, weights_only=None, **__: asked.append(weights_only))
    TorchCheckpointEngine().load("checkpoint")
    assert asked == [False]


def test_a_zero_stage_is_pickled_by_value():
    """Needed for as long as Python 3.11.2 is allowed."""
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert "3.11.2" in SpecifierSet(python)
    patches.load_weights_only()
    assert ZeroStageEnum.gradients.__reduce_ex__(2) == (ZeroStageEnum, (2,))
    assert pickle.loads(pickle.dumps(ZeroStageEnum.gradients)) is ZeroStageEnum.gradients


def test_deepspeed_makes_groups_without_a_timeout():
    assert list(inspect.signature(deepspeed.comm.new_group).parameters) == ["ranks"]
    assert isinstance(c10d.default_pg_timeout, type(c10d._get_default_timeout("gloo")))


def test_peft_shows_the_weight_of_a_base_layer():
    """And DeepSpeed looks no further where there is a weight."""
    assert isinstance(BaseTunerLayer.weight, property)
    assert 'hasattr(child, "weight") and _weight_ndim(child.weight) == 2' in inspect.getsource(auto_tp)


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 16}


@pytest.fixture
def zero_3():
    """transformers' view of a run with ZeRO 3 and tensor parallelism, without an engine."""
    config = {"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 2}}
    kept = integration.HfDeepSpeedConfig(config)
    yield kept
    integration.unset_hf_deepspeed_config()


def test_zero_3_partitions_models_on_the_meta_device(zero_3, monkeypatch):
    def partitions(**_):
        raise NotImplementedError("partitions")

    monkeypatch.setattr(deepspeed.zero, "Init", partitions)
    config = LlamaConfig(**SMALL)
    with torch.device("meta"), pytest.raises(NotImplementedError, match="partitions"):
        AutoModelForCausalLM.from_config(config)
    with patches.weightless():
        assert next(AutoModelForCausalLM.from_config(config).parameters()).is_meta


def test_transformers_refuses_to_load_under_tensor_parallelism(zero_3):
    """Wherever the refusal stands, it looks at the configuration's tensor parallelism."""
    with patches.without_tensor_parallel():
        assert "tensor_parallel" not in zero_3.config
    assert zero_3.config["tensor_parallel"] == {"autotp_size": 2}
    assert re.search(r"tensor_parallel.*\n(.*\n){0,12}.*raise NotImplementedError", inspect.getsource(integration))


@pytest.fixture
def plain_norm(monkeypatch):
    """In place of DeepSpeed's, which needs a process group."""
    for module in (deepspeed.runtime.engine, deepspeed.runtime.utils):
        monkeypatch.setattr(
            module, "clip_grad_norm_", lambda parameters, max_norm, mpu: clip_grad_norm_(parameters, max_norm)
        )


def clipping_engine(gradient: float) -> SimpleNamespace:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.grad = torch.full_like(module.weight, gradient)
    return SimpleNamespace(
        module=module, gradient_clipping=lambda: 1.0, mpu=None, optimizer=torch.optim.SGD(module.parameters(), lr=1.0)
    )


def test_deepspeed_drops_the_gradient_norm(plain_norm):
    engine = clipping_engine(4.0)
    DeepSpeedEngine.clip_fp32_gradients(engine)
    assert not hasattr(engine, "_global_grad_norm") and not hasattr(engine.optimizer, "overflow")
    patches.keep_fp32_grad_norm(engine := clipping_engine(4.0))
    engine.clip_fp32_gradients()
    assert engine._global_grad_norm == 4.0 and not engine.optimizer.overflow
    assert engine.module.weight.grad.item() == pytest.approx(1.0)


def test_a_norm_that_is_not_finite_leaves_the_step_out(plain_norm):
    patches.keep_fp32_grad_norm(engine := clipping_engine(torch.nan))
    engine.clip_fp32_gradients()
    assert engine.optimizer.overflow and engine.module.weight.grad is None


def test_deepspeed_consolidates_no_buffers():
    assert "buffer" not in inspect.getsource(DeepSpeedEngine._replace_module_consolidated_state_dict)
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    module[0].register_buffer("scratch", torch.zeros(1), persistent=False)
    for states in ({"0.weight": torch.ones(2)}, None):  # on rank 0, on the others
        engine = SimpleNamespace(module=module, _replace_module_consolidated_state_dict=lambda states=states: states)
        patches.consolidate_buffers(engine)
        state = engine._replace_module_consolidated_state_dict()
        assert (state is None) == (states is None)
        if state is not None:
            assert state.keys() == {"0.weight", "0.running_mean", "0.running_var", "0.num_batches_tracked"}


def test_bitsandbytes_packs_weights_anew():
    modules = pytest.importorskip("bitsandbytes").nn.modules
    assert "_convert_weight_packed_for_cpu(self.weight.data" in inspect.getsource(modules.Linear4bit.forward)
    layer = modules.Linear4bit(96, 64)  # 96 is not whole blocks of 64
    layer.load_state_dict({"weight": torch.randn(64, 96), "bias": torch.zeros(64)})
    patches.keep_4bit_weights(torch.nn.Sequential(layer.to("cpu").eval()))
    before = layer.weight.data.clone()
    assert layer(torch.randn(2, 96)).isfinite().all() and torch.equal(layer.weight.data, before)


@pytest.mark.parametrize(
    ("dtype", "offload", "tp", "left_out"),
    [
        (torch.bfloat16, False, 1, True),
        (torch.bfloat16, True, 1, False),
        (torch.bfloat16, False, 2, False),
        (torch.float16, False, 1, False),
    ],
)
def test_deepspeed_looks_for_infinities_twice(dtype, offload, tp, left_out):
    """That a norm says enough: `tests/runs/test_nonfinite.py`, in bf16."""
    step = inspect.getsource(DeepSpeedZeroOptimizer.step)
    assert "self.check_overflow(" in step and "is_invalid_grad_norm(scaled_global_grad_norm)" in step
    optimizer = DeepSpeedZeroOptimizer.__new__(DeepSpeedZeroOptimizer)
    optimizer.dtype, optimizer.compute_grad_norm, optimizer.cpu_offload = dtype, True, offload
    optimizer.model_parallel_world_size = tp
    searched = []
    optimizer.check_overflow = lambda **_: searched.append(True)
    patches.find_infinities_by_norm(SimpleNamespace(optimizer=optimizer))
    optimizer.check_overflow(partition_gradients=True)
    assert bool(searched) != left_out


def bf16_optimizer():
    """One whose fp32 copy of two weights is updated, without the process group that DeepSpeed's own needs."""
    made = BF16_Optimizer.__new__(BF16_Optimizer)
    weights = [torch.nn.Parameter(torch.full((2,), float(value))) for value in (1, 2)]
    made.flatten, made.unflatten = _flatten_dense_tensors, _unflatten_dense_tensors
    made.bf16_groups, made.bf16_groups_flat = [weights], [made.flatten([weight.data for weight in weights])]
    made._update_storage_to_flattened_tensor(weights, made.bf16_groups_flat[0])
    made.update_lp_params = lambda: made.bf16_groups_flat[0].add_(1)
    return made, weights


@pytest.mark.parametrize("patched", [False, True])
def test_deepspeeds_bf16_optimizer_leaves_weights_where_they_are(patched):
    """`_tp_partition` after a gather gives a split weight other memory, as here the second one has."""
    assert "_update_storage_to_flattened_tensor" not in inspect.getsource(BF16_Optimizer.update_lp_params)
    optimizer, (first, second) = bf16_optimizer()
    if patched:
        patches.keep_flat_weights(SimpleNamespace(optimizer=optimizer))
    second.data = second.data.clone()
    optimizer.update_lp_params()
    assert first.tolist() == [2, 2] and second.tolist() == ([3, 3] if patched else [2, 2])


def test_deepspeeds_optimizers_have_no_defaults():
    for kind in (BF16_Optimizer, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3):
        assert not hasattr(kind, "defaults") and "self.defaults" not in inspect.getsource(kind)
    assert 'optimizer.defaults["lr"]' in inspect.getsource(optimization)
    wrapped = SimpleNamespace(optimizer=torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5))
    for outermost in (SimpleNamespace(optimizer=wrapped), wrapped, wrapped.optimizer):
        patches.name_defaults(outermost)
        assert outermost.defaults["lr"] == 0.5


def test_deepspeed_loads_step_counts_to_where_they_were_saved():
    source = inspect.getsource(universal_checkpoint.load_hp_checkpoint_state)
    assert "step = ckpt_dict" in source and ".to(" not in source


def test_torch_restores_the_rate_of_the_saved_schedule():
    def schedule(steps: int):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps), optimizer

    (saved, optimizer), (longer, resumed) = schedule(4), schedule(8)
    for _ in range(2):
        optimizer.step()
        saved.step()
    longer.load_state_dict(saved.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    assert longer.get_last_lr() == [0.5] and resumed.param_groups[0]["lr"] == 0.5
    patches.follow_this_schedule(longer, resumed)
    assert longer.get_last_lr() == [0.75] and resumed.param_groups[0]["lr"] == 0.75


def test_trainers_sampler_draws_from_the_global_generator():
    assert "generator" not in inspect.getsource(Trainer._get_train_sampler)
    assert not hasattr(LengthGroupedSampler, "set_epoch")


def test_trainer_writes_checkpoints_in_place():
    assert not re.search("rename|replace|tmp", inspect.getsource(Trainer._save_checkpoint))


def test_trainer_loads_the_best_checkpoint_unchecked():
    assert not re.search("sha256|digest|checksum", inspect.getsource(Trainer._load_best_model))


def test_trainer_gathers_frozen_weights():
    assert "_is_peft_model(self.model) and zero3_sharding" in inspect.getsource(Trainer.save_model)


def test_trainer_still_has_what_is_overridden():
    overridden = [name for name in vars(TrainerWithHooks) if name.startswith("_") and not name.startswith("__")]
    assert sorted(overridden) == ["_get_output_dir", "_get_train_sampler", "_load_best_model", "_save_checkpoint"]
    for name in overridden:
        theirs, ours = inspect.signature(getattr(Trainer, name)), inspect.signature(getattr(TrainerWithHooks, name))
        assert list(ours.parameters) == list(theirs.parameters), name
