"""torch's own tensor parallelism, as torchtitan has it: a model of one's own, whose logits are a split DTensor.

torchrun --nproc_per_node 2 docs/examples/torch_tensor_parallel.py
"""

import torch
import torch.distributed as dist
from small import LENGTH, RATE, SMOOTHING, STEPS, VOCAB, batch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from smoothing import vocab_parallel_cross_entropy

PLAN = {
    "up": ColwiseParallel(),
    "down": RowwiseParallel(),
    "output": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),  # torchtitan's loss parallel
}


class Model(nn.Module):
    def __init__(self, hidden: int = 32):
        super().__init__()
        self.embeddings = nn.Embedding(VOCAB, hidden)
        self.positions = nn.Embedding(LENGTH, hidden)
        self.up, self.down = nn.Linear(hidden, 48), nn.Linear(48, hidden)
        self.output = nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        hidden_BLH = self.embeddings(ids_BL) + self.positions.weight
        return self.output(hidden_BLH + self.down(self.up(hidden_BLH).relu()))


def whole(weight: torch.Tensor) -> torch.Tensor:
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def train():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    torch.manual_seed(0)
    model = parallelize_module(Model(), mesh["tp"], PLAN)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):  # each rank gets the same rows
        given = batch(step)
        logits, labels = model(given["input_ids"])[:, :-1], given["labels"][:, 1:]
        loss = vocab_parallel_cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: whole(weight) for name, weight in model.state_dict().items()}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(train()[0])
    dist.destroy_process_group()
