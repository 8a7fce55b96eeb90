"""python launch/sft.py --sanity: prove a run on one device before it is started on many.

Each check is a row of one table, with the figure that it was judged by.
"""

import platform
import time
from dataclasses import dataclass

import deepspeed
import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from launch.common.errors import UserError
from launch.config.deepspeed import deepspeed_config
from launch.config.options import SftOptions
from launch.config.training_arguments import SftTrainingArguments, check_loss_scale
from launch.data.batches import PadToLongest
from launch.data.load import load_data
from launch.model.load import load_model
from launch.preflight.memory import Setup, estimate
from launch.preflight.split import simulate_split
from launch.process.device import uses_gpu
from launch.process.ranks import say, world_size
from smoothing import (
    UnsupportedModel,
    install_smoothed_loss,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from smoothing.install import HEADS
from smoothing.model.forward_state import shifted
from smoothing.reference import hf_label_smoother, onehot_cross_entropy, torch_cross_entropy

LABEL_TOKENS = 256  # compared with the reference; an fp64 gradient of a large vocabulary takes its time
MOST_ROWS = 8
OVERFIT_STEPS = 20  # at each rate, until the nll is halved
OVERFIT_RATES = (1e-4, 1e-3, 5e-3)  # the last alone for a model of random weights
OVERFIT_PARAMETERS = 300_000_000
FORMULATIONS = (torch_cross_entropy, hf_label_smoother, onehot_cross_entropy)


@dataclass(frozen=True)
class Check:
    """One row of the table; `passed` None: nothing to judge, only to know."""

    name: str
    figure: str
    bound: str = ""
    passed: bool | None = None


@dataclass(frozen=True)
class HeadInput:
    """What a head computes the loss from: label tokens of a real batch. T tokens, H hidden, V vocabulary."""

    hidden_TH: Tensor
    weight_VH: Tensor
    target_T: Tensor
    smoothing: float


def check_run(options: SftOptions, training_values: dict) -> int:
    """Run all checks on this process's device, print the table, and return the exit status: 1 if any failed."""
    if world_size() > 1:
        raise UserError(f"--sanity runs on one device, but {world_size()} processes were started; start one")
    start = time.monotonic()
    options, config = deepspeed_config(options, training_values.get("deepspeed"), None)
    stage = config["zero_optimization"]["stage"]
    check_loss_scale(training_values.get("fp16", False), stage)
    device = torch.device("cuda" if uses_gpu() else "cpu")
    say(hardware(device))
    tokenizer, data = load_data(options)
    dtype = torch.bfloat16 if training_values.get("bf16") else torch.float32
    model = load_model(options, tokenizer, dtype, training_values.get("seed", 42)).to(device)
    rows = data.train.select(range(min(len(data.train), MOST_ROWS, micro_batch(training_values))))
    batch = PadToLongest(tokenizer.pad_token_id)(list(rows))
    batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    head_input = capture_head_input(model, batch, options.smoothing)
    checks = [
        check_mask(batch),
        check_formulations(head_input),
        *check_heads(head_input),
        *check_installed(model, batch, options),
        check_split(head_input, max(2, options.tp)),
        check_overfit(model, batch, options),
        *memory_rows(model, options, training_values, stage),
        Check("time", f"{time.monotonic() - start:.0f} s"),
    ]
    show(checks)
    return int(any(check.passed is False for check in checks))


def micro_batch(training_values: dict) -> int:
    return training_values.get("per_device_train_batch_size", SftTrainingArguments.per_device_train_batch_size)


def hardware(device: torch.device) -> str:
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return (
        f"{name}; Python {platform.python_version()}, torch {torch.__version__}, "
        f"deepspeed {deepspeed.__version__}, transformers {transformers.__version__}"
    )


def capture_head_input(model, batch: dict[str, Tensor], smoothing: float) -> HeadInput:
    """Run the body once and keep what reaches the output head, for tokens that have a label."""
    seen = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].detach()))
    with torch.no_grad():
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    target = shifted(batch["labels"], -100)
    valid = target != -100
    chosen = valid.flatten().nonzero().squeeze(1)[:LABEL_TOKENS]
    hidden_TH = seen[0].flatten(0, -2)[chosen]
    return HeadInput(hidden_TH, head.weight.detach(), target.flatten()[chosen], smoothing)


def check_mask(batch: dict[str, Tensor]) -> Check:
    labels, ids, real = batch["labels"], batch["input_ids"], batch["attention_mask"].bool()
    learned = labels != -100
    right = bool(learned[:, 1:].any(1).all()) and bool((labels[learned] == ids[learned]).all())
    right = right and not bool(learned[~real].any())
    share = learned.sum().item() / real.sum().item()
    return Check("label mask", f"{share:.0%} of {real.sum().item():,} tokens are learned", "every row some", right)


def check_formulations(given: HeadInput) -> Check:
    """The three formulations of the loss are one number."""
    logits = F.linear(given.hidden_TH.double(), given.weight_VH.double())
    values = [loss(logits, given.target_T, given.smoothing).item() for loss in FORMULATIONS]
    spread = (max(values) - min(values)) / abs(values[0])
    return Check("torch = LabelSmoother = smoothed one-hot, fp64", f"spread {spread:.1e}", "1e-12", spread <= 1e-12)


def heads() -> dict:
    """Every head as a function of hidden states, weight and target."""

    def sharded(hidden, weight, target, epsilon):
        return vocab_parallel_cross_entropy(F.linear(hidden, weight), target, label_smoothing=epsilon)

    def fused(hidden, weight, target, epsilon):
        return vocab_parallel_linear_cross_entropy(hidden, weight, target, label_smoothing=epsilon)

    return {"fused": fused, "sharded": sharded}


def check_heads(given: HeadInput) -> list[Check]:
    """Loss and both gradients of each head against fp64, held to twice the plain method's own error."""
    truth = _with_gradients(_plain, given, torch.float64)
    plain = [_error(x, y) for x, y in zip(_with_gradients(_plain, given), truth, strict=True)]
    checks = []
    for name, head in heads().items():
        got = _with_gradients(head, given)
        for part, x, y, allowed in zip(("loss", "grad hidden", "grad weight"), got, truth, plain, strict=True):
            error, bound = _error(x, y), 2 * allowed + 4 * torch.finfo(torch.float32).eps
            checks.append(Check(f"{name} head, {part}", f"{error:.1e} of fp64", f"{bound:.1e}", error <= bound))
    return checks


def check_installed(model, batch: dict[str, Tensor], options: SftOptions) -> list[Check]:
    """The model with each loss installed says what the reference says of its own logits."""
    checks = []
    model.train()
    torch.manual_seed(0)  # here and below: the same dropout masks, where a model has dropout
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    target = shifted(batch["labels"], -100).flatten()
    labelled = target != -100  # logits of all positions in fp64 may be more than a run ever holds
    truth = torch_cross_entropy(logits.flatten(0, 1)[labelled].double(), target[labelled], options.smoothing).item()
    tolerance = 1e-5 if logits.dtype == torch.float32 else 1e-2
    for head in HEADS:
        torch.manual_seed(0)
        try:
            with install_smoothed_loss(model, label_smoothing=options.smoothing, head=head), torch.no_grad():
                loss = model(**batch).loss.item()
        except UnsupportedModel as fault:
            checks.append(
                Check(f"model with the {head} head", str(fault), "", False if head == options.head else None)
            )
            continue
        error = abs(loss - truth) / abs(truth)
        figure = f"loss {loss:.6f}, reference {truth:.6f}"
        checks.append(Check(f"model with the {head} head", figure, f"{tolerance:.0e}", error <= tolerance))
    return checks


def check_split(given: HeadInput, ranks: int) -> Check:
    """The vocabulary split over `ranks` real processes, on this batch, against fp64."""
    truth, *_ = _with_gradients(_plain, given, torch.float64)
    logits = F.linear(given.hidden_TH, given.weight_VH).float().cpu()
    plain = _error(F.cross_entropy(logits, given.target_T.cpu(), label_smoothing=given.smoothing), truth.cpu())
    try:
        losses, grad_error = simulate_split(logits, given.target_T.cpu(), given.smoothing, ranks)
    except RuntimeError as fault:
        return Check(f"split over {ranks} ranks", str(fault), "", False)
    error = max(_error(torch.tensor(loss, dtype=torch.float64), truth.cpu()) for loss in losses)
    bound = 2 * plain + 4 * torch.finfo(torch.float32).eps
    alike = len(set(losses)) == 1
    passed = alike and error <= bound and grad_error <= 1e-5
    figure = f"loss {error:.1e}, gradient {grad_error:.1e} of fp64; ranks {'identical' if alike else 'DIFFER'}"
    return Check(f"split over {ranks} ranks", figure, f"{bound:.1e}, 1e-5", passed)


def check_overfit(model, batch: dict[str, Tensor], options: SftOptions) -> Check:
    """Some steps on one batch: the nll must fall by half. The last layers only, where a model is large."""
    chosen, count = [], 0
    for parameter in reversed(list(model.parameters())):
        count += parameter.numel()
        if chosen and count > OVERFIT_PARAMETERS:
            parameter.requires_grad_(False)
        else:
            chosen.append(parameter)
    rates = OVERFIT_RATES if options.model is not None else OVERFIT_RATES[-1:]
    nll = []

    def note(stats) -> None:
        nll.append((stats.nll.sum() / stats.valid.sum()).item())

    model.train()
    with install_smoothed_loss(model, label_smoothing=options.smoothing, head=options.head, on_stats=note):
        for rate in rates:
            optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
            for _ in range(OVERFIT_STEPS):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            if nll[-1] < nll[0] / 2:
                break
    figure = f"nll {nll[0]:.3f} -> {nll[-1]:.3f} in {len(nll)} steps"
    return Check("overfits one batch", figure, "half", nll[-1] < nll[0] / 2)


def memory_rows(model, options: SftOptions, training_values: dict, stage: int) -> list[Check]:
    """The estimate for the full run, for one and for eight data-parallel ranks."""
    config = model.config.get_text_config()
    rows = micro_batch(training_values)
    checks = []
    for data_parallel in (1, 8):
        setup = Setup(
            parameters=sum(p.numel() for p in model.parameters()),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            vocab=config.vocab_size,
            tokens=rows * options.max_length,
            tensor_parallel=options.tp,
            data_parallel=data_parallel,
            zero=stage,
            offload=options.offload,
            low_precision=bool(training_values.get("bf16") or training_values.get("fp16")),
            checkpointing=bool(training_values.get("gradient_checkpointing")),
            head=options.head,
            chunk_bytes=options.chunk_bytes,
            device=uses_gpu(),
        )
        parts = estimate(setup)
        figure = ", ".join(f"{name} {size:.2f}" for name, size in parts.items())
        checks.append(Check(f"memory a rank (estimate), GiB, tp {options.tp} x dp {data_parallel}", figure))
    return checks


def show(checks: list[Check]) -> None:
    table = Table(title="sanity")
    for column in ("check", "", "figure", "bound"):
        table.add_column(column, overflow="fold")
    verdicts = {True: "[green]pass", False: "[bold red]FAIL", None: ""}
    for check in checks:
        table.add_row(check.name, verdicts[check.passed], check.figure, check.bound)
    Console(width=None if Console().is_terminal else 150).print(table)


def _plain(hidden, weight, target, epsilon):
    return F.cross_entropy(F.linear(hidden, weight), target, label_smoothing=epsilon)


def _with_gradients(head, given: HeadInput, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    hidden = given.hidden_TH.detach().to(dtype or given.hidden_TH.dtype).requires_grad_()
    weight = given.weight_VH.detach().to(dtype or given.weight_VH.dtype).requires_grad_()
    loss = head(hidden, weight, given.target_T, given.smoothing)
    return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def _error(got: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return ((got.double() - truth).norm() / truth.norm()).item()
