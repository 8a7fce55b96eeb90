"""Checks of the run's own model and batch: label mask, installed loss, packed rows, and whether it can learn."""

from typing import Any

import torch
from torch import Tensor

from launch.config.options import SftOptions
from launch.data.batches import PadToLongest
from launch.data.examples.rows import IGNORED
from launch.data.packing import PadPacked
from launch.model.packed_rows import distinct_tokens, leak_problem, packing_problem, takes_bounds
from launch.preflight.table import Check
from smoothing import UnsupportedModel, install_smoothed_loss
from smoothing.install import HEADS
from smoothing.model.forward_state import shifted
from smoothing.reference import onehot_cross_entropy

OVERFIT_STEPS = 20  # at each rate, until the nll is halved
OVERFIT_RATES = (1e-4, 1e-3, 5e-3)  # a model with random weights uses the last alone
ADAPTER_RATES = (1e-3, 1e-2, 5e-2)
OVERFIT_PARAMETERS = 300_000_000


def check_mask(batch: dict[str, Tensor]) -> Check:
    """Check that every row has labels, that labels repeat the input ids, and that padding has none."""
    labels, ids, real = batch["labels"], batch["input_ids"], batch["attention_mask"].bool()
    learned = labels != IGNORED
    right = bool(learned[:, 1:].any(1).all()) and bool((labels[learned] == ids[learned]).all())
    right = right and not bool(learned[~real].any())
    share = learned.sum().item() / real.sum().item()
    return Check("label mask", f"{share:.0%} of {real.sum().item():,} tokens are learned", "every row some", right)


def check_installed(model, batch: dict[str, Tensor], options: SftOptions, settings: dict[str, Any]) -> list[Check]:
    """Compare the model's loss with each head installed with the reference on its own logits.

    `settings`: those of the loss (`loss_settings`).
    """
    checks = []
    model.train()
    torch.manual_seed(0)  # here and below: the same dropout masks, if the model has dropout
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    target = shifted(batch["labels"], IGNORED).flatten()
    labelled = target != IGNORED  # fp64 logits of all positions may take more memory than the run ever does
    prior, z_loss = settings["smoothing_prior"], settings["z_loss"]
    exact = logits.flatten(0, 1)[labelled].double()
    truth = onehot_cross_entropy(exact, target[labelled], options.smoothing, prior_V=prior, z_loss=z_loss).item()
    tolerance = 1e-5 if logits.dtype == torch.float32 else 1e-2
    for head in HEADS:
        if head == "dense" and (prior is not None or z_loss):
            checks.append(Check("model with the dense head", "has no smoothing prior and no z-loss"))
            continue
        torch.manual_seed(0)
        try:
            with install_smoothed_loss(model, **settings, head=head), torch.no_grad():
                loss = model(**batch).loss.item()
        except UnsupportedModel as error:
            checks.append(
                Check(f"model with the {head} head", str(error), "", False if head == options.head else None)
            )
            continue
        difference = abs(loss - truth) / abs(truth)
        figure = f"loss {loss:.6f}, reference {truth:.6f}"
        checks.append(Check(f"model with the {head} head", figure, f"{tolerance:.0e}", difference <= tolerance))
    return checks


def check_packed_rows(model, tokenizer, ids: list[int], device: torch.device) -> Check:
    """Check that the model keeps packed rows apart, which `--packing` needs."""
    collate = PadPacked(PadToLongest(tokenizer.pad_token_id), takes_bounds(model))
    tokens = distinct_tokens(ids, tokenizer)
    problem = packing_problem(model) or leak_problem(model, type(model).__name__, collate, tokens, device)
    return Check("packed rows", problem or "a change of one leaves the others as they are", "identical", not problem)


def check_overfit(model, batch: dict[str, Tensor], options: SftOptions, settings: dict[str, Any]) -> Check:
    """Train some steps on one batch: the nll must fall by half, with adapters by a tenth (few weights learn slower).

    A large model trains its last layers only.
    """
    chosen: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    count = 0
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        count += parameter.numel()
        (others if chosen and count > OVERFIT_PARAMETERS else chosen).append(parameter)
    for parameter in others:
        parameter.requires_grad_(False)
    rates = OVERFIT_RATES if options.model is not None else OVERFIT_RATES[-1:]
    if options.lora_rank:
        rates = ADAPTER_RATES
    bound, words = (0.9, "a tenth less") if options.lora_rank else (0.5, "half")
    nll = []

    def record_nll(stats) -> None:
        nll.append((stats.nll.sum() / stats.valid.sum()).item())

    model.train()
    with install_smoothed_loss(model, **settings, head=options.head, on_stats=record_nll):
        for rate in rates:
            optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
            for _ in range(OVERFIT_STEPS):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if nll[-1] < bound * nll[0]:
                break
    for parameter in others:
        parameter.requires_grad_()
    figure = f"nll {nll[0]:.3f} -> {nll[-1]:.3f} in {len(nll)} steps"
    return Check("overfits one batch", figure, words, nll[-1] < bound * nll[0])
