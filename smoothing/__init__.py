"""Label-smoothed cross entropy over a vocabulary that is sharded over ranks; needs torch alone.

From logits, from hidden states, or installed in a Hugging Face model. What is imported here is the public interface;
`smoothing.hf` has a callback for `transformers.Trainer`.
"""

from smoothing.calibration.numbers import TokenNumbers, linear_token_numbers, token_numbers
from smoothing.calibration.unsmooth import unsmooth
from smoothing.core.call import TokenStats
from smoothing.install import install_smoothed_loss
from smoothing.linear_loss import vocab_parallel_linear_cross_entropy
from smoothing.logits_loss import smoothed_cross_entropy, vocab_parallel_cross_entropy
from smoothing.model.support import UnsupportedModel
from smoothing.shard import VocabShard

__version__ = "0.1.0"

__all__ = [
    "TokenNumbers",
    "TokenStats",
    "UnsupportedModel",
    "VocabShard",
    "__version__",
    "install_smoothed_loss",
    "linear_token_numbers",
    "smoothed_cross_entropy",
    "token_numbers",
    "unsmooth",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
