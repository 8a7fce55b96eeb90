"""accelerate with DeepSpeed: accelerate launch --num_processes 2 docs/examples/accelerate_deepspeed.py"""

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from small import RATE, ROWS, SMOOTHING, STEPS, batch, small_model

from smoothing import install_smoothed_loss


def train():
    config = {
        "train_micro_batch_size_per_gpu": ROWS // 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,  # SGD
    }
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    model = small_model()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=RATE))
    install_smoothed_loss(model, label_smoothing=SMOOTHING)
    losses = []
    for step in range(STEPS):
        given = batch(step, accelerator.process_index, accelerator.num_processes)
        # the mean is over the labels of all ranks, and DeepSpeed divides gradients by the number of ranks
        labels = accelerator.reduce((given["labels"][:, 1:] != -100).sum())
        loss = model(**given, num_items_in_batch=labels).loss
        accelerator.backward(loss * accelerator.num_processes)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach()).item())
    return losses, accelerator.get_state_dict(model)  # whole on the first rank


if __name__ == "__main__":
    print(train()[0])
