"""Losses installed in real models, the fused head above all: Hugging Face models, DeepSpeed engines on gloo ranks.

Held to the same model with `head="dense"` or `head="sharded"`, which the tests of the logits' loss hold to truth.
"""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from smoothing import VocabShard, install_smoothed_loss
from smoothing.hf import SmoothedLossCallback
from tests.support.ranks import Ranks

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


def loss_and_grads(model, head, inputs=None, remove=None, **options):
    """Loss, and gradients by name, with this head (in place of the installed loss to `remove`)."""
    inputs = inputs or batch()
    if remove is not None:
        remove.remove()
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
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma", "Phi"])  # the last has a bias
def test_loss_and_gradients_equal_the_dense_head(family, tied, training):
    model = model_of(family, tied).train(training)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert_same(loss_and_grads(model, "fused"), loss_and_grads(model, "dense"))


def test_another_ignore_index():
    model, inputs = model_of(), batch()
    plain = loss_and_grads(model, "dense", inputs)
    inputs["labels"] = inputs["labels"].where(inputs["labels"] != -100, 7 * VOCAB)
    for head in ("fused", "sharded"):
        assert_same(loss_and_grads(model, head, inputs, ignore_index=7 * VOCAB), plain)


def gradient_penalty(model):
    """Gradients by name of the loss and of the square of its own gradient."""
    loss = model(**batch()).loss
    (gradient,) = torch.autograd.grad(loss, [model.model.embed_tokens.weight], create_graph=True)
    (loss + gradient.square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_a_gradient_penalty_is_refused_where_the_head_has_none():
    """Also where the penalty is on other gradients, which follow from the head's."""
    torch.manual_seed(0)
    model, plain = model_of(), model_of()
    for each in (model, plain):
        each.set_attn_implementation("eager")  # torch's fused attention has no second derivative
    for head in ("fused", "sharded"):
        with install_smoothed_loss(model, head=head):
            loss = model(**batch()).loss
            (gradient,) = torch.autograd.grad(loss, [model.model.embed_tokens.weight], create_graph=True)
            with pytest.raises(RuntimeError, match=r"cannot be differentiated again.*head='dense'"):
                gradient.square().sum().backward()
    with install_smoothed_loss(model, head="dense", label_smoothing=0.0):
        penalised, expected = gradient_penalty(model), gradient_penalty(plain)
    for name, gradient in expected.items():
        torch.testing.assert_close(penalised[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["fused", "sharded", "dense"])
def test_statistics_are_told_once_a_forward(head):
    model, inputs, told = model_of(), batch(), []
    with install_smoothed_loss(model, head=head, on_stats=told.append):
        model(**inputs)
    (stats,) = told
    assert torch.equal(stats.valid, F.pad(inputs["labels"], (0, 1), value=-100)[:, 1:] != -100)
    with install_smoothed_loss(model, head=head, label_smoothing=0.0):
        torch.testing.assert_close(stats.nll.sum() / stats.valid.sum(), model(**inputs).loss)


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


@pytest.mark.parametrize("head", ["fused", "sharded", "dense"])
def test_a_forward_may_be_told_how_many_labels_there_are(head):
    class Strict(transformers.LlamaForCausalLM):
        def forward(self, input_ids, attention_mask, labels):  # and nothing else, as code of one's own may be
            return super().forward(input_ids, attention_mask, labels=labels)

    model, labelled = model_of().train(), int((batch()["labels"][:, 1:] != -100).sum())
    model.__class__ = Strict
    with install_smoothed_loss(model, head=head):
        loss = model(**batch()).loss
        assert torch.equal(model(**batch(), label_tokens=labelled).loss, loss)
        if head == "fused":
            with pytest.raises(ValueError, match=f"label_tokens.*{labelled}, got {labelled - 1}"):
                model(**batch(), label_tokens=labelled - 1)


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


def test_training_without_gradients_makes_no_logits_either():
    model = model_of().train()
    with install_smoothed_loss(model, head="fused"), torch.no_grad():
        assert model(**batch()).logits is None


@pytest.mark.parametrize("head", ["fused", "sharded", "dense"])
def test_evaluation_gives_logits_unless_told_otherwise(head):
    model = model_of().eval()
    whole = model(input_ids=batch()["input_ids"]).logits
    with install_smoothed_loss(model, head=head), torch.no_grad():
        first = model(**batch())
        as_tuple = model(**batch(), return_dict=False)
    assert torch.equal(first.logits, whole) and torch.equal(as_tuple[1], whole)
    with install_smoothed_loss(model, head=head, logits_in_eval=False), torch.no_grad():
        second = model(**batch())
        as_tuple = model(**batch(), return_dict=False)
    assert (second.logits is None) == (as_tuple[1] is None) == (head == "fused")
    torch.testing.assert_close(first.loss, second.loss, rtol=1e-6, atol=0)
    assert torch.equal(second.loss, as_tuple[0])


def test_trainer_computes_metrics_of_whole_logits(tmp_path):
    model = model_of()
    rows = [{name: value[i] for name, value in batch().items()} for i in range(2)]
    shapes = []

    def metrics(prediction):
        shapes.append(prediction.predictions.shape)
        correct = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": correct[prediction.label_ids[:, 1:] != -100].mean()}

    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    callback = SmoothedLossCallback(label_smoothing=0.1)
    trainer = transformers.Trainer(
        model, args, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics, callbacks=[callback]
    )
    trainer.train()
    evaluated = trainer.evaluate()
    assert shapes == [(2, TOKENS, VOCAB)]
    logits = model(input_ids=batch()["input_ids"]).logits
    nll = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch()["labels"][:, 1:].flatten())
    assert evaluated["eval_loss"] == pytest.approx(nll.item(), rel=1e-5)


EXTRAS = {"z_loss": 0.5, "smoothing_prior": torch.arange(VOCAB) / torch.arange(VOCAB).sum()}


@pytest.mark.parametrize("head", ["fused", "sharded"])
def test_evaluation_leaves_out_prior_and_z_loss_too(head):
    model, inputs = model_of(), batch()
    plain = model(**inputs).loss.detach()
    with install_smoothed_loss(model, head=head, logits_in_eval=False, **EXTRAS):
        assert model(**inputs).loss > plain + 0.5
        torch.testing.assert_close(model.eval()(**inputs).loss, plain, rtol=1e-5, atol=0)


def by_position(model, inputs):
    return model(inputs["input_ids"], inputs["attention_mask"], None, None, None, inputs["labels"])


CALLS = {
    "module": lambda model, inputs: model(**inputs),
    "forward": lambda model, inputs: model.forward(**inputs),
    "position": by_position,
    "captured": None,
}


@pytest.mark.parametrize("how", CALLS)
def test_however_the_model_is_called(how):
    model, inputs = model_of(), batch()
    captured = model.forward
    call = CALLS[how] or (lambda _, given: captured(**given))  # taken before: no logits are saved then
    expected = loss_and_grads(model, "dense")[0]
    with install_smoothed_loss(model):
        output = call(model, inputs)
        torch.testing.assert_close(output.loss.detach(), expected, rtol=1e-5, atol=0)
        assert (output.logits is None) == (how != "captured")
        assert model(input_ids=inputs["input_ids"]).logits.shape == (2, TOKENS, VOCAB)


def test_labels_by_position_are_found_by_the_name_they_have_there():
    model = model_of()

    class Elsewhere(type(model)):
        def forward(self, labels, input_ids, *args, **kwargs):
            return super().forward(input_ids, *args, labels=labels, **kwargs)

    expected = loss_and_grads(model, "fused")[0]
    model.__class__ = Elsewhere
    with install_smoothed_loss(model):
        output = model(batch()["labels"], batch()["input_ids"], batch()["attention_mask"])
    assert output.logits is None
    torch.testing.assert_close(output.loss.detach(), expected)


def test_an_error_in_a_forward_leaves_nothing_behind():
    model, ids = model_of(), batch()["input_ids"]
    logits = model(input_ids=ids).logits
    with install_smoothed_loss(model):
        with pytest.raises(ValueError, match="target"):
            model(input_ids=ids, labels=ids + VOCAB)
        assert torch.equal(model(input_ids=ids).logits, logits)
        with pytest.raises(IndexError):
            model(input_ids=ids + VOCAB, labels=ids)
        assert torch.equal(model.lm_head(torch.ones(1, HIDDEN)), torch.ones(1, HIDDEN) @ model.lm_head.weight.T)
        assert torch.equal(model(input_ids=ids).logits, logits)


def test_compiled_models():
    model = model_of()
    expected = loss_and_grads(model, "fused")
    model.zero_grad()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with install_smoothed_loss(model):
        compiled = torch.compile(model, backend=backend)
        output = compiled(**batch())
        output.loss.backward()
    assert len(graphs) <= 3, "the loss has been traced, in many pieces"
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert_same((output.loss.detach(), grads), expected)


@pytest.mark.parametrize("head", ["fused", "sharded", "dense"])
def test_the_label_at_position_0_is_never_predicted(head):
    """No logits stand before it: it is neither counted nor learned, and the last position learns no label."""
    model, inputs, seen = model_of(), batch(), []
    inputs["labels"] = inputs["input_ids"].clone()
    others = inputs | {"labels": inputs["labels"].clone()}
    others["labels"][:, 0] = (others["labels"][:, 0] + 7) % VOCAB
    logits = model(**{name: x for name, x in inputs.items() if name != "labels"}).logits[:, :-1]
    truth = F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.1)
    with install_smoothed_loss(model, head=head, on_stats=seen.append):
        for given in (inputs, others):
            torch.testing.assert_close(model(**given).loss, truth)
    for stats in seen:
        assert stats.valid[:, :-1].all() and not stats.valid[:, -1].any()


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
    before = model(**batch())
    attributes, hooks = (set(vars(model)), set(vars(model.lm_head))), count_hooks(model)
    installed = install_smoothed_loss(model)
    smoothed = model(**batch()).loss
    installed.remove()
    after = model(**batch())
    assert smoothed != before.loss
    assert torch.equal(after.loss, before.loss) and torch.equal(after.logits, before.logits)
    assert (set(vars(model)), set(vars(model.lm_head))) == attributes and count_hooks(model) == hooks
    with install_smoothed_loss(model) as again:
        installed.remove()  # a second time: not ours any more
        assert torch.equal(model(**batch()).loss, smoothed) and model.loss_function is again


def count_hooks(model) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_it_gives_back_a_loss_and_a_forward_that_somebody_else_had_put_there():
    model = model_of()
    plain = model.forward
    own_loss, own_forward = (lambda logits, labels, **_: logits.sum() * 0 + 7), (lambda **given: plain(**given))
    model.loss_function, model.forward = own_loss, own_forward
    with install_smoothed_loss(model):
        assert model(**batch()).loss != 7
    assert model.loss_function is own_loss and model.forward is own_forward
    assert model(**batch()).loss == 7


def test_a_forward_that_wrapped_ours_survives_its_removal():
    model = model_of()
    before = model(**batch()).loss
    installed = install_smoothed_loss(model)
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    smoothed = model(**batch()).loss
    installed.remove()
    assert torch.equal(model(**batch()).loss, before) and smoothed != before


def test_a_head_gets_back_the_forward_that_somebody_else_had_put_there():
    model = model_of()
    plain = model.lm_head.forward
    own = model.lm_head.forward = lambda hidden: plain(hidden)
    with install_smoothed_loss(model):
        model(**batch())
    assert model.lm_head.forward is own


def test_a_second_loss_is_refused():
    model = model_of()
    with install_smoothed_loss(model), pytest.raises(ValueError, match=r"already.*remove"):
        install_smoothed_loss(model)
    with install_smoothed_loss(model):
        pass


def test_a_deep_copy_is_whole():
    model = model_of()
    with install_smoothed_loss(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.5)
        first, second = model(**batch()).loss, twin(**batch()).loss
        assert first != second
        second.backward()
        assert twin.lm_head.weight.grad is not None and model.lm_head.weight.grad is None
    torch.testing.assert_close(loss_and_grads(twin, "dense", remove=twin.loss_function)[0], second.detach())


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


CAPPED = {
    "Gemma2": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None},
    "RecurrentGemma": {"logits_soft_cap": 2.0, "lru_width": HIDDEN, "block_types": ["recurrent", "attention"]},
}


@pytest.mark.parametrize("given", [None, 2.0], ids=["unsaid", "said-again"])
@pytest.mark.parametrize("family", CAPPED)
def test_softcapped_model(family, given):
    """What the model caps itself is capped once, whatever the head, also if the caller names the cap."""
    model = model_of(family, **CAPPED[family])
    first = loss_and_grads(model, "fused", logit_softcap=given)
    assert_same(first, loss_and_grads(model, "dense"), rtol=1e-4)
    assert_same(first, loss_and_grads(model, "sharded", logit_softcap=given), rtol=1e-4)
    with pytest.raises(ValueError, match=r"caps its logits at 2\.0.*got logit_softcap=3\.0"):
        install_smoothed_loss(model, logit_softcap=3.0)


def test_a_softcap_for_a_model_that_has_none():
    model, inputs = model_of(), batch()
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    target = inputs["labels"][:, 1:].flatten()
    capped = F.cross_entropy(0.5 * torch.tanh(logits / 0.5), target, label_smoothing=0.1)
    for head in ("fused", "sharded"):
        loss = loss_and_grads(model, head, logit_softcap=0.5)[0]
        torch.testing.assert_close(loss, capped.detach(), rtol=1e-5, atol=0)
    with install_smoothed_loss(model.eval(), logit_softcap=0.5), torch.no_grad():
        unsmoothed = F.cross_entropy(0.5 * torch.tanh(logits / 0.5), target)
        torch.testing.assert_close(model(**inputs).loss, unsmoothed.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("extra", [{"z_loss": 1e-3}, {"logit_softcap": 2.0}, {"smoothing_prior": torch.ones(VOCAB)}])
def test_the_dense_head_says_what_it_does_not_have(extra):
    with pytest.raises(ValueError, match=r"dense.*F\.cross_entropy"):
        install_smoothed_loss(model_of(), head="dense", **extra)


def test_bf16_model_keeps_its_dtype():
    fused, dense = (loss_and_grads(model_of(dtype=torch.bfloat16), head) for head in ("fused", "dense"))
    assert fused[0].dtype == torch.float32
    assert all(grad.dtype == torch.bfloat16 for grad in fused[1].values())
    assert_same(fused, dense, rtol=0.05, atol=5e-3)


SCALED = {
    "Granite": ({"logits_scaling": 4.0}, 0.25),
    "Cohere": ({"logit_scale": 0.3}, 0.3),
    "Llama": ({}, 1.0),
}


@pytest.mark.parametrize("family", SCALED)
def test_models_that_scale_their_logits(family):
    """What the model multiplies its logits by is taken into account once, whatever the head."""
    more, scale = SCALED[family]
    model = model_of(family, **more)
    first = loss_and_grads(model, "fused")
    assert_same(first, loss_and_grads(model, "dense"))
    assert_same(first, loss_and_grads(model, "sharded", logit_scale=scale))
    if scale != 1:
        with pytest.raises(ValueError, match=rf"multiplies its logits by {scale}.*got logit_scale=3\.0"):
            install_smoothed_loss(model, logit_scale=3.0)
    if family == "Cohere":  # Granite would follow
        model.config.logit_scale = 1.0
        with install_smoothed_loss(model), pytest.raises(ValueError, match="changes its logits"):
            model(**batch())


@pytest.mark.parametrize("head", ["fused", "sharded"])
def test_a_scale_for_a_model_that_has_none(head):
    model, inputs = model_of(), batch()
    logits = 3 * model(**inputs).logits[:, :-1].flatten(0, 1)
    truth = F.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), label_smoothing=0.1)
    torch.testing.assert_close(loss_and_grads(model, head, logit_scale=3)[0], truth.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("head", ["sharded", "dense"])
def test_a_part_of_the_vocabulary_is_not_taken_for_all(head):
    """Whatever the labels are: these would all lie in the part."""
    model = model_of()
    inputs = batch() | {"labels": torch.full_like(batch()["labels"], 3)}
    model.lm_head.register_forward_hook(lambda head, given, logits: logits[..., : VOCAB // 2])
    with (
        install_smoothed_loss(model, head=head),
        pytest.raises(ValueError, match=rf"{VOCAB}, but hands {VOCAB // 2}"),
    ):
        model(**inputs)


@pytest.mark.parametrize("head", ["fused", "sharded"])
def test_models_that_are_compiled_already(head):
    model = model_of()
    expected = loss_and_grads(model, "dense")
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager")
    with install_smoothed_loss(compiled, head=head):
        output = compiled(**batch())
        output.loss.backward()
    assert_same((output.loss.detach(), {name: p.grad for name, p in model.named_parameters()}), expected)


@pytest.mark.parametrize("adapted", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head(adapted):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of(), peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, **adapted))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, where a wrong gradient of A would be right
            torch.nn.init.normal_(parameter)
    fused = loss_and_grads(model, "fused")
    assert any("lm_head" in name for name in fused[1])
    assert_same(fused, loss_and_grads(model, "dense"))
    assert_same(fused, loss_and_grads(model, "sharded"))
    with model.disable_adapter(), install_smoothed_loss(model):
        plain = model(**batch()).loss
    torch.testing.assert_close(plain.detach(), loss_and_grads(model_of(), "dense")[0], rtol=1e-5, atol=0)


def test_models_whose_loss_is_another_are_refused():
    model = model_of()
    model.config.z_loss_coefficient = 0.1  # as Bamba has it: added to any loss, from logits
    with pytest.raises(ValueError, match=r"z_loss_coefficient=0\.1"):
        install_smoothed_loss(model, head="sharded")
    model.config.z_loss_coefficient = 0.0
    model.loss_type = "ForMaskedLM"  # as T5Gemma has it: labels in their places already
    with pytest.raises(ValueError, match=r"causal LM.*ForMaskedLM"):
        install_smoothed_loss(model, head="dense")


UNANNOUNCED = {
    "third": lambda logits: logits / 3,
    "barely": lambda logits: logits * 1.001,
    "shifted": lambda logits: logits + 0.01,
    "capped": lambda logits: 30 * torch.tanh(logits / 30),
    "cut-short": lambda logits: logits[:, :-1],
    "some-columns": lambda logits: logits[..., :2],
}


@pytest.mark.parametrize("first", ["labelled", "unlabelled"])
@pytest.mark.parametrize("change", UNANNOUNCED)
def test_a_model_that_changes_its_logits_unannounced_is_refused(change, first):
    """In its first forward, whatever the loss in it happens to be (0 without labels)."""
    model, inputs = model_of(), batch()

    class Changing(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            logits = UNANNOUNCED[change](self.lm_head(self.model(*args, **kwargs).last_hidden_state))
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)

    model.__class__ = Changing
    if first == "unlabelled":
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with install_smoothed_loss(model), pytest.raises(ValueError, match="sharded"):
        model(**inputs)


def test_a_hook_that_changes_the_logits_later_is_refused():
    model = model_of()
    with install_smoothed_loss(model):
        model(**batch())
        model.lm_head.register_forward_hook(lambda head, given, logits: logits * 3)
        with pytest.raises(ValueError, match="changes its logits"):
            model(**batch())


OTHER_LABELS = {
    "in-their-places": lambda labels, items: {"labels": None, "shift_labels": labels},
    "some-masked": lambda labels, items: {"labels": labels.where(labels > 50, -100)},
    "other-divisor": lambda labels, items: {"labels": labels, "num_items_in_batch": 7},
    "no-divisor": lambda labels, items: {"labels": labels},
    "no-labels": lambda labels, items: {"labels": torch.full_like(labels, -100), "num_items_in_batch": items},
}


@pytest.mark.parametrize("change", OTHER_LABELS)
def test_a_model_that_takes_its_loss_of_other_labels_is_refused(change):
    model, inputs = model_of(), batch() | {"num_items_in_batch": 11}

    class Changing(type(model)):
        def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
            logits = self.lm_head(self.model(*args, **kwargs).last_hidden_state)
            asked = OTHER_LABELS[change](labels, num_items_in_batch)
            return self.loss_function(logits=logits, vocab_size=VOCAB, **asked)

    model.__class__ = Changing
    with install_smoothed_loss(model), pytest.raises(ValueError, match=r"other labels.*sharded"):
        model(**inputs)
    with install_smoothed_loss(model, head="sharded"):
        model(**inputs)


def test_a_model_that_passes_on_copies_of_its_labels_is_served():
    model, inputs = model_of(), batch() | {"num_items_in_batch": 11}

    class Copying(type(model)):
        def forward(self, *args, labels=None, num_items_in_batch=None, **kwargs):
            logits = self.lm_head(self.model(*args, **kwargs).last_hidden_state)
            copies = {"labels": labels.clone(), "num_items_in_batch": torch.tensor(num_items_in_batch)}
            return self.loss_function(logits=logits, vocab_size=VOCAB, **copies)

    with install_smoothed_loss(model):
        expected = model(**inputs).loss
        model.__class__ = Copying
    with install_smoothed_loss(model):
        assert torch.equal(model(**inputs), expected)


@pytest.mark.parametrize("head", ["fused", "sharded", "dense"])
def test_a_model_that_computes_its_loss_itself_is_refused(head):
    torch.manual_seed(0)
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    config = transformers.BartConfig(vocab_size=VOCAB, max_position_embeddings=TOKENS, is_decoder=True, **sizes)
    model = transformers.BartForCausalLM(config).eval()
    plain = model(**batch()).loss
    with install_smoothed_loss(model, head=head), pytest.raises(ValueError, match="computes its loss itself"):
        model(**batch())
    assert torch.equal(model(**batch()).loss, plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"chunk_bytes": -5}, "chunk_bytes.*-5"),
        ({"smoothing_prior": [1.0, 2.0]}, "smoothing_prior.*list"),
        ({"smoothing_prior": torch.ones(2, 2)}, r"smoothing_prior.*\(2, 2\)"),
        ({"label_smoothing": 2}, "label_smoothing.*2"),
        ({"head": "fast"}, "fused, sharded, dense.*fast"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_any_forward(wrong, message):
    with pytest.raises(ValueError, match=message):
        install_smoothed_loss(model_of(), **wrong)


def test_a_process_with_several_gpus_is_refused(tmp_path):
    args = transformers.TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"one process for each of the 2 GPUs"):
        SmoothedLossCallback().on_train_begin(args, None, None, model=model_of())


def test_a_trainer_with_another_loss_is_refused(tmp_path):
    """Trainer would take the labels out of the batch for its own loss, and the installed one would not be called."""
    options = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    rows = [{name: value[i] for name, value in batch().items()} for i in range(2)]
    smoothing = transformers.TrainingArguments(**options, label_smoothing_factor=0.1)
    plain = transformers.TrainingArguments(**options)
    for args, more, message in (
        (smoothing, {}, r"label_smoothing_factor=0\.1.*set it to 0"),
        (
            plain,
            {"compute_loss_func": lambda outputs, labels, num_items_in_batch: outputs.logits.mean()},
            "compute_loss_func.*leave it",
        ),
    ):
        callback = SmoothedLossCallback(label_smoothing=0.1)
        trainer = transformers.Trainer(model_of(), args, train_dataset=rows, callbacks=[callback], **more)
        before = copy.deepcopy(trainer.model.state_dict())
        with pytest.raises(ValueError, match=message):
            trainer.train()
        assert all(torch.equal(before[name], now) for name, now in trainer.model.state_dict().items())


def test_a_loss_over_fewer_columns_than_the_head_has_is_refused():
    model = model_of()

    class Unpadding(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            logits = self.lm_head(self.model(*args, **kwargs).last_hidden_state)[..., : VOCAB - 5]
            return self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB - 5)

    model.__class__ = Unpadding
    with install_smoothed_loss(model), pytest.raises(ValueError, match=rf"{VOCAB - 5} of.*{VOCAB}.*sharded"):
        model(**batch())
    labels = batch()["labels"].clamp(max=VOCAB - 6)
    with install_smoothed_loss(model, head="sharded"):
        model(**batch() | {"labels": labels}).backward()


@pytest.mark.parametrize("auxiliary_first", [True, False])
def test_a_model_with_two_uses_of_its_head_is_refused(auxiliary_first):
    model = model_of()

    class Twice(type(model)):
        def forward(self, *args, labels=None, **kwargs):
            hidden = self.model(*args, **kwargs).last_hidden_state
            auxiliary = self.lm_head(hidden * 2) if auxiliary_first else None
            logits = self.lm_head(hidden)
            auxiliary = self.lm_head(hidden * 2) if auxiliary is None else auxiliary
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCAB)
            return loss + self.loss_function(logits=auxiliary, labels=labels, vocab_size=VOCAB)

    model.__class__ = Twice
    with install_smoothed_loss(model), pytest.raises(ValueError, match=r"more than once.*sharded"):
        model(**batch())
    with install_smoothed_loss(model, head="sharded"):
        model(**batch()).backward()


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


def engine_losses(state: dict, stage: int, tied: bool, steps: int, **options) -> dict:
    """Train a few steps; losses, then evaluation loss, logits with and without labels, and the head's width."""
    import os

    import deepspeed
    import torch.distributed as dist

    from launch.common.library_patches import skip_shared_memory_op

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
    if (prior := options.get("smoothing_prior")) is not None and options["head"] == "sharded":
        # this rank's slice, where the fused head is given the whole
        shard = VocabShard.of(engine.module.lm_head)
        options["smoothing_prior"] = prior[shard.start : shard.stop]
    losses = []
    with install_smoothed_loss(engine, **options) as installed:
        engine.train()
        for step in range(steps):
            loss = engine(**batch(step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        engine.eval()
        with torch.no_grad():
            evaluation = engine(**batch(99))
            logits = engine(input_ids=batch(99)["input_ids"]).logits.clone()
        width = installed.shard.size
    engine.destroy()
    return {
        "losses": losses,
        "evaluation": evaluation.loss.item(),
        "logits": logits,
        "evaluation-logits": evaluation.logits,
        "width": width,
    }


def refusal_of_a_gathered_head() -> str:
    import os

    import deepspeed
    import torch.distributed as dist

    from launch.common.library_patches import skip_shared_memory_op

    skip_shared_memory_op()
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    settings = {"train_micro_batch_size_per_gpu": 2, "tensor_parallel": {"autotp_size": 2}}
    engine, *_ = deepspeed.initialize(model=model_of(), config=settings)
    with pytest.raises(ValueError, match="output head") as refused:
        install_smoothed_loss(engine)
    engine.destroy()
    return str(refused.value)


def test_autotp_without_a_vocabulary_parallel_head_is_told_what_to_set(pair):
    pytest.importorskip("deepspeed")
    for message in pair.run(refusal_of_a_gathered_head, time_limit=120):
        assert '"vocab_parallel_lm_head": true' in message


@pytest.mark.parametrize("options", [{}, {"logit_softcap": 0.5}, EXTRAS], ids=["plain", "softcap", "prior-z-loss"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_engines_train_alike(pair, stage, tied, options):
    pytest.importorskip("deepspeed")
    if options and (tied or stage in (1, 2)):
        pytest.skip("options are looked at where the engine does least and most")
    state = copy.deepcopy(model_of(tied=tied).state_dict())
    by_head = {
        head: pair.run(engine_losses, state, stage, tied, 6, head=head, **options, time_limit=180)
        for head in ("fused", "sharded")
    }
    for fused, sharded in zip(by_head["fused"], by_head["sharded"], strict=True):
        assert fused["width"] < VOCAB
        assert fused["losses"] == pytest.approx(sharded["losses"], rel=1e-5)
        assert fused["evaluation"] == pytest.approx(sharded["evaluation"], rel=1e-5)
        torch.testing.assert_close(fused["logits"], sharded["logits"], rtol=1e-3, atol=1e-4)
        assert fused["logits"].shape == (2, TOKENS, VOCAB)
        torch.testing.assert_close(fused["evaluation-logits"], fused["logits"], rtol=0, atol=0)
        assert fused["losses"][-1] < fused["losses"][0]
    assert by_head["fused"][0]["losses"] == by_head["fused"][1]["losses"]


def with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=["lm_head", "q_proj"])
    torch.manual_seed(1)
    model = peft.get_peft_model(model_of(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero at first, where a wrong gradient of A would be right
            torch.nn.init.normal_(parameter)
    return model


def losses_of_adapters(stage: int) -> list[float]:
    import os

    import deepspeed
    import torch.distributed as dist

    from launch.common.library_patches import skip_shared_memory_op

    skip_shared_memory_op()
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
    }
    engine, *_ = deepspeed.initialize(model=with_adapters(), config=settings)
    losses = []
    with install_smoothed_loss(engine):
        for step in range(4):
            loss = engine(**batch(step)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    engine.destroy()
    return losses


def test_adapters_on_a_head_that_zero_3_partitions():
    pytest.importorskip("deepspeed")
    model, expected = with_adapters(), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with install_smoothed_loss(model, head="dense"):
        for step in range(4):
            loss = model(**batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            expected.append(loss.item())
    with Ranks(2) as ranks:  # processes in which DeepSpeed has split no model: it keeps the groups of the last one
        for losses in ranks.run(losses_of_adapters, 3, time_limit=180):
            assert losses == pytest.approx(expected, rel=1e-5)
