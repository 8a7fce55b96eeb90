"""A loss while it is installed: in the place of a model's `loss_function`, its `forward`, and its output head's."""

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from smoothing.core.call import TokenStats
from smoothing.core.options import LossOptions
from smoothing.linear_loss import vocab_parallel_linear_cross_entropy
from smoothing.logits_loss import vocab_parallel_cross_entropy
from smoothing.model.dense_loss import dense_cross_entropy
from smoothing.model.forward_state import Gives, Labels, Turn
from smoothing.model.output_head import OutputHead
from smoothing.model.support import UnsupportedModel, is_sharded, own_softcap
from smoothing.shard import VocabShard

OnStats = Callable[[TokenStats], None]
OWN_LOSS = (
    "this model computes its loss itself, not by its loss_function, so that none can be installed in its place; take "
    "its logits and smoothing.vocab_parallel_cross_entropy"
)


@dataclass(frozen=True)
class Installation:
    """What was asked of `install_smoothed_loss`, which documents it."""

    options: LossOptions
    head: str
    prior: Tensor | None
    on_stats: OnStats | None
    chunk_bytes: int | None
    logits_in_eval: bool


class InstalledLoss:
    """A causal LM's `loss_function`, and the way back to its own."""

    def __init__(self, model: nn.Module, asked: Installation):
        self.model, self.asked = model, asked
        head = model.get_output_embeddings()
        self.shard = VocabShard.of(head) if is_sharded(head) else None
        self._head = OutputHead(head, self.shard, own_softcap(model))
        self._own_loss = vars(model).get("_loss_function")
        self._own_forward = vars(model).get("forward")
        self._forward = _Forward(model, self._with_its_loss)
        model.forward = self._forward
        model.loss_function = self
        self._installed = True

    def remove(self) -> None:
        """Put back the loss that the model had before; the second time, nothing is done."""
        if not self._installed:
            return
        self._installed = False
        self._head.remove()
        if vars(self.model).get("forward") is self._forward:  # else another wrapped it: it passes through from now on
            del self.model.forward
            if self._own_forward is not None:
                self.model.forward = self._own_forward
        with suppress(AttributeError):
            del self.model._loss_function
        if self._own_loss is not None:
            self.model.loss_function = self._own_loss

    def __enter__(self) -> "InstalledLoss":
        return self

    def __exit__(self, *_) -> None:
        self.remove()

    def __call__(
        self, logits, labels=None, vocab_size=None, num_items_in_batch=None, shift_labels=None, **_
    ) -> Tensor:
        """What a Hugging Face causal LM calls: `logits` `[B, L, S]` predict the label one position on."""
        self._head.turn.loss_asked = True
        if self._head.turn.placeholder is not None:
            self._check_vocabulary(vocab_size)
            self._check_labels(Labels(labels, shift_labels, num_items_in_batch))
            return self._head.loss_behind(logits)
        target = Labels(labels, shift_labels).target(self.asked.options.ignore_index).to(logits.device)
        options = self._options(num_items_in_batch)
        if self.asked.head == "dense":
            value, stats = dense_cross_entropy(logits, target, **options)
        else:
            # the model's own softcap is in its logits already
            cap = self.asked.options.logit_softcap if self._head.softcap is None else None
            whole = self.shard is None or logits.shape[-1] == self.shard.vocab_size
            options |= self._extras() | {"logit_softcap": cap, "return_stats": True}
            value, stats = vocab_parallel_cross_entropy(logits, target, None if whole else self.shard, **options)
        self._tell(stats)
        return value

    def _with_its_loss(self, forward: Callable, given: dict, *args, **kwargs):
        """The model's forward `forward(*args, **kwargs)`, whose arguments by name are `given`."""
        if not self._installed:
            return forward(*args, **kwargs)
        turn = self._turn(Labels.of(given), given.get("label_tokens"))
        try:
            with self._head.giving(turn):
                outputs = forward(*args, **kwargs)
        except Exception as fault:
            if turn.placeholder is None or turn.loss_asked or isinstance(fault, UnsupportedModel):
                raise
            raise UnsupportedModel(OWN_LOSS) from fault  # it took the placeholder for logits
        if turn.labels.given and not turn.loss_asked:
            raise UnsupportedModel(OWN_LOSS)
        return outputs if turn.placeholder is None else _without_logits(outputs)

    def _turn(self, labels: Labels, label_tokens: int | None) -> Turn:
        """What the head is to give in a forward with these labels."""
        evaluation = not self.model.training and not torch.is_grad_enabled()
        if not labels.given or self.asked.head == "dense" or (evaluation and self.asked.logits_in_eval):
            return Turn(Gives.ALL_LOGITS, labels)
        if self.asked.head == "sharded":
            return Turn(Gives.OWN_LOGITS, labels)
        target = labels.target(self.asked.options.ignore_index)
        asked = {"target": target, "num_items": labels.num_items_in_batch, "label_tokens": label_tokens}
        return Turn(Gives.LOSS, labels, functools.partial(self._loss_from_hidden, **asked))

    def _loss_from_hidden(self, hidden: Tensor, head: nn.Module, target: Tensor, num_items, label_tokens) -> Tensor:
        """What the head computes in place of logits. `hidden` `[B, L, H]`, `target` `[B, L]`."""
        value, stats = vocab_parallel_linear_cross_entropy(
            hidden,
            head.weight,
            target.to(hidden.device),
            self.shard,
            bias=head.bias,
            logit_softcap=self.asked.options.logit_softcap,
            chunk_bytes=self.asked.chunk_bytes,
            label_tokens=label_tokens,
            return_stats=True,
            **self._options(num_items),
            **self._extras(),
        )
        self._tell(stats)
        return value

    def _options(self, num_items) -> dict:
        """What every loss is told; smoothed only where the model trains."""
        options = self.asked.options
        return {
            "label_smoothing": options.label_smoothing if self.model.training else 0.0,
            "ignore_index": options.ignore_index,
            "num_items_in_batch": num_items,
        }

    def _extras(self) -> dict:
        """What `F.cross_entropy` does not have, and evaluation neither."""
        training = self.model.training
        return {
            "smoothing_prior": self.asked.prior if training else None,
            "z_loss": self.asked.options.z_loss if training else 0.0,
        }

    def _tell(self, stats: TokenStats) -> None:
        if self.asked.on_stats is not None:
            self.asked.on_stats(stats)

    def _check_vocabulary(self, vocab_size: int | None) -> None:
        held = self._head.head.out_features if self.shard is None else self.shard.vocab_size
        if vocab_size is not None and vocab_size != held:
            raise UnsupportedModel(
                f"this model takes its loss over {vocab_size} of its head's {held} logits, which head='fused' does "
                "not; use head='sharded', without tensor parallelism"
            )

    def _check_labels(self, asked: Labels) -> None:
        """The head has computed the loss of the labels that the model was given: hold them to those asked for."""
        if not asked.same(self._head.turn.labels, self.asked.options.ignore_index):
            raise UnsupportedModel(
                "this model takes its loss of other labels than it was given, or divides it by another number, which "
                "head='fused' does not; use head='sharded'"
            )


class _Forward:
    """A model's `forward` while a loss is installed. An object, so that a deep copy of the model is whole."""

    def __init__(self, model: nn.Module, around: Callable):
        self.plain, self.around = model.forward, around
        functools.update_wrapper(self, self.plain)  # with the signature, which Trainer and generate read
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]

    def __call__(self, *args, **kwargs):
        given = dict(zip(self.names, args, strict=False)) | kwargs
        kwargs.pop("label_tokens", None)  # for the loss alone: no model knows it
        return self.around(self.plain, given, *args, **kwargs)


def _without_logits(outputs):
    """A model's outputs with None in place of the placeholder, so that nobody takes it for logits."""
    if isinstance(outputs, tuple):
        return outputs[0], None, *outputs[2:]
    return replace(outputs, logits=None) if getattr(outputs, "logits", None) is not None else outputs
