"""What logits in bf16 cost the gradient of the head's weight, emulated on a CPU: products of bf16 factors in fp32.

    python benchmarks/bf16_logits.py

The error against fp64, relative, of `grad_W = (softmax(z) - onehot)ᵀ h / T`, whose left factor and result are rounded
to bf16: for weights of two sizes, and labels that the model draws, thinks best, or that are random. Prints a table.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

SIZES = (0.2, 0.4)  # standard deviation of the weight's numbers; hidden states have 1
LABELS = ("own", "best", "random")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--hidden", type=int, default=256)
    args = parser.parse_args()
    cases = [case(args, size, labels) for size in SIZES for labels in LABELS]
    print("| logits | " + " | ".join(f"{size:g} {labels}" for size in SIZES for labels in LABELS) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for name, gradient in GRADIENTS.items():
        print(f"| {name} | " + " | ".join(f"{error(gradient, *given):.1e}" for given in cases) + " |")


def case(args: argparse.Namespace, size: float, labels: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states and weight in bf16, and the labels."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(args.tokens, args.hidden, generator=generator).bfloat16()
    weight = (size * torch.randn(args.vocab, args.hidden, generator=generator)).bfloat16()
    logits = hidden.float() @ weight.float().T
    if labels == "own":
        target = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    elif labels == "best":
        target = logits.argmax(-1)
    else:
        target = torch.randint(args.vocab, (args.tokens,), generator=generator)
    return hidden, weight, target


def error(gradient, hidden: Tensor, weight: Tensor, target: Tensor) -> float:
    truth = of_logits(hidden.double() @ weight.double().T, hidden.double(), target)
    return float((gradient(hidden, weight, target).double() - truth).norm() / truth.norm())


def of_logits(logits: Tensor, hidden: Tensor, target: Tensor) -> Tensor:
    """Return the gradient of the weight; its left factor and itself are rounded to bf16, in fp64 nothing is."""
    grad = logits.softmax(-1)
    grad[torch.arange(len(target)), target] -= 1
    grad /= len(target)
    if grad.dtype == torch.float64:
        return grad.T @ hidden
    return (grad.bfloat16().float().T @ hidden.float()).bfloat16()


def fp32(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return of_logits(hidden.float() @ weight.float().T, hidden, target)


def bf16(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return of_logits((hidden.float() @ weight.float().T).bfloat16().float(), hidden, target)


def shifted(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = hidden.float() @ weight.float().T
    return of_logits((logits - logits.gather(1, target[:, None])).bfloat16().float(), hidden, target)


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    weight = weight.detach().requires_grad_()
    F.cross_entropy(F.linear(hidden, weight), target).backward()
    return weight.grad


GRADIENTS = {
    "fp32 (`fp32_logits=True`)": fp32,
    "bf16 (the default, and what `F.linear` gives)": bf16,
    "bf16, rounded after the label's logit was subtracted (not implemented)": shifted,
    "`F.linear` + `F.cross_entropy` in bf16": plain,
}

if __name__ == "__main__":
    main()
