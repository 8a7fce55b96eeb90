"""What the log says before DeepSpeed is set up."""

import json

import pytest

from launch.config.deepspeed import DS_CONFIGS
from launch.training.engine import what_training_waits_for

ADAM = {"optimizer": {"type": "AdamW", "params": {}}}


@pytest.mark.parametrize(
    ("file", "more", "compiles"),
    [("zero3_offload", {}, False), ("zero3_offload", ADAM, True), ("zero3", ADAM, False)],
)
def test_a_compilation_is_told_before_it_is_waited_for(file, more, compiles):
    config = json.loads((DS_CONFIGS / f"{file}.json").read_text()) | more
    assert ("torch_extensions: remove it" in what_training_waits_for(config)) == compiles
