"""The logits processor of `generate`: it takes smoothing out, and brings back no token that another one forbids."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from smoothing.hf import UnsmoothLogits


def test_a_smoothed_distribution_comes_back_and_forbidden_tokens_do_not():
    probs = torch.tensor([[0.6, 0.3, 0.09, 0.01]])
    smoothed = 0.9 * probs + 0.1 / 4
    processor = UnsmoothLogits.of(SimpleNamespace(config=SimpleNamespace(label_smoothing=0.1)))
    scores = smoothed.log() + 3.0  # logits are probabilities up to a constant
    torch.testing.assert_close(processor(None, scores).exp(), probs, atol=1e-6, rtol=1e-5)
    scores[0, 1] = -torch.inf
    assert processor(None, scores)[0].isneginf().tolist() == [False, True, False, False]


def test_a_prior_beside_the_model_is_taken_out(tmp_path):
    probs, prior = torch.tensor([[0.6, 0.3, 0.09, 0.01]]), torch.tensor([0.5, 0.5, 0.0, 0.0])
    config = SimpleNamespace(label_smoothing=0.1, smoothing_prior="u.safetensors", name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=r"u\.safetensors is not in"):
        UnsmoothLogits.of(SimpleNamespace(config=config))
    save_file({"u": prior}, tmp_path / "u.safetensors")
    scores = (0.9 * probs + 0.1 * prior).log() + 3.0
    got = UnsmoothLogits.of(SimpleNamespace(config=config))(None, scores).exp()
    torch.testing.assert_close(got, probs, atol=1e-6, rtol=1e-5)


def test_what_cannot_be_taken_out_is_refused():
    with pytest.raises(ValueError, match="has no label_smoothing; pass"):
        UnsmoothLogits.of(SimpleNamespace(config=SimpleNamespace()))
    with pytest.raises(ValueError, match="must lie in"):
        UnsmoothLogits(1.0)


def test_generate_applies_it_to_the_models_own_logits():
    seen = []

    class Seen(UnsmoothLogits):
        def __call__(self, input_ids, scores):
            seen.append(scores)
            return super().__call__(input_ids, scores)

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=11, eos_token_id=None, bos_token_id=None, **sizes))
    sampling = {"do_sample": True, "temperature": 0.3, "top_k": 2, "top_p": 0.5, "max_new_tokens": 1}
    given = {"logits_processor": [Seen(0.1)], "return_dict_in_generate": True, "output_logits": True}
    output = model.generate(torch.tensor([[1, 2, 3]]), pad_token_id=0, **sampling, **given)
    assert len(seen) == 1 and torch.equal(seen[0], output.logits[0])
