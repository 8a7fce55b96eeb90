"""Packed rows: which models keep them apart, and that losses and gradients are those of the same rows alone."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    modeling_flash_attention_utils,
)

from launch.assemble import check_arguments
from launch.common.errors import UserError
from launch.config.options import SftOptions
from launch.data.batches import PadToLongest
from launch.data.examples.rows import IGNORED
from launch.data.packing import PadPacked
from launch.model.load import load_model
from launch.model.packed_rows import distinct_tokens, leak_problem, packing_problem, takes_bounds
from launch.preflight.model_checks import check_packed_rows
from smoothing import install_smoothed_loss
from tests.support.small_run import write_data, write_model

VOCAB = 64
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "gemma3_text": {
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mixtral": EXPERTS,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "falcon": {},  # transformers 5.24 keeps its rows apart, 5.23 did not
    "falcon-alibi": {"alibi": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_oss": EXPERTS | {"head_dim": 8},
    "mamba": {},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"head_dim": 8, "lru_width": 32, "num_hidden_layers": 3},
}
APART = {"llama", "qwen3", "gemma3_text", "mixtral", "gpt2"}
LEAKING = {"opt", "bloom", "gpt_oss", "mamba", "lfm2", "recurrent_gemma"}
PAD = PadToLongest(0)
CPU = torch.device("cpu")
TOKENS = list(range(3, 30))


def model_of(name: str, **more):
    kind = name.partition("-")[0]
    known = CONFIG_MAPPING[kind]().to_dict().keys() | CONFIG_MAPPING[kind].attribute_map.keys()
    values = {key: value for key, value in (SMALL | KINDS[name] | more).items() if key in known}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))
    model.config.use_cache = False
    return model


def problem(model, collate=None) -> str | None:
    return leak_problem(model, type(model).__name__, collate or PadPacked(PAD, takes_bounds(model)), TOKENS, CPU)


def rows_of(*lengths: int, seed: int = 0) -> list[dict]:
    draw = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": row, "labels": [IGNORED, IGNORED, *row[2:]], "where": "a"} for row in ids]


def packed(*groups: list[dict]) -> list[dict]:
    """Sequences, each of some rows."""
    sequences = []
    for group in groups:
        joined = {name: [x for row in group for x in row[name]] for name in ("input_ids", "labels")}
        sequences.append(joined | {"lengths": [len(row["input_ids"]) for row in group], "where": "a"})
    return sequences


def inputs_of(batch: dict) -> dict:
    return {name: value for name, value in batch.items() if name not in ("where", "tokens")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_passes_if_its_packed_rows_are_as_they_are_alone(kind):
    """By rows of other lengths than the probe's, compared with each row in a forward of its own."""
    model = model_of(kind).eval()
    rows = rows_of(11, 6, 14)
    with torch.no_grad():
        batch = PadPacked(PAD)(packed(rows))
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        alone = [model(input_ids=torch.tensor([row["input_ids"]])).logits[0] for row in rows]
    difference = (logits[: 11 + 6 + 14] - torch.cat(alone)).abs().max().item()
    right = difference < 1e-5
    assert right or kind not in APART
    assert not right or kind not in LEAKING
    found = problem(model)
    assert (found is None) == right, found
    if not right:
        assert found.startswith(f"--packing: {type(model).__name__} attends across packed rows")
        assert found.endswith("; leave --packing out")


def test_a_model_that_ignores_positions_is_refused():
    model = model_of("gpt2")
    whole = lambda _module, args: (torch.arange(args[0].shape[-1]).expand_as(args[0]),)  # noqa: E731
    model.transformer.wpe.register_forward_pre_hook(whole)
    assert "GPT2LMHeadModel ignores position_ids" in problem(model)


def test_a_model_that_takes_no_positions_is_refused():
    model = model_of("llama")
    forward = model.forward
    model.forward = lambda input_ids: forward(input_ids)
    assert "LlamaForCausalLM cannot be given packed rows" in problem(model)


@pytest.mark.parametrize(("kind", "passes"), [("llama", True), ("opt", False)])
def test_rounding_that_depends_on_other_rows_is_no_leak(kind, passes):
    """As with experts on a GPU, whose products have other shapes when other tokens choose other experts."""
    model = model_of(kind)

    def round_otherwise(_module, _args, kwargs, output):
        output.logits = output.logits + kwargs["input_ids"].float().std() * 1e-7

    model.register_forward_hook(round_otherwise, with_kwargs=True)
    assert (problem(model) is None) == passes


def test_routers_whose_loss_counts_padding_are_refused():
    assert "set output_router_logits to false, or leave --packing out" in packing_problem(
        model_of("mixtral", output_router_logits=True)
    )
    assert packing_problem(model_of("mixtral")) is None


def test_grouping_packed_sequences_by_length_is_refused():
    args = SimpleNamespace(
        hf_deepspeed_config=SimpleNamespace(mismatches=[]),
        save_strategy="steps",
        eval_strategy="no",
        accelerator_config=SimpleNamespace(use_seedable_sampler=True, split_batches=False, dispatch_batches=None),
        train_sampling_strategy="group_by_length",
    )
    with pytest.raises(UserError, match="group_by_length does nothing for --packing"):
        check_arguments(SftOptions(packing=True), args)


def test_nothing_of_the_model_is_changed():
    model = model_of("llama", attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_pre_hook(lambda *_: print(model.calls.add_(torch.rand(()))))
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    assert problem(model) is None
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0] and torch.equal(buffer, buffers[name][1])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_check_of_sanity(tokenizer_and_model):
    tokenizer, _ = tokenizer_and_model
    ids = [5, 5, 5]
    assert distinct_tokens(ids, tokenizer) == [5, tokenizer.eos_token_id]
    assert check_packed_rows(model_of("llama"), tokenizer, ids, CPU).passed is True
    check = check_packed_rows(model_of("opt"), tokenizer, ids, CPU)
    assert check.passed is False and "OPTForCausalLM attends across packed rows" in check.figure


@pytest.fixture(scope="module")
def tokenizer_and_model(tmp_path_factory):
    """The job's own model build."""
    folder = tmp_path_factory.mktemp("packed")
    write_data(folder)
    path = write_model(folder, tied=False)
    tokenizer = AutoTokenizer.from_pretrained(path)
    return tokenizer, load_model(SftOptions(model=str(path), max_length=96), tokenizer, torch.float32, 0)


def loss_and_gradients(model, batch: dict, head: str) -> tuple[float, list[torch.Tensor], torch.Tensor]:
    """Of a step of these label tokens; and the losses of its tokens."""
    model.zero_grad()
    seen = []
    with install_smoothed_loss(model, label_smoothing=0.1, head=head, on_stats=seen.append):
        loss = model(**inputs_of(batch), num_items_in_batch=batch["label_tokens"]).loss
        loss.backward()
    return loss.item(), [p.grad.clone() for p in model.parameters()], seen[0].nll


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("head", ["fused", "sharded", "dense"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_is_that_of_the_same_rows_unpacked(tokenizer_and_model, head, attention, checkpointing):
    model = copy.deepcopy(tokenizer_and_model[1]).train()
    model.set_attn_implementation(attention)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = rows_of(11, 6, 14, 9, 3, 20)
    alone = loss_and_gradients(model, PAD(rows), head)
    together = loss_and_gradients(model, PadPacked(PAD)(packed(rows[:3], rows[3:5], rows[5:])), head)
    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    for one, other in zip(together[1], alone[1], strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_changed_row_leaves_its_neighbours_losses_bit_identical(tokenizer_and_model, attention):
    model = copy.deepcopy(tokenizer_and_model[1]).train()
    model.set_attn_implementation(attention)
    rows, others = rows_of(11, 6, 14, 9), rows_of(11, 6, 14, 9, seed=1)
    before, after = (
        loss_and_gradients(model, PadPacked(PAD)(packed(three, rows[3:])), "fused")[2]
        for three in (rows[:3], [rows[0], others[1], rows[2]])
    )
    changed = torch.zeros_like(before, dtype=torch.bool)
    changed[0, 11 : 11 + 6 - 1] = True  # the row's last position predicts nothing
    assert torch.equal(before[~changed], after[~changed])
    assert (before[changed][1:] != after[changed][1:]).all()


def losses_of(model, *groups: list[dict]) -> torch.Tensor:
    """Of packed rows, without gradients."""
    batch, seen = PadPacked(PAD)(packed(*groups)), []
    with torch.no_grad(), install_smoothed_loss(model, label_smoothing=0.1, head="fused", on_stats=seen.append):
        model(**inputs_of(batch), num_items_in_batch=batch["label_tokens"])
    return seen[0].nll


def test_flex_attention_keeps_rows_apart(tokenizer_and_model):
    """Its forward pass alone, which is all that torch has of it on a CPU; not compiled, which takes half a minute."""
    model = copy.deepcopy(tokenizer_and_model[1]).eval()
    rows, others = rows_of(11, 6, 14, 9), rows_of(11, 6, 14, 9, seed=1)
    expected = losses_of(model, rows[:3], rows[3:])
    model.set_attn_implementation("flex_attention")
    with torch.compiler.set_stance("force_eager"):
        before = losses_of(model, rows[:3], rows[3:])
        after = losses_of(model, [rows[0], others[1], rows[2]], rows[3:])
        assert problem(model) is None
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)
    assert (before != after).any() and (before != after)[0, 11 : 11 + 6 - 1].sum() == (before != after).sum()


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale=None, **_):
    """What the kernel of flash attention computes: [tokens, heads, size], each row by itself."""
    assert torch.equal(cu_seqlens_q, cu_seqlens_k) and max_seqlen_q == max_seqlen_k == cu_seqlens_q.diff().max()
    sizes = cu_seqlens_q.diff().tolist()
    parts = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in row), is_causal=causal, scale=softmax_scale, enable_gqa=True
        )
        for row in zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    ]
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def flash(q, k, v, causal=False, softmax_scale=None, **_):
    parts = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*parts, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(
        1, 2
    )


@pytest.fixture
def flash_on_a_cpu(monkeypatch):
    """transformers' flash attention with its kernel replaced by one that runs here; what it calls is its own."""
    utils = modeling_flash_attention_utils

    def process(query_length, key_length, is_causal, dropout=0.0, softmax_scale=None, **kwargs):
        given = {name: kwargs[name] for name in ("max_seqlen_q", "max_seqlen_k") if name in kwargs}
        return {"causal": is_causal, "softmax_scale": softmax_scale} | given

    functions = ((flash, varlen, None, None, None), (process, None))
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_: functions)


@pytest.mark.usefixtures("flash_on_a_cpu")
def test_flash_attention_is_told_where_rows_end(tokenizer_and_model):
    model = copy.deepcopy(tokenizer_and_model[1]).train()
    sequences = packed(rows_of(11, 6, 14), rows_of(9, 3))
    expected = loss_and_gradients(model, PadPacked(PAD)(sequences), "fused")
    assert not takes_bounds(model)
    model.config._attn_implementation = "flash_attention_2"
    assert takes_bounds(model)
    got = loss_and_gradients(model, PadPacked(PAD, cumulative=True)(sequences), "fused")
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    for one, other in zip(got[1], expected[1], strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert problem(model) is None
    assert "attends across packed rows" in problem(model, PadPacked(PAD))  # more than one sequence, and no bounds
