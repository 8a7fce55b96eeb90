"""The three formulations that the project starts from, on full logits, in the dtype they are given.

They are one number. Every test of the sharded losses holds them to these functions in fp64.

Shapes: T tokens, V vocabulary. `logits_TV` floating point, `target_T` int64 with `ignore_index` where a
token has no label. Each returns the mean over the labelled tokens, a scalar in the logits' dtype.
"""

import torch.nn.functional as F
from torch import Tensor

from smoothing.core.options import DEFAULT_IGNORE_INDEX


def torch_cross_entropy(
    logits_TV: Tensor, target_T: Tensor, label_smoothing: float, ignore_index: int = DEFAULT_IGNORE_INDEX
) -> Tensor:
    """PyTorch's `F.cross_entropy(label_smoothing=)`.

    Args:
        logits_TV: `[T, V]` floating point.
        target_T: `[T]` int64.
        label_smoothing: ε, in [0, 1].
        ignore_index: label of tokens that have none.

    Returns:
        The mean over the labelled tokens, `[]`, in the logits' dtype.
    """
    return F.cross_entropy(logits_TV, target_T, ignore_index=ignore_index, label_smoothing=label_smoothing)


def hf_label_smoother(
    logits_TV: Tensor, target_T: Tensor, label_smoothing: float, ignore_index: int = DEFAULT_IGNORE_INDEX
) -> Tensor:
    """Hugging Face's `LabelSmoother`: `(1-ε)·nll + ε·mean_v(-log p_v)`, each averaged over labelled tokens.

    Args:
        logits_TV: `[T, V]` floating point.
        target_T: `[T]` int64.
        label_smoothing: ε, in [0, 1].
        ignore_index: label of tokens that have none.

    Returns:
        The mean over the labelled tokens, `[]`, in the logits' dtype.

    Source:
        `transformers.trainer_pt_utils.LabelSmoother`; written anew so that `smoothing` needs torch alone. A test
        holds this function to the original.
    """
    log_probs_TV = F.log_softmax(logits_TV, dim=-1)
    ignored_T = target_T == ignore_index
    nll_T = -log_probs_TV.gather(-1, target_T.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    uniform_T = -log_probs_TV.sum(-1) / logits_TV.shape[-1]
    labelled = (~ignored_T).sum()
    nll = nll_T.masked_fill(ignored_T, 0.0).sum() / labelled
    uniform = uniform_T.masked_fill(ignored_T, 0.0).sum() / labelled
    return (1 - label_smoothing) * nll + label_smoothing * uniform


def onehot_cross_entropy(
    logits_TV: Tensor,
    target_T: Tensor,
    label_smoothing: float,
    ignore_index: int = DEFAULT_IGNORE_INDEX,
    prior_V: Tensor | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross entropy against the smoothed labels `onehot·(1-ε) + ε·u`, written out; and `z_loss·lse(z)²`.

    Args:
        logits_TV: `[T, V]` floating point.
        target_T: `[T]` int64.
        label_smoothing: ε, in [0, 1].
        ignore_index: label of tokens that have none.
        prior_V: `[V]` u, a distribution over the vocabulary; None: uniform.
        z_loss: weight of `lse(z)²`.

    Returns:
        The mean over the labelled tokens, `[]`, in the logits' dtype.
    """
    labelled_T = target_T != ignore_index
    logits_TV, target_T = logits_TV[labelled_T], target_T[labelled_T]
    vocab_size = logits_TV.shape[-1]
    u_V = 1 / vocab_size if prior_V is None else prior_V.to(logits_TV)
    q_TV = F.one_hot(target_T, vocab_size).to(logits_TV.dtype) * (1 - label_smoothing) + label_smoothing * u_V
    loss_T = -(q_TV * F.log_softmax(logits_TV, dim=-1)).sum(-1)
    return (loss_T + z_loss * logits_TV.logsumexp(-1).square()).mean()
