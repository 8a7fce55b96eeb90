"""The fused head in real models: tiny Hugging Face models, and DeepSpeed engines on two gloo ranks.

Held to the same model with `head="dense"` or `head="sharded"`, which the tests of the logits' loss hold to truth.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from ranks import Ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smoothing import install_smoothed_loss

transformers = pytest.importorskip("transformers")

VOCAB, HIDDEN, TOKENS = 101, 32, 12


def model_of(family: str = "Llama", tied: bool = False, dtype=torch.float32, **more):
    """A tiny causal LM with two layers and random weights, the same for the same arguments."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, family + "Config")(**sizes, tie_word_embeddings=tied, **more)
    return getattr(transformers, family + "ForCausalLM")(config).to(dtype)


def batch(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (2, TOKENS), generator=generator)
    labels = ids.clone()
    labels[0, :5] = -100
    labels[1, 9:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


class WidestTile(TorchDispatchMode):
    """The most elements of any new tensor whose last dimension is the vocabulary."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dim() > 1 and result.shape[-1] == VOCAB and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


def loss_and_grads(model, head, inputs=None, **options):
    """Loss, gradients by name, and logits of a forward without labels, with this head."""
    inputs = inputs or batch()
    with install_smoothed_loss(model, head=head, **options):
        model.zero_grad()
        output = model(**inputs)
        output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.loss.detach(), grads


def assert_same(first, second, rtol=1e-5, atol=1e-6):
    torch.testing.assert_close(first[0], second[0], rtol=rtol, atol=atol)
    assert first[1].keys() == second[1].keys()
    for name in second[1]:
        torch.testing.assert_close(
            first[1][name], second[1][name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
def test_loss_and_gradients_equal_the_dense_head(family, tied, training):
    model = model_of(family, tied).train(training)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same(loss_and_grads(model, "fused"), loss_and_grads(model, "dense"))


def test_training_is_smoothed_and_evaluation_is_not():
    model, inputs = model_of(), batch()
    logits = model(**inputs).logits.detach()[:, :-1].flatten(0, 1)
    target = inputs["labels"][:, 1:].flatten()
    with install_smoothed_loss(model, label_smoothing=0.3):
        for training in (True, False):
            model.train(training)
            truth = F.cross_entropy(logits, target, label_smoothing=0.3 if training else 0.0)
            torch.testing.assert_close(model(**inputs).loss, truth, rtol=1e-5, atol=1e-6)
            with torch.no_grad():
                torch.testing.assert_close(model(**inputs).loss, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_no_logits_are_made(training):
    """The vocabulary's width is that of one chunk's rows only, and prompt tokens are in no chunk."""
    model = model_of().train(training)
    labelled = int((batch()["labels"][:, 1:] != -100).sum())
    for chunk_bytes, rows in ((None, labelled), (3 * VOCAB * 4, 3)):
        with install_smoothed_loss(model, chunk_bytes=chunk_bytes), WidestTile() as fused:
            output = model(**batch())
            output.loss.backward()
        assert output.logits is None and "logits" not in output
        assert fused.elements == rows * VOCAB
    with install_smoothed_loss(model, head="sharded"), WidestTile() as sharded:
        model(**batch())
    assert sharded.elements >= 2 * TOKENS * VOCAB


def test_num_items_and_shift_labels():
    model, inputs = model_of(), batch()
    shifted = F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    items = torch.tensor(29)
    with install_smoothed_loss(model):
        plain = model(**inputs).loss
        counted = model(**inputs, num_items_in_batch=items).loss
        del inputs["labels"]
        given = model(**inputs, shift_labels=shifted, labels=shifted.flip(0)).loss
    number = (shifted != -100).sum()
    torch.testing.assert_close(counted * 29, plain * number)
    torch.testing.assert_close(given, plain)


def test_generate_sees_the_same_logits():
    model = model_of().eval()
    ids = batch()["input_ids"]
    logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    with install_smoothed_loss(model):
        model(**batch())
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), generated)
        assert torch.equal(
            model.lm_head(torch.ones(1, HIDDEN)), F.linear(torch.ones(1, HIDDEN), model.lm_head.weight)
        )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    expected = loss_and_grads(model_of(), "fused")
    model = model_of()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(loss_and_grads(model.train(), "fused"), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_the_whole_model(reentrant):
    model = model_of()
    expected = loss_and_grads(model, "fused")
    inputs = batch()
    embedded = model.model.embed_tokens(inputs["input_ids"])

    def run(embeddings):
        return model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss

    with install_smoothed_loss(model):
        model.zero_grad()
        loss = checkpoint(run, embedded, use_reentrant=reentrant)
        loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert_same((loss.detach(), grads), expected)


def test_it_undoes_itself():
    model = model_of()
    before, attributes = model(**batch()), set(vars(model.lm_head))
    installed = install_smoothed_loss(model)
    smoothed = model(**batch()).loss
    installed.remove()
    after = model(**batch())
    assert smoothed != before.loss
    assert torch.equal(after.loss, before.loss) and torch.equal(after.logits, before.logits)
    assert set(vars(model.lm_head)) == attributes


def test_frozen_head_as_under_lora():
    model = model_of()
    model.lm_head.weight.requires_grad_(False)
    first, second = loss_and_grads(model, "fused"), loss_and_grads(model, "dense")
    assert "lm_head.weight" not in first[1]
    assert_same(first, second)


def test_a_wrapper_that_calls_forward_as_peft_does():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def get_base_model(self):
            return self.model

        def get_output_embeddings(self):
            return self.model.get_output_embeddings()

        def forward(self, **kwargs):
            return self.model.forward(**kwargs)

    model = model_of()
    expected = loss_and_grads(model, "fused")[0]
    wrapped = Wrapper(model)
    with install_smoothed_loss(wrapped):
        torch.testing.assert_close(wrapped(**batch()).loss.detach(), expected)
        ids = batch()["input_ids"]
        assert wrapped(input_ids=ids).logits.shape == (2, TOKENS, VOCAB)


def test_softcapped_model():
    model = model_of("Gemma2", final_logit_softcapping=2.0, attn_logit_softcapping=None)
    assert_same(loss_and_grads(model, "fused"), loss_and_grads(model, "dense"), rtol=1e-4)


def test_bf16_model_keeps_its_dtype():
    fused, dense = (loss_and_grads(model_of(dtype=torch.bfloat16), head) for head in ("fused", "dense"))
    assert fused[0].dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in fused[1].values())
    assert_same(fused, dense, rtol=0.05, atol=5e-3)


def test_models_that_scale_their_logits_are_refused():
    model = model_of("Granite", logits_scaling=4.0)
    with pytest.raises(ValueError, match=r"logits_scaling.*sharded"):
        install_smoothed_loss(model)
    with install_smoothed_loss(model_of("Granite", logits_scaling=1.0)):
        pass


def test_a_model_that_changes_its_logits_unannounced_is_refused():
    model = model_of()

    class Scaled(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            hidden = self.model(*args, **kwargs).last_hidden_state
            logits = self.lm_head(hidden) / 3
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)

    model.__class__ = Scaled
    with install_smoothed_loss(model), pytest.raises(ValueError, match="sharded"):
        model(**batch())


def test_a_head_that_is_not_linear_is_refused():
    model = model_of()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"Sequential.*sharded"):
        install_smoothed_loss(model)


# DeepSpeed: tensor parallelism of two, ZeRO 0 to 3.


@functools.cache
def _pair() -> Ranks:
    return Ranks(2)


@pytest.fixture(scope="module")
def pair():
    ranks = _pair()
    yield ranks
    ranks.close()


def engine_losses(state: dict, stage: int, head: str, tied: bool, steps: int) -> dict:
    """Train a few steps; losses, then evaluation loss, logits without labels, and the head's width."""
    import os

    import deepspeed
    import torch.distributed as dist

    from launch.preload import skip_shared_memory_op

    skip_shared_memory_op()
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    model = model_of(tied=tied)
    model.load_state_dict(state)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "tensor_parallel": {"autotp_size": 2, "vocab_parallel_lm_head": True},
    }
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    losses = []
    with install_smoothed_loss(engine, head=head) as installed:
        engine.train()
        for step in range(steps):
            loss = engine(**batch(step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.eval()
        with torch.no_grad():
            evaluation = engine(**batch(99)).loss.item()
            logits = engine(input_ids=batch(99)["input_ids"]).logits.clone()
        width = installed.shard.size
    engine.destroy()
    return {"losses": losses, "evaluation": evaluation, "logits": logits, "width": width}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_engines_train_alike(pair, stage, tied):
    pytest.importorskip("deepspeed")
    state = copy.deepcopy(model_of(tied=tied).state_dict())
    by_head = {
        head: pair.run(engine_losses, state, stage, head, tied, 6, time_limit=180) for head in ("fused", "sharded")
    }
    for fused, sharded in zip(by_head["fused"], by_head["sharded"], strict=True):
        assert fused["width"] < VOCAB
        assert fused["losses"] == pytest.approx(sharded["losses"], rel=1e-5)
        assert fused["evaluation"] == pytest.approx(sharded["evaluation"], rel=1e-5)
        torch.testing.assert_close(fused["logits"], sharded["logits"], rtol=1e-3, atol=1e-4)
        assert fused["logits"].shape == (2, TOKENS, VOCAB)
        assert fused["losses"][-1] < fused["losses"][0]
    assert by_head["fused"][0]["losses"] == by_head["fused"][1]["losses"]
