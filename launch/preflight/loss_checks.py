"""Checks of the loss alone, on hidden states of a real batch, against fp64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.data.examples.rows import IGNORED
from launch.preflight.split import simulate_split
from launch.preflight.table import Check
from smoothing import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from smoothing.model.forward_state import shifted
from smoothing.reference import hf_label_smoother, onehot_cross_entropy, torch_cross_entropy

LABEL_TOKENS = 256  # compared with the reference; an fp64 gradient of a large vocabulary takes its time
FORMULATIONS = (torch_cross_entropy, hf_label_smoother, onehot_cross_entropy)
Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of hidden states, weight, target and smoothing


@dataclass(frozen=True)
class HeadInput:
    """What a head computes the loss from: label tokens of a real batch. T tokens, H hidden, V vocabulary."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    smoothing: float


def capture_head_input(model, batch: dict[str, Tensor], smoothing: float) -> HeadInput:
    """Run the body once and keep what reaches the output head, for tokens that have a label."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    target = shifted(batch["labels"], IGNORED)
    valid = target != IGNORED
    chosen = valid.flatten().nonzero().squeeze(1)[:LABEL_TOKENS]
    hidden_TH = seen[0].flatten(0, -2)[chosen]
    return HeadInput(hidden_TH, head.weight.detach(), target.flatten()[chosen], smoothing)


def check_formulations(given: HeadInput) -> Check:
    """The three formulations of the loss are one number."""
    logits = F.linear(given.hidden_TH.double(), given.weight_VH.double())
    values = [loss(logits, given.target_T, given.smoothing).item() for loss in FORMULATIONS]
    spread = (max(values) - min(values)) / abs(values[0])
    return Check("torch = LabelSmoother = smoothed one-hot, fp64", f"spread {spread:.1e}", "1e-12", spread <= 1e-12)


def heads() -> dict[str, Loss]:
    """Every head as a function of hidden states, weight and target."""

    def sharded(hidden, weight, target, epsilon):
        return vocab_parallel_cross_entropy(F.linear(hidden, weight), target, label_smoothing=epsilon)

    def fused(hidden, weight, target, epsilon):
        return vocab_parallel_linear_cross_entropy(hidden, weight, target, label_smoothing=epsilon)

    return {"fused": fused, "sharded": sharded}


def check_heads(given: HeadInput) -> list[Check]:
    """Loss and both gradients of each head against fp64, held to twice the plain method's own error."""
    truth = with_gradients(_plain, given, torch.float64)
    plain = [relative_error(x, y) for x, y in zip(with_gradients(_plain, given), truth, strict=True)]
    checks = []
    for name, head in heads().items():
        got = with_gradients(head, given)
        for part, x, y, allowed in zip(("loss", "grad hidden", "grad weight"), got, truth, plain, strict=True):
            deviation, bound = relative_error(x, y), 2 * allowed + 4 * torch.finfo(torch.float32).eps
            checks.append(
                Check(f"{name} head, {part}", f"{deviation:.1e} of fp64", f"{bound:.1e}", deviation <= bound)
            )
    return checks


def check_split(given: HeadInput, ranks: int) -> Check:
    """The vocabulary split over `ranks` real processes, on this batch, against fp64."""
    truth, *_ = with_gradients(_plain, given, torch.float64)
    logits = F.linear(given.hidden_TH, given.weight_VH).float().cpu()
    plain = relative_error(
        F.cross_entropy(logits, given.target_T.cpu(), label_smoothing=given.smoothing), truth.cpu()
    )
    try:
        losses, grad_error = simulate_split(logits, given.target_T.cpu(), given.smoothing, ranks)
    except RuntimeError as error:
        return Check(f"split over {ranks} ranks", str(error), "", False)
    deviation = max(relative_error(torch.tensor(loss, dtype=torch.float64), truth.cpu()) for loss in losses)
    bound = 2 * plain + 4 * torch.finfo(torch.float32).eps
    alike = len(set(losses)) == 1
    passed = alike and deviation <= bound and grad_error <= 1e-5
    figure = f"loss {deviation:.1e}, gradient {grad_error:.1e} of fp64; ranks {'identical' if alike else 'DIFFER'}"
    return Check(f"split over {ranks} ranks", figure, f"{bound:.1e}, 1e-5", passed)


def _plain(hidden, weight, target, epsilon):
    return F.cross_entropy(F.linear(hidden, weight), target, label_smoothing=epsilon)


def with_gradients(head, given: HeadInput, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    hidden = given.hidden_TH.detach().to(dtype or given.hidden_TH.dtype).requires_grad_()
    weight = given.weight_VH.detach().to(dtype or given.weight_VH.dtype).requires_grad_()
    loss = head(hidden, weight, given.target_T, given.smoothing)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((got.double() - truth).norm() / truth.norm()).item()
