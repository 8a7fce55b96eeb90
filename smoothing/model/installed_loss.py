"""A loss while it is installed: in the place of a model's `loss_function`, its `forward`, and its output head's."""

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from smoothing.calibration.numbers import TokenNumbers, linear_token_numbers, token_numbers
from smoothing.core.call import TokenStats
from smoothing.core.dtensor import is_dtensor, local_head, local_logits
from smoothing.core.options import LossOptions
from smoothing.linear_loss import vocab_parallel_linear_cross_entropy
from smoothing.logits_loss import vocab_parallel_cross_entropy
from smoothing.model.dense_loss import dense_cross_entropy
from smoothing.model.forward_state import ForwardState, Gives, Labels
from smoothing.model.gather_logits import gather_logits
from smoothing.model.head_weight import acting_head, is_sharded, linear_map
from smoothing.model.output_head import OutputHead, Untraced
from smoothing.model.support import UnsupportedModel, own_scale, own_softcap, text_config
from smoothing.shard import VocabShard

OnStats = Callable[[TokenStats], None]
OWN_LOSS = (
    "this model computes its loss itself, not by its loss_function, so no other loss can be installed; pass its "
    "logits to smoothing.vocab_parallel_cross_entropy instead"
)
TRL_LOSS = (
    "TRL's trainers ask the model for a loss of their own (fused_lm_head): take smoothing.trl.SmoothedSFTTrainer in "
    "the place of SFTTrainer, which installs the loss itself"
)


@dataclass(frozen=True)
class Installation:
    """The arguments of `install_smoothed_loss`, which documents them."""

    options: LossOptions
    head: str
    prior: Tensor | None
    on_stats: OnStats | None
    chunk_bytes: int | None
    logits_in_eval: bool


class InstalledLoss:
    """The smoothed loss in the place of a causal LM's `loss_function`, until `remove`; also a context manager.

    `install_smoothed_loss` makes it. A model calls it with its logits and labels, as it calls any `loss_function`.
    """

    def __init__(self, model: Any, settings: Installation):
        self.model, self.settings = model, settings
        lm_head = acting_head(model)
        self.shard = VocabShard.of(lm_head) if is_sharded(lm_head) else None
        self._lm_head = OutputHead(lm_head, self.shard, own_scale(model), own_softcap(model))
        self._own_loss = vars(model).get("_loss_function")
        self._own_forward = vars(model).get("forward")
        self._forward = _Forward(model, self._with_its_loss)
        model.forward = self._forward
        model.loss_function = self
        self._untraced_loss = Untraced(self._loss)
        self._installed, self.called = True, False
        self.logits_in_eval = settings.logits_in_eval
        # called with the numbers of each forward's tokens; the fused head computes its logits once more for them
        self.on_numbers: Callable[[TokenNumbers], None] | None = None

    def remove(self) -> None:
        """Put back the loss that the model had before; the second time, nothing is done."""
        if not self._installed:
            return
        self._installed = False
        self._lm_head.remove()
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

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the loss of `_loss`, which has a model's arguments, as `torch.compile` is to call it."""
        value: Tensor = self._untraced_loss(*args, **kwargs)
        return value

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """What a Hugging Face causal LM calls: `logits` `[B, L, S]` predict the label one position on."""
        self._lm_head.forward_state.loss_called = self.called = True
        vocab_size = self._vocab_size if vocab_size is None else vocab_size
        if self._lm_head.forward_state.placeholder is not None:
            self._check_vocabulary(vocab_size)
            self._check_labels(Labels(labels, shift_labels, num_items_in_batch))
            return self._lm_head.loss_behind(logits)
        options, dense = self.settings.options, self.settings.head == "dense"
        target = Labels(labels, shift_labels).target(options.ignore_index).to(logits.device)
        kwargs = self._common_kwargs(num_items_in_batch)
        shard = self._shard_of(logits, vocab_size)
        if dense:
            if shard is not None:
                logits = gather_logits(logits, shard)
            whole: Any = logits
            value, stats = dense_cross_entropy(whole.full_tensor() if is_dtensor(whole) else whole, target, **kwargs)
        else:
            # the model's own scale and softcap are in its logits already
            cap = options.logit_softcap if self._lm_head.softcap is None else None
            scale = options.logit_scale if self._lm_head.scale == 1 else 1.0
            kwargs |= self._extra_kwargs(self._lm_head.forward_state.shard if is_dtensor(logits) else shard)
            kwargs |= {"logit_softcap": cap, "logit_scale": scale, "return_stats": True}
            value, stats = vocab_parallel_cross_entropy(logits, target, shard, **kwargs)
        self._report(stats)
        if self.on_numbers is not None:
            own, target, _, shard = local_logits(logits, target, None, shard)
            cap = kwargs.get("logit_softcap")
            scaled = own.detach() * kwargs.get("logit_scale", 1.0)
            self.on_numbers(
                token_numbers(scaled, target, shard, ignore_index=options.ignore_index, logit_softcap=cap)
            )
        return value

    def _with_its_loss(self, forward: Callable[..., Any], given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's forward `forward(*args, **kwargs)`, whose arguments by name are `given`."""
        if not self._installed:
            return forward(*args, **kwargs)
        if given.get("fused_lm_head"):
            raise UnsupportedModel(TRL_LOSS)
        state = self._forward_state(Labels.of(given), given.get("label_tokens"))
        try:
            with self._lm_head.giving(state):
                outputs = forward(*args, **kwargs)
        except Exception as error:
            if state.placeholder is None or state.loss_called or isinstance(error, UnsupportedModel):
                raise
            raise UnsupportedModel(OWN_LOSS) from error  # it took the placeholder for logits
        if state.labels.given and not state.loss_called:
            raise UnsupportedModel(OWN_LOSS)
        return outputs if state.placeholder is None else _without_logits(outputs)

    def _forward_state(self, labels: Labels, label_tokens: int | None) -> ForwardState:
        """What the head is to give in a forward with these labels."""
        evaluation = not self.model.training and not torch.is_grad_enabled()
        if not labels.given or self.settings.head == "dense" or (evaluation and self.logits_in_eval):
            return ForwardState(Gives.ALL_LOGITS, labels)
        if self.settings.head == "sharded":
            return ForwardState(Gives.OWN_LOGITS, labels)
        target = labels.target(self.settings.options.ignore_index)
        kwargs: dict[str, Any] = {
            "target": target,
            "num_items": labels.num_items_in_batch,
            "label_tokens": label_tokens,
        }
        return ForwardState(Gives.LOSS, labels, functools.partial(self._loss_from_hidden, **kwargs))

    def _loss_from_hidden(
        self, hidden: Tensor, lm_head: Any, target: Tensor, num_items: Any, label_tokens: Any
    ) -> Tensor:
        """What the head computes in place of logits. `hidden` `[B, L, H]`, `target` `[B, L]`."""
        hidden, weight, bias = linear_map(lm_head, hidden)
        value, stats = vocab_parallel_linear_cross_entropy(
            hidden,
            weight,
            target.to(hidden.device),
            self.shard,
            bias=bias,
            logit_softcap=self.settings.options.logit_softcap,
            logit_scale=self.settings.options.logit_scale,
            chunk_bytes=self.settings.chunk_bytes,
            label_tokens=label_tokens,
            return_stats=True,
            **self._common_kwargs(num_items),
            **self._extra_kwargs(self._lm_head.forward_state.shard),
        )
        self._report(stats)
        if self.on_numbers is not None:
            self.on_numbers(self._numbers(hidden, weight, bias, target.to(hidden.device)))
        return value

    def _numbers(self, hidden: Any, weight: Any, bias: Any, target: Tensor) -> TokenNumbers:
        options = self.settings.options
        hidden, weight, bias, target, _, shard = local_head(hidden, weight, bias, target, None, self.shard)
        return linear_token_numbers(
            hidden.detach() * options.logit_scale,
            weight.detach(),
            target,
            shard,
            bias=None if bias is None else bias.detach() * options.logit_scale,
            ignore_index=options.ignore_index,
            logit_softcap=options.logit_softcap,
            chunk_bytes=self.settings.chunk_bytes,
        )

    def _common_kwargs(self, num_items: Any) -> dict[str, Any]:
        """What is passed to every loss; smoothed only where the model trains."""
        options = self.settings.options
        return {
            "label_smoothing": options.label_smoothing if self.model.training else 0.0,
            "ignore_index": options.ignore_index,
            "num_items_in_batch": num_items,
        }

    def _extra_kwargs(self, shard: VocabShard | None) -> dict[str, Any]:
        """What is passed besides, which neither `F.cross_entropy` nor evaluation has."""
        if not self.model.training:
            return {"smoothing_prior": None, "z_loss": 0.0}
        prior = self.settings.prior
        if prior is not None and shard is not None and len(prior) == shard.vocab_size:
            prior = shard.part_of(prior)
        return {"smoothing_prior": prior, "z_loss": self.settings.options.z_loss}

    def _report(self, stats: TokenStats) -> None:
        if self.settings.on_stats is not None:
            self.settings.on_stats(stats)

    @property
    def _vocab_size(self) -> int:
        """What the head is for, whatever its ranks hold of it."""
        if self.shard is not None:
            return self.shard.vocab_size
        named: int | None = getattr(self._lm_head.lm_head, "out_features", None)
        return text_config(self.model).vocab_size if named is None else named

    def _check_vocabulary(self, vocab_size: int) -> None:
        if vocab_size != (held := self._vocab_size):
            raise UnsupportedModel(
                f"this model takes its loss over {vocab_size} of its head's {held} logits, which head='fused' does "
                "not; use head='sharded', without tensor parallelism"
            )

    def _shard_of(self, logits: Tensor, vocab_size: int) -> VocabShard | None:
        """Whose columns these logits are; None for those of the whole vocabulary, or a DTensor, which tells itself.

        Raises `UnsupportedModel` for logits of another width: a part of a vocabulary must not be taken for all of it.
        """
        shard, width = self._lm_head.forward_state.shard, logits.shape[-1]
        if width == vocab_size:
            return None
        if shard is not None and (width, vocab_size) == (shard.size, shard.vocab_size):
            return shard
        raise UnsupportedModel(
            f"this model names a vocabulary of {vocab_size}, but hands {width} logits a token to its loss, and its "
            "output head does not tell which those are (as a DTensor, or DeepSpeed's with vocab_parallel_lm_head, "
            "does); pass them to smoothing.vocab_parallel_cross_entropy with a VocabShard instead"
        )

    def _check_labels(self, labels: Labels) -> None:
        """Raise unless these are the labels that the model was given, whose loss the head has computed."""
        if not labels.same(self._lm_head.forward_state.labels, self.settings.options.ignore_index):
            raise UnsupportedModel(
                "this model takes its loss of other labels than it was given, or divides it by another number, which "
                "head='fused' does not; use head='sharded'"
            )


class _Forward:
    """A model's `forward` while a loss is installed. An object, so that a deep copy of the model is whole."""

    def __init__(self, model: nn.Module, around: Callable[..., Any]):
        self.plain, self.around = model.forward, around
        functools.update_wrapper(self, self.plain)  # with the signature, which Trainer and generate read
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(self.names, args, strict=False)) | kwargs
        kwargs.pop("label_tokens", None)  # for the loss alone: no model knows it
        return self.around(self.plain, given, *args, **kwargs)


def _without_logits(outputs: Any) -> Any:
    """A model's outputs with None in place of the placeholder, so that it is not taken for logits."""
    if isinstance(outputs, tuple):
        return outputs[0], None, *outputs[2:]
    return replace(outputs, logits=None) if getattr(outputs, "logits", None) is not None else outputs
