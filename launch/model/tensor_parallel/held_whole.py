"""How much of a model every tensor-parallel rank holds, because no rank has a part of it alone."""

import re

from torch import nn

from launch.model.tensor_parallel.adapters import with_factors
from launch.model.tensor_parallel.split import Split
from smoothing.install import causal_lm


def held_whole(model: nn.Module, split: Split) -> list[nn.Parameter]:
    """Return the parameters that stay whole of a model, with or without adapters, that is not split yet."""
    head = {id(p) for p in causal_lm(model).get_output_embeddings().parameters()}  # and what is tied to it
    specs = with_factors(split.specs)
    rows, columns = (
        [pattern for spec in specs if spec["partition_type"] == kind for pattern in spec["patterns"]]
        for kind in ("row", "column")
    )

    def is_cut(name: str) -> bool:
        of_weight = re.sub(r"\.bias$", ".weight", name)  # a column's bias is cut with it
        return any(re.match(p, of_weight) for p in columns) or any(re.match(p, name) for p in rows)

    return [p for name, p in model.named_parameters() if id(p) not in head and not is_cut(name)]
