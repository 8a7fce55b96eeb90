"""Dropout inside and beside layers that tensor-parallel ranks share.

All ranks' generators begin alike and have to go on alike, so that what every rank holds whole learns alike.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from launch.common.errors import UserError
from launch.model.tensor_parallel.split import Split, general
from launch.process.ranks import say


def check_dropout(model: PreTrainedModel, split: Split, tp: int) -> None:
    """Say what dropout of attention means under `tp` ranks, each of which draws for its own heads.

    Raises `UserError` where heads do not divide by the ranks: their generators would go on apart.
    """
    drops = _drops_inside(model, split)
    if not drops:
        return
    config = model.config.get_text_config()
    names = ("num_attention_heads", "num_key_value_heads")
    heads = {name: getattr(config, name, None) for name in names}
    if uneven := [f"{name} {count}" for name, count in heads.items() if isinstance(count, int) and count % tp]:
        raise UserError(
            f"--tp {tp}: the model has dropout in {', '.join(drops)}, which is split, and {' and '.join(uneven)} "
            f"cannot be divided by {tp}: ranks would draw different amounts of random numbers, and what they hold in "
            "common would drift apart; set that dropout to 0 in the model's config.json, or share memory by --zero 3"
        )
    say(f"dropout in {', '.join(drops)}: each rank draws for its own part, so the losses are not one process's")


def _drops_inside(model: PreTrainedModel, split: Split) -> list[str]:
    """Return the split blocks of attention that drop weights of their heads.

    What is dropped of residuals, and by feed-forward layers, is whole on every rank: it comes after their sum.
    """
    attention = [block for block in split.parallel if "att" in block.rpartition(".")[2]]
    found = [(general(name), module) for name, module in model.named_modules()]
    return [block for block in attention if any(_drops(module) for name, module in found if name == block)]


def _drops(block: nn.Module) -> bool:
    """Return whether a block holds a dropout, or keeps its probability in an attribute."""
    held = [(name, module.p) for name, module in block.named_modules() if isinstance(module, nn.Dropout)]
    kept = [(name, value) for name, value in vars(block).items() if "dropout" in name and isinstance(value, float)]
    return any(p > 0 for name, p in held + kept if "resid" not in name)


class DropoutOfAPart(nn.Dropout):
    """Drops from a rank's part of the input what one process drops there.

    Each rank draws for the whole input, [..., inputs], and takes its own part of that.

    Args:
        p: The probability to drop a value.
        sizes: How many inputs each rank has.
        rank: This one.
    """

    def __init__(self, p: float, sizes: tuple[int, ...], rank: int):
        super().__init__(p)
        self.whole, self.first, self.own = sum(sizes), sum(sizes[:rank]), sizes[rank]

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = F.dropout(x.new_ones(*x.shape[:-1], self.whole), self.p)
        return x * kept.narrow(-1, self.first, self.own)
