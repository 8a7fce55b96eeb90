"""The three formulations are one number: the one that the paper, PyTorch and Hugging Face mean."""

import pytest
import torch
import torch.nn.functional as F

from smoothing.reference import hf_label_smoother, onehot_cross_entropy, torch_cross_entropy
from tests.support.cases import CASES, EXAMPLE_LOGITS, EXAMPLE_TARGET, build

FORMULATIONS = [torch_cross_entropy, hf_label_smoother, onehot_cross_entropy]
each_formulation = pytest.mark.parametrize("formulation", FORMULATIONS, ids=lambda f: f.__name__)


@each_formulation
@pytest.mark.parametrize("smoothing, expected", [(0.0, 2.1185), (1.0, 1.9713), (0.1, 2.1038)])
def test_worked_example(formulation, smoothing, expected):
    assert formulation(EXAMPLE_LOGITS, EXAMPLE_TARGET, smoothing).item() == pytest.approx(expected, abs=5e-5)


def by_definition(logits, target, smoothing, ignore_index):
    """Token by token, number by number."""
    losses = []
    for z, y in zip(logits, target.tolist(), strict=True):
        if y == ignore_index:
            continue
        log_sum = z.exp().sum().log()
        losses.append((1 - smoothing) * (log_sum - z[y]) + smoothing * (log_sum - z).mean())
    return torch.stack(losses).mean()


@each_formulation
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_definition(formulation, smoothing, ignore_index):
    case = build(1, tokens=40, ignore_index=ignore_index)
    ours, definition = (case.logits.clone().requires_grad_() for _ in range(2))
    loss = formulation(ours, case.target, smoothing, ignore_index)
    expected = by_definition(definition, case.target, smoothing, ignore_index)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(ours.grad, definition.grad, rtol=0, atol=1e-15)


@each_formulation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_the_dtype_given(formulation, dtype):
    case = CASES["smoothing-0.1"](1)
    loss = formulation(case.logits.to(dtype), case.target, 0.1)
    assert loss.dtype == dtype
    truth = F.cross_entropy(case.logits.to(dtype).double(), case.target, label_smoothing=0.1)
    assert abs(loss.double() - truth) <= 4 * torch.finfo(dtype).eps * truth


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_hugging_faces_own_label_smoother(smoothing):
    trainer_utils = pytest.importorskip("transformers.trainer_pt_utils")
    case = build(1, tokens=40)
    theirs = trainer_utils.LabelSmoother(epsilon=smoothing)({"logits": case.logits[None]}, case.target[None].clone())
    # its log-probabilities are fp32 in part, whatever the logits' dtype
    torch.testing.assert_close(hf_label_smoother(case.logits, case.target, smoothing), theirs, rtol=1e-6, atol=0)
