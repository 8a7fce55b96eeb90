"""A user's DeepSpeed file: whatever is wrong in it is a sentence with its key, before anything is built of it."""

import json

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from launch.common.errors import UserError
from launch.config.deepspeed import DS_CONFIGS, deepspeed_config
from launch.config.deepspeed_file import _known
from launch.config.options import SftOptions

OPTIMIZER = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
SCHEDULER = {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}}


@pytest.fixture
def read(tmp_path):
    def read(content, tp: int = 1, ranks: int = 4) -> dict:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return deepspeed_config(SftOptions(model="somewhere", tp=tp), str(path), ranks)[1]

    return read


def zero(**values) -> dict:
    return {"zero_optimization": values}


def adam(**params) -> dict:
    return {"optimizer": {"type": "AdamW", "params": params}}


MISTAKES = [
    ({"zero_optimisation": {"stage": 2}}, ("'zero_optimisation'", "did you mean 'zero_optimization'")),
    (zero(overlap_com=True), ("zero_optimization: unknown key 'overlap_com'", "'overlap_comm'")),
    (zero(stage="two"), ("zero_optimization.stage: Input should be", '"two"')),
    (zero(stage="2"), ("zero_optimization.stage must be", '"2"')),
    (zero(stage=5), ("zero_optimization.stage: Input should be 0, 1, 2,", "got 5")),
    (zero(stage=None), ("zero_optimization.stage: Input should be", "null")),
    (zero(stage=True), ("zero_optimization.stage must be", "true")),
    (zero(stage="auto"), ("zero_optimization.stage", '"auto"', "nothing fills it in")),
    (zero(stage=2, overlap_comm="yes"), ("zero_optimization.overlap_comm must be true or false", '"yes"')),
    (zero(stage=2, overlap_comm=1), ("zero_optimization.overlap_comm must be true or false",)),
    (zero(reduce_bucket_size=-1), ("zero_optimization.reduce_bucket_size: Input should be greater than 0", "-1")),
    (zero(stage=2, reduce_bucket_size="5"), ("zero_optimization.reduce_bucket_size must be a number", '"5"')),
    (zero(stage=2, compute_grad_norm="no"), ("zero_optimization.compute_grad_norm",)),
    (zero(stage=3, compute_grad_norm=False), ("zero_optimization: compute_grad_norm=false",)),
    (
        zero(stage=3, offload_optimizer={"device": "nvmee"}),
        ("offload_optimizer.device", "'nvme'", '"nvmee"'),
    ),
    (
        zero(stage=3, offload_optimizer={"device": "auto"}),
        ("offload_optimizer.device", "nothing fills it in"),
    ),
    (zero(stage=3, offload_param={"devise": "cpu"}), ("zero_optimization.offload_param: unknown key 'devise'",)),
    (zero(stage=3, offload_param={"pin_memory": "y"}), ("offload_param.pin_memory must be true or false",)),
    (zero(stage=3, offload_param="cpu"), ("zero_optimization.offload_param: Input should be a valid dict", '"cpu"')),
    (zero(stage=3, offload_param={"strict": True}), ("zero_optimization.offload_param: unknown key 'strict'",)),
    ({"communication_data_type": "auto"}, ("DeepSpeed refuses it", "auto")),
    ({"zero_optimization": True}, ("zero_optimization must be an object", "true")),
    ({"zero_optimization": None}, ("zero_optimization must be an object", "null")),
    ({"tensor_parallel": {"auto_tp_size": 2}}, ("tensor_parallel: unknown key 'auto_tp_size'", "'autotp_size'")),
    ({"tensor_parallel": {"autotp_size": 0}}, ("tensor_parallel.autotp_size must be at least 1", "got 0")),
    ({"tensor_parallel": {"autotp_size": -2}}, ("tensor_parallel.autotp_size must be at least 1", "got -2")),
    ({"tensor_parallel": {"autotp_size": True}}, ("tensor_parallel.autotp_size must be a number", "true")),
    ({"tensor_parallel": {"autotp_size": None}}, ("tensor_parallel.autotp_size", "null")),
    ({"bf16": "yes"}, ("bf16 must be an object", '"yes"')),
    ({"bf16": "auto"}, ("bf16 must be an object", '"auto"')),
    ({"bf16": {"enabled": "yes"}}, ("bf16.enabled must be true or false", '"yes"')),
    ({"bf16": {"enable": True}}, ("bf16: unknown key 'enable'", "'enabled'")),
    ({"bfloat16": {"enabled": True}}, ("bfloat16", "bf16")),
    ({"fp16": {"loss_scal": 0}}, ("fp16: unknown key 'loss_scal'", "'loss_scale'")),
    ({"fp16": {"loss_scale": -1}}, ("fp16.loss_scale", ">= 0")),
    ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ("ds.json", "simultaneously")),
    ({"activation_checkpointing": {"profil": True}}, ("activation_checkpointing: unknown key", "'profile'")),
    ({"activation_checkpointing": {"profile": 1}}, ("activation_checkpointing.profile must be true or false",)),
    ({"optimizer": [1]}, ("optimizer must be an object", "[1]")),
    ({"optimizer": {}}, ("optimizer.type must be a string", "null")),
    ({"optimizer": {"typ": "AdamW"}}, ("optimizer: unknown key 'typ'", "'type'")),
    ({"optimizer": {"type": "AdamX"}}, ("optimizer.type", "'AdamX'", "did you mean 'Adam")),
    ({"optimizer": {"type": "MuAdam"}}, ("optimizer.type", "mup")),
    ({"optimizer": {"type": "AdamW", "params": None}}, ("optimizer.params must be an object",)),
    (adam(beta=[0.9, 0.9]), ("optimizer.params: unknown key 'beta'", "'betas'")),
    (adam(lr="fast"), ("optimizer.params.lr must be a number", '"fast"')),
    (adam(betas=[0.9]), ("optimizer.params.betas must be a list of 2 numbers", "[0.9]")),
    (adam(bias_correction="auto"), ("optimizer.params.bias_correction", "nothing fills it in")),
    (adam(max_grad_norm=1.0), ("optimizer.params.max_grad_norm", "recipe")),
    (adam(bias_correction=True, torch_adam=True), ("optimizer.params: unknown key 'bias_correction'",)),
    ({"scheduler": {"type": "WarmupDecay", "params": {}}}, ("scheduler.type", "did you mean 'WarmupDecayLR'")),
    ({"scheduler": {"type": "WarmupDecayLR"}}, ("scheduler.params", "needs total_num_steps")),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
        ("scheduler.params: unknown key 'warmup_steps'", "'warmup_num_steps'"),
    ),
    ({"train_micro_batch_size_per_gpu": "two"}, ("train_micro_batch_size_per_gpu must be", "'two'")),
    ({"gradient_accumulation_steps": 0}, ("gradient_accumulation_steps must be", "0")),
    ({"train_batch_size": True}, ("train_batch_size must be", "True")),
    ({"gradient_clipping": "much"}, ("gradient_clipping must be a number", '"much"')),
    ({"steps_per_print": "auto"}, ("steps_per_print must be a number",)),
    ({"wall_clock_breakdown": "no"}, ("wall_clock_breakdown must be true or false",)),
    ({"wandb": {"enabled": True}}, ("wandb", "--report_to wandb")),
    ({"comet": {"enabled": True}}, ("comet", "--report_to comet_ml")),
    ({"pipeline": {"stages": 2}}, ("pipeline parallelism is not supported",)),
    ({"sequence_parallel_size": 2}, ("sequence parallelism is not supported",)),
    ({"elasticity": {"enabled": True}}, ("Elastic training has been removed",)),
    ({"torch_autocast": {"enabled": True, "dtype": "float99"}}, ("DeepSpeed refuses it", "float99")),
    ('{"data_types": ' + '{"a": ' * 700 + "1" + "}" * 701, ("ds.json", "recursion")),
    (zero(stage=-1), ("zero_optimization.stage: Input should be 0, 1, 2,", "got -1")),
    ({"sparse_gradients": True}, ("Sparse compression",)),
    ({"data_types": 3}, ("data_types must be an object", "got 3")),
    ('{"zero_optimization": {"stage": 2}, "zero_optimization": {}}', ("duplicate keys", "zero_optimization")),
    ('{"zero_optimization": {"stage": 2, "stage": 3}}', ("duplicate keys", "stage")),
    ('{"gradient_clipping": NaN}', ("NaN",)),
    ("{} {}", ("after the object",)),
    ("", ("not a readable JSON",)),
]


@pytest.mark.parametrize(("content", "words"), MISTAKES, ids=[str(content)[:60] for content, _ in MISTAKES])
def test_a_mistake_is_a_sentence_with_its_key(read, content, words):
    with pytest.raises(UserError) as caught:
        read(content)
    assert str(caught.value).startswith("--deepspeed ") and "ds.json" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name", ["ds.json", "my-scheduler.json"])
def test_one_value_for_each_group_is_for_schedulers_alone(tmp_path, name):
    """Whatever the file's name is."""
    path = tmp_path / name
    path.write_text(json.dumps(adam(lr=[0.1, 0.2])))
    with pytest.raises(UserError, match=r"optimizer\.params\.lr must be a number, got \[0\.1, 0\.2\]"):
        deepspeed_config(SftOptions(model="somewhere"), str(path), 1)
    path.write_text(json.dumps({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": [0.1, 0.2]}}}))
    deepspeed_config(SftOptions(model="somewhere"), str(path), 1)


@pytest.mark.parametrize(
    "content",
    [
        *[json.loads(path.read_text()) for path in sorted(DS_CONFIGS.glob("*.json"))],
        {"optimizer": OPTIMIZER, "scheduler": SCHEDULER},
        {"optimizer": OPTIMIZER | {"params": {"torch_adam": True, "lr": "auto", "foreach": False}}},
        {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
        {"optimizer": {"type": "lion", "params": {"betas": [0.9, 0.99]}}},
        {"optimizer": {"type": "Muon", "params": {"lr": "auto", "momentum": 0.9}}},
        {"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 10}}},
        zero(stage=2, reduce_bucket_size=5e8, allgather_bucket_size="auto", overlap_comm=None),
        zero(stage=3, stage3_prefetch_bucket_size="auto", param_persistence_threshold=10),
        zero(stage=3, offload_optimizer={"device": "none"}, offload_param={"device": "cpu", "pin_memory": "auto"}),
        zero(stage=1) | {"fp16": {"enabled": "auto", "loss_scale": 128, "min_loss_scale": 1}},
        zero(stage=1) | {"gradient_clipping": 1, "steps_per_print": 5, "wall_clock_breakdown": False},
        zero(stage=1) | {"tensorboard": {"enabled": True}, "flops_profiler": {"enabled": False}},
        zero(stage=1) | {"data_types": {"grad_accum_dtype": "fp32"}, "checkpoint": {"load_universal": False}},
    ],
    ids=lambda config: "",
)
def test_what_is_right_is_taken(read, content):
    config = read(content)
    assert config["zero_optimization"]["stage"] == content.get("zero_optimization", {}).get("stage", 0)
    for key, value in content.items():
        assert key == "tensor_parallel" or config[key].items() >= value.items() if isinstance(value, dict) else True


def test_what_a_file_leaves_out_is_the_recipes(read):
    built_in = json.loads((DS_CONFIGS / "zero0.json").read_text())
    assert read({}) == built_in
    assert read({"bf16": {"check_grad_overflow": False}})["bf16"]["enabled"] == "auto"
    assert read({"gradient_clipping": 3})["gradient_clipping"] == 3


def test_an_optimizer_on_the_cpu_is_torch_s_unless_the_file_names_one(read):
    offloaded = zero(stage=3, offload_optimizer={"device": "cpu"})
    assert read(offloaded)["zero_force_ds_cpu_optimizer"] is False
    assert "zero_force_ds_cpu_optimizer" not in read(zero(stage=3))
    assert "zero_force_ds_cpu_optimizer" not in read(offloaded | {"optimizer": {"type": "AdamW", "params": {}}})


def test_the_train_batch_size_follows_from_the_others(read):
    tp = {"tensor_parallel": {"autotp_size": 2}}
    assert "train_batch_size" not in read({"train_batch_size": "auto"})
    assert "train_batch_size" not in read(tp | {"train_batch_size": "auto"})
    assert read({"train_batch_size": 8})["train_batch_size"] == 8
    with pytest.raises(UserError, match=r"train_batch_size 8 .* tensor parallelism"):
        read(tp | {"train_batch_size": 8})


@pytest.mark.parametrize("name", ["", "stage3_", "fp16"])
def test_weights_are_gathered_by_one_name(read, name):
    said = (
        "stage3_gather_fp16_weights_on_model_save" if name == "fp16" else f"{name}gather_16bit_weights_on_model_save"
    )
    made = DeepSpeedZeroConfig(**read(zero(stage=3, **{said: False}))["zero_optimization"])
    assert made.gather_16bit_weights_on_model_save is True


def test_no_file_is_named():
    with pytest.raises(UserError, match="--deepspeed is empty"):
        deepspeed_config(SftOptions(model="somewhere"), "", 1)


def test_deepspeeds_own_list_of_keys_is_whole():
    """One key from each way in which DeepSpeed reads them, and those of every shipped file."""
    shipped = {key for path in DS_CONFIGS.glob("*.json") for key in json.loads(path.read_text())}
    ways = {"optimizer", "scheduler", "compile", "timers", "aio", "vocabulary_size", "tensorboard", "comms_logger"}
    assert _known().keys() >= shipped | ways | {"checkpoint", "data_types", "prescale_gradients", "torch_autocast"}
    assert "zero_optimisation" not in _known() and "stage" not in _known()
