"""`F.cross_entropy` of whole logits, with the statistics that the other losses give: the baseline."""

import torch
import torch.nn.functional as F
from torch import Tensor

from smoothing.core.call import TokenStats


def dense_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    label_smoothing: float,
    ignore_index: int,
    num_items_in_batch: int | Tensor | None = None,
) -> tuple[Tensor, TokenStats]:
    """`F.cross_entropy(logits.float(), target, label_smoothing=)`, and `TokenStats`.

    `logits` `[..., V]`, `target` int64 `[...]`; the loss is fp32. The mean is over labelled tokens, or the sum is
    divided by `num_items_in_batch`; 0.0 without any. No collectives.
    """
    flat_TV, target_T = logits.flatten(0, -2).float(), target.flatten()
    loss_sum = F.cross_entropy(
        flat_TV, target_T, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    valid_T = target_T != ignore_index
    items = valid_T.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=logits.device)
    return loss_sum / items.clamp(min=1), _stats(flat_TV.detach(), target_T, valid_T, target.shape)


def _stats(flat_TV: Tensor, target_T: Tensor, valid_T: Tensor, shape: torch.Size) -> TokenStats:
    lse_T, max_T = flat_TV.logsumexp(1), flat_TV.amax(1)
    label_T = flat_TV.gather(1, target_T.where(valid_T, 0).unsqueeze(1)).squeeze(1)
    per_token = (lse_T - label_T, lse_T, (max_T - lse_T).exp())
    correct = (valid_T & (label_T == max_T) & (flat_TV.argmax(1) == target_T)).view(shape)
    nll, lse, confidence = (x.where(valid_T, 0.0).view(shape) for x in per_token)
    return TokenStats(nll, lse, confidence, correct, valid_T.view(shape))
