"""The split of LoRA's factors: as the layers are that they stand beside.

peft puts a layer `NAME` at `NAME.base_layer`, beside `NAME.lora_A.default` and `NAME.lora_B.default`, and adds
B(A(x)) to what the layer gives. Both sums stay what they are in one process:

- A column-parallel layer takes a whole x and gives each rank its part of the output. A is whole on every rank, and B
  is cut by its output as the layer is, fused halves and gathered outputs included. B's own column parallelism sums
  the gradient of A x over the ranks, so every rank has A's whole gradient.
- A row-parallel layer takes each rank's part of x. A is cut by its input and its partial products are summed, `r`
  numbers a token; B is whole, gets a whole input and a whole gradient on every rank.

A layer that is whole has whole factors. Each factor is drawn whole, alike on all ranks, before it is cut.
"""

from typing import Any

FACTOR = {"column": "lora_B", "row": "lora_A"}  # the one that is cut
END = r"\.weight$"


def with_factors(specs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return DeepSpeed's `layer_specs` of a model as they are once peft has put adapters into it.

    What they say of gradients is left out: the weights that they are of are frozen.
    """
    return [_with_factor(spec) for spec in specs if not spec.get("grad_allreduce")]


def _with_factor(spec: dict[str, Any]) -> dict[str, Any]:
    factor = FACTOR.get(spec["partition_type"])
    if factor is None:
        return spec
    beside = rf"(\.base_layer|\.{factor}\.default)?"
    return spec | {"patterns": [pattern.removesuffix(END) + beside + END for pattern in spec["patterns"]]}
