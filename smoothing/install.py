"""Put a smoothed loss into a Hugging Face causal LM, or a DeepSpeed engine around one, by public hooks only."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smoothing.call import TokenStats
from smoothing.fused_head import FusedHead, fusable_softcap
from smoothing.gather import gather_logits
from smoothing.linear_loss import vocab_parallel_linear_cross_entropy
from smoothing.logits_loss import vocab_parallel_cross_entropy
from smoothing.options import LossOptions
from smoothing.shard import VocabShard

HEADS = ("fused", "sharded", "dense")
OnStats = Callable[[TokenStats], None]


def install_smoothed_loss(
    model: nn.Module,
    *,
    label_smoothing: float = 0.1,
    head: str = "fused",
    ignore_index: int = -100,
    smoothing_prior: Tensor | None = None,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    on_stats: OnStats | None = None,
    chunk_bytes: int | None = None,
) -> "InstalledLoss":
    """Replace `model.loss_function` by the smoothed loss; call it after `deepspeed.initialize`, or on a plain model.

    `head="fused"`: no logits are made where there are labels (`outputs.logits` is a placeholder then); the output
    head computes the loss, with the model's own softcap (`config.final_logit_softcapping`), `chunk_bytes` at a time.
    `head="sharded"`: the loss takes each rank's own logits, never gathered. `head="dense"`: logits are gathered and
    given to `F.cross_entropy`, the baseline to compare with. Smoothing (with its prior and z-loss) is how a model is
    trained: in evaluation mode the loss is the unsmoothed nll. `on_stats` is called with each forward's `TokenStats`.
    A forward without labels, as in `generate`, returns gathered logits.

    Returns the installed loss: `.remove()` undoes it, as does leaving it as a context manager. Raises `ValueError`
    for wrong options, a model without `loss_function`, or one that the fused head cannot serve (it scales its logits,
    or its head is no plain linear layer). Collectives: those of the loss; a forward without labels on a sharded head,
    two all-gathers.
    """
    options = LossOptions(label_smoothing, ignore_index, "mean", z_loss, logit_softcap)
    if fault := options.fault():
        raise ValueError(fault)
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}")
    model = without_engine(model)
    inside = causal_lm(model)
    if head == "fused":
        cap = fusable_softcap(inside, inside.get_output_embeddings(), logit_softcap)
        options = replace(options, logit_softcap=cap)
    wrapper = None if inside is model else model
    return InstalledLoss(inside, options, head, smoothing_prior, on_stats, chunk_bytes, wrapper)


def without_engine(model: nn.Module) -> nn.Module:
    """The model in a DeepSpeed engine; anything else as it is."""
    # by its type: an engine answers for any attribute of its module, but setting one there does not reach the module
    if not hasattr(type(model), "get_output_embeddings") and isinstance(getattr(model, "module", None), nn.Module):
        return model.module
    return model


def causal_lm(model: nn.Module) -> nn.Module:
    """The causal LM itself, perhaps inside a PEFT wrapper: what has `loss_function` and an output head."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not hasattr(model, "loss_function") or model.get_output_embeddings() is None:
        raise ValueError(
            "expected a Hugging Face causal LM (with loss_function and output embeddings) or a DeepSpeed engine "
            f"around one, got {type(model).__name__}"
        )
    return model


class InstalledLoss:
    """The loss in a model's place, and the way back."""

    def __init__(
        self,
        model: nn.Module,
        options: LossOptions,
        head: str,
        prior: Tensor | None,
        on_stats: OnStats | None,
        chunk_bytes: int | None,
        wrapper: nn.Module | None,
    ):
        self.model, self.options, self.head, self.prior, self.on_stats = model, options, head, prior, on_stats
        self.chunk_bytes = chunk_bytes
        output_head = model.get_output_embeddings()
        sharded = getattr(output_head, "is_vocab_parallel_lm_head", False)
        self.shard = VocabShard.of(output_head) if sharded else None
        self._has_labels = False
        self._own_loss = vars(model).get("_loss_function")
        # a PEFT wrapper calls the model's forward, not the model: its own hook is the one that runs then
        noted = [model] if wrapper is None else [model, wrapper]
        self._handles = [module.register_forward_pre_hook(self._note_labels, with_kwargs=True) for module in noted]
        self._fused = FusedHead(output_head, options.logit_softcap) if head == "fused" else None
        if self.shard is not None and self.shard.world_size > 1:
            self._handles.append(output_head.register_forward_hook(self._gather_unlabelled))
        model.loss_function = self

    def remove(self) -> None:
        """Put back the loss that the model had before."""
        for handle in self._handles:
            handle.remove()
        if self._fused is not None:
            self._fused.remove()
        if self._own_loss is not None:
            self.model.loss_function = self._own_loss
        else:
            with suppress(AttributeError):
                del self.model._loss_function

    def __enter__(self) -> "InstalledLoss":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def __call__(
        self, logits, labels=None, vocab_size=None, num_items_in_batch=None, shift_labels=None, **_
    ) -> Tensor:
        """What a Hugging Face causal LM calls: `logits` `[B, L, S]` predict the label one position on."""
        if self._fused is not None and (fused := self._fused.take(logits)) is not None:
            return fused
        target = shifted(labels, self.options.ignore_index) if shift_labels is None else shift_labels
        loss = self._dense_loss if self.head == "dense" else self._sharded_loss
        value, stats = loss(logits, target.to(logits.device), num_items_in_batch)
        if self.on_stats is not None:
            self.on_stats(stats)
        return value

    def _loss_from_hidden(self, hidden: Tensor, head: nn.Module, target: Tensor, num_items) -> Tensor:
        """What the fused head computes in place of logits. `hidden` `[B, L, H]`, `target` `[B, L]`."""
        value, stats = vocab_parallel_linear_cross_entropy(
            hidden,
            head.weight,
            target.to(hidden.device),
            self.shard,
            bias=head.bias,
            logit_softcap=self.options.logit_softcap,
            chunk_bytes=self.chunk_bytes,
            **self._loss_options(num_items),
        )
        if self.on_stats is not None:
            self.on_stats(stats)
        return value

    def _sharded_loss(self, logits: Tensor, target: Tensor, num_items) -> tuple[Tensor, TokenStats]:
        # a softcap that the fused head found in the model's configuration is in the logits already
        cap = None if self._fused is not None else self.options.logit_softcap
        return vocab_parallel_cross_entropy(
            logits, target, self.shard, logit_softcap=cap, **self._loss_options(num_items)
        )

    def _loss_options(self, num_items) -> dict:
        options, training = self.options, self.model.training
        return {
            "label_smoothing": options.label_smoothing if training else 0.0,
            "ignore_index": options.ignore_index,
            "num_items_in_batch": num_items,
            "smoothing_prior": self.prior if training else None,
            "z_loss": options.z_loss if training else 0.0,
            "return_stats": True,
        }

    def _dense_loss(self, logits: Tensor, target: Tensor, num_items) -> tuple[Tensor, TokenStats]:
        if self.prior is not None or self.options.z_loss > 0 or self.options.logit_softcap is not None:
            raise ValueError("head='dense' is F.cross_entropy: it has no smoothing_prior, z_loss or logit_softcap")
        if self.shard is not None:
            logits = gather_logits(logits, self.shard)
        flat_TV, target_T = logits.flatten(0, -2).float(), target.flatten()
        ignore = self.options.ignore_index
        epsilon = self.options.label_smoothing if self.model.training else 0.0
        loss_sum = F.cross_entropy(flat_TV, target_T, ignore_index=ignore, label_smoothing=epsilon, reduction="sum")
        valid_T = target_T != ignore
        items = valid_T.sum() if num_items is None else torch.as_tensor(num_items, device=logits.device)
        return loss_sum / items.clamp(min=1), self._dense_stats(flat_TV.detach(), target_T, valid_T, target.shape)

    @staticmethod
    def _dense_stats(flat_TV: Tensor, target_T: Tensor, valid_T: Tensor, shape: torch.Size) -> TokenStats:
        lse_T, max_T = flat_TV.logsumexp(1), flat_TV.amax(1)
        label_T = flat_TV.gather(1, target_T.where(valid_T, 0).unsqueeze(1)).squeeze(1)
        per_token = (lse_T - label_T, lse_T, (max_T - lse_T).exp())
        correct = (valid_T & (label_T == max_T)).view(shape)
        return TokenStats(*(x.where(valid_T, 0.0).view(shape) for x in per_token), correct, valid_T.view(shape))

    def _note_labels(self, _module, args, kwargs) -> None:
        labels, target = kwargs.get("labels"), kwargs.get("shift_labels")
        if labels is None and len(args) > 6:  # labels is the seventh positional argument of every HF causal LM
            labels = args[6]
        self._has_labels = labels is not None or target is not None
        if self._fused is None:
            return
        self._fused.loss = None
        if self._has_labels:
            target = shifted(labels, self.options.ignore_index) if target is None else target
            num_items = kwargs.get("num_items_in_batch")
            self._fused.loss = partial(self._loss_from_hidden, target=target, num_items=num_items)

    def _gather_unlabelled(self, _module, _args, logits: Tensor) -> Tensor | None:
        return None if self._has_labels else gather_logits(logits, self.shard)


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """Labels `[B, L]` as targets: position i is to predict label i+1, the last one nothing."""
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
