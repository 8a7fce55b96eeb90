"""What is changed in a model before DeepSpeed splits it, so that it splits what the specs say and no more."""

from torch import nn
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from launch.model.tensor_parallel.split import Split, general

# transformers' embeddings whose forward is that of the one scaled embedding that DeepSpeed 0.19.8 lets be tied to a
# split head (`VocabParallelEmbedding.validate_embedding`)
SCALED = ("GemmaTextScaledWordEmbedding", "Gemma2TextScaledWordEmbedding")


def keep_whole(model: PreTrainedModel, split: Split) -> None:
    """Make DeepSpeed leave alone what the split leaves whole.

    DeepSpeed 0.19.8 divides numbers of heads and sizes (`num_heads`, `hidden_size`) by the ranks in every module that
    holds a split weight anywhere (`AutoTP.update_mp_params`), unless the module says that it is done with. Only a
    parallel block computes with its share of them: Falcon's mask, for one, is of all heads. The model itself is
    marked too, as it may come to stand inside another module, peft's.
    """
    for name, module in model.named_modules():
        if general(name) not in split.parallel and any(True for _ in module.children()):
            module.replaced = True  # type: ignore[assignment]


def rename_scaled(model: PreTrainedModel) -> None:
    """Make DeepSpeed take the scaled embeddings of Gemma and Gemma 2, which are Gemma 3's."""
    for module in model.modules():
        if scaled(module):
            module.__class__ = Gemma3TextScaledWordEmbedding


def scaled(module: nn.Module) -> bool:
    """Return whether this is an embedding that is, but for its name, Gemma 3's."""
    return type(module).__name__ in SCALED and type(module).__module__.startswith("transformers.")
