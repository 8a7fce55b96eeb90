"""accelerate with DDP: accelerate launch --num_processes 2 docs/examples/accelerate_ddp.py"""

import torch
from accelerate import Accelerator
from small import RATE, SMOOTHING, STEPS, batch, small_model

from smoothing import install_smoothed_loss


def train():
    accelerator = Accelerator()
    model = small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    install_smoothed_loss(model, label_smoothing=SMOOTHING)
    losses = []
    for step in range(STEPS):
        given = batch(step, accelerator.process_index, accelerator.num_processes)
        # the mean is over the labels of all ranks, and accelerate divides gradients by the number of ranks
        labels = accelerator.reduce((given["labels"][:, 1:] != -100).sum())
        loss = model(**given, num_items_in_batch=labels).loss
        accelerator.backward(loss * accelerator.num_processes)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach()).item())
    return losses, accelerator.unwrap_model(model).state_dict()


if __name__ == "__main__":
    print(train()[0])
