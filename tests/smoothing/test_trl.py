"""`SmoothedSFTTrainer`: without smoothing TRL's own figures, losses and weights, whatever TRL is asked for."""

import re

import pytest
import torch

from smoothing import install_smoothed_loss
from smoothing.hf import SmoothedLossCallback
from tests.smoothing.model.test_install import model_of
from tests.support.examples import example

trl = pytest.importorskip("trl")
trl_sft = example("trl_sft")
SmoothedSFTTrainer = trl_sft.SmoothedSFTTrainer

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
LORA = {"r": 3, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# what TRL is asked for: settings, family and configuration of the model, and arguments of the trainer
ASKED = {
    "completions": ({}, "Llama", {}, {}),
    "all-tokens": ({"completion_only_loss": False}, "Llama", {}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, "Llama", {}, {}),
    "packing": ({"packing": True, "max_length": 24}, "Llama", {"attn_implementation": "eager"}, {}),
    "padding-free": ({"padding_free": True, "max_length": None}, "Llama", {"attn_implementation": "eager"}, {}),
    "mixture": (
        {"router_aux_loss_coef": 0.3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        "Mixtral",
        MIXTURE,
        {},
    ),
    "softcap": ({}, "Gemma2", {"final_logit_softcapping": 2.0}, {}),
    "lora": ({}, "Llama", {}, {"lora": LORA}),
}


TIMES = re.compile("time|per_second")


def trainer_of(kind, folder, asked: str = "completions", callbacks=None, **more):
    settings, family, config, arguments = ASKED[asked]
    args = trl.SFTConfig(
        str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.3,
            "optim": "sgd",
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        | settings
        | more.pop("settings", {}),
    )
    if "lora" in arguments:
        import peft

        more["peft_config"] = peft.LoraConfig(**arguments["lora"])
    rows = trl_sft.dataset()
    return kind(
        model_of(family, **config),
        args,
        train_dataset=rows,
        eval_dataset=rows.select(range(5)),
        processing_class=trl_sft.tokenizer(),
        callbacks=callbacks,
        **more,
    )


@pytest.mark.parametrize("asked", ASKED)
def test_without_smoothing_all_is_as_trl_has_it(asked, tmp_path):
    figures, weights = [], []
    for kind, more in ((trl.SFTTrainer, {}), (SmoothedSFTTrainer, {"label_smoothing": 0.0})):
        trainer = trainer_of(kind, tmp_path, asked, **more)
        before = trainer.evaluate()
        trainer.train()
        logs = [*trainer.state.log_history, before, trainer.evaluate()]
        figures.append(
            [{key: log[key] for key in log if "time" not in key and "per_second" not in key} for log in logs]
        )
        weights.append({name: weight.clone() for name, weight in trainer.model.state_dict().items()})
    for theirs, ours in zip(*figures, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)
    assert "eval_entropy" in figures[1][-1] and "mean_token_accuracy" in figures[1][1]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_entropy_is_of_the_steps_that_are_logged(tmp_path):
    """The others do without the product of the head that it takes."""
    trainer = trainer_of(SmoothedSFTTrainer, tmp_path, settings={"logging_steps": 2, "max_steps": 4})
    measured, plain = [], trainer._measured
    trainer._measured = lambda numbers: (measured.append(trainer.state.global_step + 1), plain(numbers))
    trainer.train()
    assert measured == [2, 4]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in logs] == [2, 4] and all(log["entropy"] > 0 for log in logs)


def test_logits_are_made_for_metrics_only(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions.shape[-1])
        return {}

    trainer = trainer_of(
        SmoothedSFTTrainer, tmp_path, compute_metrics=metrics, loss_options={"on_stats": seen.append}
    )
    trainer.train()
    assert len(seen) == 3  # statistics of each step, and no logits
    evaluated = trainer.evaluate()
    assert seen[-1] == trainer.model.config.vocab_size and "eval_entropy" in evaluated
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated["eval_loss"], rel=1e-5)
    assert trainer.smoothed.installed.logits_in_eval is False


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"label_smoothing_factor": 0.2}, {}, r"set it to 0.*SmoothedSFTTrainer\(\.\.\., label_smoothing=0\.2\)"),
        ({"loss_type": "dft"}, {}, "leave it at 'nll'"),
        ({}, {"compute_loss_func": lambda *_, **__: None}, "leave it out"),
    ],
    ids=["factor", "dft", "function"],
)
def test_another_loss_is_refused(settings, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(SmoothedSFTTrainer, tmp_path, settings=settings, **arguments)


@pytest.mark.parametrize("way", ["callback", "installed"])
def test_trls_own_trainer_is_told_of_ours(way, tmp_path):
    trainer = trainer_of(trl.SFTTrainer, tmp_path, callbacks=[SmoothedLossCallback()] if way == "callback" else None)
    if way == "installed":
        install_smoothed_loss(trainer.model)
    with pytest.raises(ValueError, match=r"smoothing\.trl\.SmoothedSFTTrainer"):
        trainer.train()
