"""Checks of the loss alone, on hidden states of a real batch, against fp64."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.data.examples.rows import IGNORED
from launch.preflight.split import simulate_split
from launch.preflight.table import Check
from smoothing import vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from smoothing.model.forward_state import shifted
from smoothing.reference import hf_label_smoother, onehot_cross_entropy, torch_cross_entropy

LABEL_TOKENS = 256  # compared with the reference; an fp64 gradient of a large vocabulary takes long
FORMULATIONS = (torch_cross_entropy, hf_label_smoother, onehot_cross_entropy)
Loss = Callable[[Tensor, Tensor, "HeadInput"], Tensor]  # of hidden states and weight


@dataclass(frozen=True)
class HeadInput:
    """The input of an output head: labelled tokens of a real batch. T tokens, H hidden, V vocabulary."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    smoothing: float
    prior_V: Tensor | None = None
    z_loss: float = 0.0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the losses."""
        return {"label_smoothing": self.smoothing, "smoothing_prior": self.prior_V, "z_loss": self.z_loss}


def capture_head_input(
    model, batch: dict[str, Tensor], label_smoothing: float, smoothing_prior: Tensor | None, z_loss: float
) -> HeadInput:
    """Run the model once and keep the input of its output head, for tokens that have a label."""
    captured = []
    lm_head = model.get_output_embeddings()
    handle = lm_head.register_forward_pre_hook(lambda _module, inputs: captured.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    target = shifted(batch["labels"], IGNORED)
    valid = target != IGNORED
    chosen = valid.flatten().nonzero().squeeze(1)[:LABEL_TOKENS]
    hidden_TH = captured[0].flatten(0, -2)[chosen]
    weight_VH, target_T = lm_head.weight.detach(), target.flatten()[chosen]
    return HeadInput(hidden_TH, weight_VH, target_T, label_smoothing, smoothing_prior, z_loss)


def check_formulations(head_input: HeadInput) -> Check:
    """Check that the three formulations of the loss give the same number, with a uniform prior."""
    logits = F.linear(head_input.hidden_TH.double(), head_input.weight_VH.double())
    values = [loss(logits, head_input.target_T, head_input.smoothing).item() for loss in FORMULATIONS]
    spread = (max(values) - min(values)) / abs(values[0])
    return Check("torch = LabelSmoother = smoothed one-hot, fp64", f"spread {spread:.1e}", "1e-12", spread <= 1e-12)


def head_losses() -> dict[str, Loss]:
    """The loss of each head as a function of hidden states and weight."""

    def sharded(hidden, weight, head_input):
        return vocab_parallel_cross_entropy(F.linear(hidden, weight), head_input.target_T, **head_input.options)

    def fused(hidden, weight, head_input):
        return vocab_parallel_linear_cross_entropy(hidden, weight, head_input.target_T, **head_input.options)

    return {"fused": fused, "sharded": sharded}


def check_heads(head_input: HeadInput) -> list[Check]:
    """Compare loss and gradients of each head with fp64; allow twice the error of the plain method."""
    truth = with_gradients(_plain, head_input, torch.float64)
    plain = [relative_error(x, y) for x, y in zip(with_gradients(_plain, head_input), truth, strict=True)]
    checks = []
    for name, loss in head_losses().items():
        got = with_gradients(loss, head_input)
        for part, x, y, allowed in zip(("loss", "grad hidden", "grad weight"), got, truth, plain, strict=True):
            deviation, bound = relative_error(x, y), 2 * allowed + 4 * torch.finfo(torch.float32).eps
            checks.append(
                Check(f"{name} head, {part}", f"{deviation:.1e} of fp64", f"{bound:.1e}", deviation <= bound)
            )
    return checks


def check_split(head_input: HeadInput, ranks: int) -> Check:
    """Compare the loss with the vocabulary split over `ranks` processes with fp64."""
    truth, *_ = with_gradients(_plain, head_input, torch.float64)
    logits = F.linear(head_input.hidden_TH, head_input.weight_VH).float()
    plain = relative_error(plain_loss(logits, head_input), truth)
    options = head_input.options
    if head_input.prior_V is not None:
        options["smoothing_prior"] = head_input.prior_V.cpu()
    try:
        losses, gradient = simulate_split(logits.cpu(), head_input.target_T.cpu(), options, ranks)
    except RuntimeError as error:
        return Check(f"split over {ranks} ranks", str(error), "", False)
    exact = logits.double().requires_grad_()
    (exact_gradient,) = torch.autograd.grad(plain_loss(exact, head_input), exact)
    grad_error = relative_error(gradient.to(exact.device), exact_gradient)
    deviation = max(relative_error(torch.tensor(loss, dtype=torch.float64), truth.cpu()) for loss in losses)
    bound = 2 * plain + 4 * torch.finfo(torch.float32).eps
    identical = len(set(losses)) == 1
    passed = identical and deviation <= bound and grad_error <= 1e-5
    figure = (
        f"loss {deviation:.1e}, gradient {grad_error:.1e} of fp64; ranks {'identical' if identical else 'DIFFER'}"
    )
    return Check(f"split over {ranks} ranks", figure, f"{bound:.1e}, 1e-5", passed)


def plain_loss(logits_TV: Tensor, head_input: HeadInput) -> Tensor:
    """The loss that the heads are held to, from logits in their dtype."""
    target_T, epsilon = head_input.target_T, head_input.smoothing
    if head_input.prior_V is None and not head_input.z_loss:
        return torch_cross_entropy(logits_TV, target_T, epsilon)
    return onehot_cross_entropy(logits_TV, target_T, epsilon, prior_V=head_input.prior_V, z_loss=head_input.z_loss)


def _plain(hidden, weight, head_input):
    return plain_loss(F.linear(hidden, weight), head_input)


def with_gradients(
    loss_function: Loss, head_input: HeadInput, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and its gradients of hidden states and weight, computed in `dtype`."""
    hidden = head_input.hidden_TH.detach().to(dtype or head_input.hidden_TH.dtype).requires_grad_()
    weight = head_input.weight_VH.detach().to(dtype or head_input.weight_VH.dtype).requires_grad_()
    loss = loss_function(hidden, weight, head_input)
    grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), grad_hidden, grad_weight


def relative_error(got: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((got.double() - truth).norm() / truth.norm()).item()
