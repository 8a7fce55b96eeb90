"""`transformers.Trainer`. Of several processes: torchrun --nproc_per_node 2 docs/examples/transformers_trainer.py"""

from small import RATE, ROWS, SMOOTHING, STEPS, rows, small_model
from transformers import Trainer, TrainingArguments

from smoothing.hf import SmoothedLossCallback


def train(folder: str = "runs/example", **more):
    model = small_model()
    args = TrainingArguments(
        folder,
        max_steps=STEPS,
        learning_rate=RATE,
        optim="sgd",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        **{"per_device_train_batch_size": ROWS, "max_grad_norm": 0.0} | more,
    )
    data = [row for step in range(STEPS) for row in rows(step)]
    trainer = Trainer(model, args, train_dataset=data, callbacks=[SmoothedLossCallback(label_smoothing=SMOOTHING)])
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], model.state_dict()


if __name__ == "__main__":
    print(train()[0])
