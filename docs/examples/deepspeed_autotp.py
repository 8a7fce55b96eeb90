"""DeepSpeed with AutoTP: deepspeed --num_gpus 2 docs/examples/deepspeed_autotp.py"""

import deepspeed
import torch.distributed as dist
from small import RATE, ROWS, SMOOTHING, STEPS, batch, small_model

from smoothing import install_smoothed_loss

CONFIG = {
    "train_micro_batch_size_per_gpu": ROWS,
    "optimizer": {"type": "SGD", "params": {"lr": RATE}},
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,  # SGD
    "tensor_parallel": {"autotp_size": 2, "vocab_parallel_lm_head": True},
}


def train():
    engine, *_ = deepspeed.initialize(model=small_model(), config=CONFIG)
    install_smoothed_loss(engine, label_smoothing=SMOOTHING)
    losses = []
    for step in range(STEPS):  # each rank of a tensor-parallel group gets the same rows
        loss = engine(**batch(step)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    weights = engine._consolidated_16bit_state_dict()  # in the model's own dtype, whole on the first rank
    engine.destroy()
    return losses, weights


if __name__ == "__main__":
    deepspeed.init_distributed()
    losses, _ = train()
    if dist.get_rank() == 0:
        print(losses)
