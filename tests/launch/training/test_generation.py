"""Generation stops where training has taught the model to stop."""

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from launch.training.generation import stop_generation
from tests.support.tokenizers import byte_level


@pytest.mark.parametrize("own", [None, 7, [9, 7]])
@pytest.mark.parametrize("learned", [[], [7], [5, 7]])
def test_the_exported_model_stops_where_training_stopped(tmp_path, own, learned):
    tokenizer = byte_level("<|im_end|>", bos="<s>")
    tokenizer.pad_token = "<|im_start|>"
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=len(tokenizer), **sizes))
    model.generation_config.eos_token_id = own
    stop_generation(model, tokenizer, learned)
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    stops = saved.eos_token_id if isinstance(saved.eos_token_id, list) else [saved.eos_token_id]
    before = own if isinstance(own, list) else [own] if own else []
    assert stops[: len(learned)] == learned
    assert sorted(stops) == sorted({*learned, tokenizer.eos_token_id, *before})
    assert (saved.bos_token_id, saved.pad_token_id) == (tokenizer.bos_token_id, tokenizer.pad_token_id)
