"""accelerate with FSDP2: accelerate launch --num_processes 2 docs/examples/accelerate_fsdp2.py"""

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from small import RATE, SMOOTHING, STEPS, batch, small_model

from smoothing import install_smoothed_loss


def train():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    accelerator = Accelerator(fsdp_plugin=plugin)
    model = small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    install_smoothed_loss(model, label_smoothing=SMOOTHING)
    losses = []
    for step in range(STEPS):
        given = batch(step, accelerator.process_index, accelerator.num_processes)
        # the mean is over the labels of all ranks, and FSDP divides gradients by the number of ranks
        labels = accelerator.reduce((given["labels"][:, 1:] != -100).sum())
        loss = model(**given, num_items_in_batch=labels).loss
        accelerator.backward(loss * accelerator.num_processes)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach()).item())
    return losses, accelerator.get_state_dict(model)  # whole on the first rank


if __name__ == "__main__":
    print(train()[0])
