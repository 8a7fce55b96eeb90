"""Which precisions are refused, in which one gradients are accumulated, and that a user's file has the last word."""

import json

import pytest

from launch.common.errors import UserError
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions
from launch.config.precision import accumulate_in_fp32, check_precision

FP32 = {"grad_accum_dtype": "fp32"}


def config_of(zero: int, data_types: dict | None) -> dict:
    return {"zero_optimization": {"stage": zero}} | ({} if data_types is None else {"data_types": data_types})


@pytest.mark.parametrize(
    ("values", "zero", "tp", "data_types", "words"),
    [
        ({"fp16": True}, 0, 1, None, ("--fp16", "--zero 1")),
        ({"bf16": True}, 0, 2, None, ("--bf16 with --tp 2", "--zero 1", "norm of one")),
        ({"bf16": True}, 0, 1, FP32, ("grad_accum_dtype fp32", "--zero 1")),
        ({"bf16": True}, 2, 1, {"grad_accum_dtype": "fp31"}, ("data_types.grad_accum_dtype", "'fp31'")),
    ],
)
def test_refused(values, zero, tp, data_types, words):
    with pytest.raises(UserError) as error:
        check_precision(values, config_of(zero, data_types), tp)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("values", "zero", "tp"),
    [({}, 0, 2), ({"bf16": False, "fp16": False}, 0, 2), ({"bf16": True}, 0, 1), ({"bf16": True}, 1, 2)],
)
def test_taken(values, zero, tp):
    check_precision(values, config_of(zero, None), tp)


# what the file says, the stage, what the run has, and whether the log tells of bf16
GRADIENTS = [
    (None, 0, None, True),
    (None, 1, None, True),
    (None, 2, "fp32", False),
    (None, 3, "fp32", False),
    ({}, 2, "fp32", False),
    ({"grad_accum_dtype": None}, 3, "fp32", False),
    ({"grad_accum_dtype": "bf16"}, 2, "bf16", True),
    ({"grad_accum_dtype": "bf16"}, 3, "bf16", True),
    (FP32, 1, "fp32", False),
    ({"grad_accum_dtype": "torch.float32"}, 2, "torch.float32", False),
]


@pytest.mark.parametrize(("said", "zero", "has", "told"), GRADIENTS)
def test_bf16_gradients(said, zero, has, told):
    config = config_of(zero, said)
    note = accumulate_in_fp32({"bf16": True}, config)
    assert config.get("data_types", {}).get("grad_accum_dtype") == has
    assert (note is not None) == told


@pytest.mark.parametrize("values", [{}, {"bf16": False}, {"fp16": True}])
def test_other_precisions_keep_theirs(values):
    config = config_of(2, None)
    assert accumulate_in_fp32(values, config) is None and config == config_of(2, None)


def test_a_users_file_keeps_what_it_says(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config_of(2, {"grad_accum_dtype": "bf16"})))
    _, config = deepspeed_config(SftOptions(model="somewhere"), str(path), 1)
    assert accumulate_in_fp32({"bf16": True}, config) and config["data_types"] == {"grad_accum_dtype": "bf16"}
