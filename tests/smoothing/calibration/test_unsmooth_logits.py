"""The logits processor of `generate`: it takes smoothing out, and brings back no token that another one forbids."""

from types import SimpleNamespace

import pytest
import torch

from smoothing.hf import UnsmoothLogits


def test_a_smoothed_distribution_comes_back_and_forbidden_tokens_do_not():
    probs = torch.tensor([[0.6, 0.3, 0.09, 0.01]])
    smoothed = 0.9 * probs + 0.1 / 4
    processor = UnsmoothLogits.of(SimpleNamespace(config=SimpleNamespace(label_smoothing=0.1)))
    scores = smoothed.log() + 3.0  # logits are probabilities up to a constant
    torch.testing.assert_close(processor(None, scores).exp(), probs, atol=1e-6, rtol=1e-5)
    scores[0, 1] = -torch.inf
    assert processor(None, scores)[0].isneginf().tolist() == [False, True, False, False]


def test_what_cannot_be_taken_out_is_refused():
    with pytest.raises(ValueError, match="has no label_smoothing; pass"):
        UnsmoothLogits.of(SimpleNamespace(config=SimpleNamespace()))
    with pytest.raises(ValueError, match="must lie in"):
        UnsmoothLogits(1.0)
