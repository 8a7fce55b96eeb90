"""A model from a configuration: mistakes are sentences; and an export is held to what the configuration says."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from launch.common.errors import UserError
from launch.config.options import SftOptions
from launch.data.tokenizer import load_tokenizer
from launch.data.train_tokenizer import train_tokenizer
from launch.model.checks import check_trainable
from launch.model.load import load_model
from launch.training.export import assert_complete
from smoothing import UnsupportedModel
from tests.support.tokenizers import byte_level

SMALL = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a few words to learn pieces from", "and a few more of them"], 300)


def build(tokenizer, tp: int = 1, **values):
    options = SftOptions(model_config=SMALL | values, tp=tp)
    return load_model(options, tokenizer, torch.float32, seed=0)


def test_the_vocabulary_is_the_tokenizers_and_the_seed_decides(tokenizer):
    one, other = build(tokenizer), build(tokenizer)
    assert one.config.vocab_size == len(tokenizer)
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hiden_size": 32}, ("unknown key 'hiden_size'", "did you mean 'hidden_size'")),
        ({"hidden_size": "abc"}, ("hidden_size", "expected int", "'abc'")),
        ({"hidden_size": 30}, ("hidden size (30) is not a multiple", "heads (4)")),
        ({"hidden_size": 0}, ("hidden_size must be at least 1", "got 0")),
        ({"hidden_size": -32}, ("hidden_size must be at least 1", "got -32")),
        ({"num_hidden_layers": 0}, ("num_hidden_layers must be at least 1",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers must be at most",)),
        ({"num_attention_heads": 0}, ("num_attention_heads must be at least 1",)),
        ({"num_key_value_heads": 0}, ("num_key_value_heads must be at least 1",)),
        ({"num_key_value_heads": 3}, ("num_attention_heads 4", "multiple of num_key_value_heads 3")),
        ({"hidden_act": "sillu"}, ("hidden_act: there is no 'sillu'", "did you mean 'silu'")),
        ({"rope_parameters": {"rope_type": "yarm"}}, ("rope_parameters.rope_type: there is no 'yarm'", "'yarn'")),
        ({"initializer_range": -1.0}, ("initializer_range must be at least 0",)),
        ({"dtype": "float99"}, ("dtype must be one of torch's", "'float99'", "did you mean 'float")),
        ({"vocab_size": 10**12}, ("parameters take", "this machine has ", "vocab_size")),
        ({"vocab_size": 10**19}, ("--model_config",)),
        ({"model_type": "lama"}, ("unknown model_type 'lama'", "did you mean 'llama'")),
        ({"model_type": "Zz"}, ("unknown model_type 'Zz'", "llama")),
        ({"model_type": ["llama"]}, ("unknown model_type ['llama']",)),
        ({"model_type": "vit"}, ("'vit' is not a causal LM",)),
        ({"model_type": "bert"}, ("bert is an encoder", "is_decoder true")),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, ("gemma2 looks ahead", "needs it false")),
        ({"model_type": "reformer"}, ("--model_config",)),
        ({"vocab_size": 10}, ("vocabulary of 10",)),
        ({"model_type": None}, ("needs a model_type",)),
        ({"max_position_embeddings": 100}, ("--max_length 512", "max_position_embeddings 100")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_errors_in_a_configuration(tokenizer, values, words):
    with pytest.raises(UserError) as error:
        build(tokenizer, **values)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    for word in words:
        assert word in str(error.value)


def test_what_is_no_mistake_in_a_configuration(tokenizer):
    assert build(tokenizer, model_type="bert", is_decoder=True).config.is_decoder
    assert build(tokenizer, dtype="bfloat16").dtype == torch.float32  # the recipe's
    assert build(tokenizer, model_type="gpt_neox").config.model_type == "gpt_neox"
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert build(tokenizer, max_position_embeddings=128, rope_parameters=yarn).config.max_position_embeddings == 128


def test_a_model_larger_than_the_memory_is_refused_where_no_rank_shares_it(tokenizer, monkeypatch):
    size = sum(p.numel() * p.element_size() for p in build(tokenizer).parameters())
    for there, fits in ((size, True), (size - 1, False)):
        monkeypatch.setattr("psutil.virtual_memory", lambda there=there: SimpleNamespace(total=there))
        if fits:
            build(tokenizer)
        else:
            with pytest.raises(UserError, match="this machine has"):
                build(tokenizer)
    monkeypatch.setattr("launch.model.build.is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr("launch.model.build.world_size", lambda: 2)
    build(tokenizer)


def test_more_ranks_than_heads(tokenizer):
    with pytest.raises(UserError, match="more than the model's 4 attention heads"):
        build(tokenizer, tp=8)


def test_a_model_whose_loss_is_another_is_refused_before_training(tokenizer, monkeypatch):
    monkeypatch.setattr(LlamaConfig, "z_loss_coefficient", 0.1, raising=False)  # as Bamba's has it
    with pytest.raises(UnsupportedModel, match="z_loss_coefficient"):
        build(tokenizer)


def test_a_model_that_is_not_there(tokenizer):
    options = SftOptions(model="./nowhere")
    with pytest.raises(UserError, match=r"\./nowhere"):
        load_model(options, tokenizer, torch.float32, seed=0)
    with pytest.raises(UserError, match=r"\./nowhere"):
        load_tokenizer(options, list)


@pytest.mark.parametrize("model", ["/nope/x", "a/b/c", "~/nowhere", "nowhere/"])
def test_a_path_that_is_not_there(tokenizer, model):
    with pytest.raises(UserError, match=f"--model {model}: no such directory"):
        load_tokenizer(SftOptions(model=model), list)
    with pytest.raises(UserError, match=f"--model {model}: no such directory"):
        load_model(SftOptions(model=model), tokenizer, torch.float32, seed=0)


def test_a_model_that_is_a_file(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="is a file"):
        load_tokenizer(SftOptions(model=str(tmp_path / "model.safetensors")), list)


def test_a_saved_model_is_held_to_max_length_and_to_its_configuration(tokenizer, tmp_path):
    build(tokenizer).save_pretrained(tmp_path)
    options = SftOptions(model=str(tmp_path), max_length=2049)
    with pytest.raises(UserError, match=r"--max_length 2049 .* max_position_embeddings 2048"):
        load_model(options, tokenizer, torch.float32, seed=0)
    options.max_length = 2048
    load_model(options, tokenizer, torch.float32, seed=0)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 30}))
    for load in (load_tokenizer, lambda *_: load_model(options, tokenizer, torch.float32, seed=0)):
        with pytest.raises(UserError, match=r"config\.json: .*hidden size \(30\)"):
            load(options, list)


def rename(weights):
    return {f"transformer.{name}": weight for name, weight in weights.items()}


def without_a_norm(weights):
    return {name: weight for name, weight in weights.items() if name != "model.norm.weight"}


def narrower(weights):
    return weights | {"model.norm.weight": weights["model.norm.weight"][:16].clone()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename, r"lm_head\.weight, .*\(12 missing, 0 of another shape, 12 unknown\)"),
        (without_a_norm, r"model\.norm\.weight \(1 missing, 0 of another shape, 0 unknown\)"),
        (narrower, r"model\.norm\.weight \(0 missing, 1 of another shape, 0 unknown\)"),
    ],
)
def test_weights_that_are_not_the_configurations_are_not_made_up(tokenizer, tmp_path, change, words):
    build(tokenizer).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(change(weights), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"does not hold the weights of its configuration: {words}"):
        load_model(SftOptions(model=str(tmp_path)), tokenizer, torch.float32, seed=0)


def test_the_attention_can_be_chosen(tokenizer, tmp_path):
    build(tokenizer).save_pretrained(tmp_path)
    for source in ({"model": str(tmp_path)}, {"model_config": SMALL}):
        for attention in (None, "eager"):
            options = SftOptions(**source, attn_implementation=attention)
            model = load_model(options, tokenizer, torch.float32, seed=0)
            assert model.config._attn_implementation == (attention or "sdpa")
        for attention, words in (("flash_attention_2", "installed"), ("flex_attention", "no backward pass on a CPU")):
            with pytest.raises(UserError, match=words):
                load_model(SftOptions(**source, attn_implementation=attention), tokenizer, torch.float32, seed=0)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2 takes half precision alone; give --bf16 true"):
        check_trainable(model, SftOptions())
    check_trainable(model.bfloat16(), SftOptions())


def test_weights_that_have_no_place_are_said(tokenizer, tmp_path, capsys):
    """As of a configuration that has fewer layers than the file."""
    build(tokenizer, num_hidden_layers=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = {"num_hidden_layers": 1, "layer_types": None}
    (tmp_path / "config.json").write_text(json.dumps({**config, **layers}))
    load_model(SftOptions(model=str(tmp_path)), tokenizer, torch.float32, seed=0)
    assert "weights of" in (said := capsys.readouterr().out) and "model.layers.1.input_layernorm.weight" in said


def test_tied_weights_are_not_missing(tokenizer, tmp_path):
    build(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    load_model(SftOptions(model=str(tmp_path)), tokenizer, torch.float32, seed=0)


def test_a_pickle_of_weights_is_not_read(tokenizer, tmp_path):
    build(tokenizer).save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"could not be loaded: .*safetensors"):
        load_model(SftOptions(model=str(tmp_path)), tokenizer, torch.float32, seed=0)


FILES = {
    "model.safetensors": [b"", b"torn", b"\xff" * 100],
    "config.json": [b"", b"[]", b"{}", b"{"],
    "generation_config.json": [b'{"temperature": "x", "top_k": -3}', b'{"temperature": 0.9, "top_p": 0.6}'],
    "tokenizer.json": [b"", b"{}", b"[]"],
    "tokenizer_config.json": [b"[]", b"{", b'{"eos_token": 5}'],
}


@pytest.mark.parametrize(("name", "content"), [(name, c) for name, contents in FILES.items() for c in contents])
def test_files_of_a_model_that_cannot_be_read(tokenizer, tmp_path, name, content):
    build(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(content)
    options = SftOptions(model=str(tmp_path))
    with pytest.raises(UserError) as error:
        load_model(options, load_tokenizer(options, list), torch.float32, seed=0)
    assert str(tmp_path) in str(error.value) or name in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("break_", ["missing", "shard", "extra", "none"])
def test_an_export_that_is_not_whole(break_):
    config = LlamaConfig(**{k: v for k, v in SMALL.items() if k != "model_type"}, vocab_size=31)
    weights = dict(LlamaForCausalLM(config).state_dict())
    if break_ == "missing":
        del weights["model.norm.weight"]
    if break_ == "shard":  # what save_16bit_model leaves under tensor parallelism
        weights["lm_head.weight"] = weights["lm_head.weight"][:16]
    if break_ == "extra":
        weights["other"] = torch.zeros(1)
    if break_ == "none":
        assert_complete(weights, LlamaForCausalLM, config)
    else:
        with pytest.raises(RuntimeError, match="not complete"):
            assert_complete(weights, LlamaForCausalLM, config)


def save(folder, tokenizer, **config):
    values = {name: value for name, value in SMALL.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**values | {"vocab_size": len(tokenizer)} | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    options = SftOptions(model=str(folder))
    return options, load_tokenizer(options)


@pytest.mark.parametrize("pad", ["</s>", None, "<pad>"])
def test_eos_is_learned_though_it_is_the_padding_too(tmp_path, tokenizer, pad):
    """As in an export of a model whose tokenizer has no padding; `None`: that tokenizer itself."""
    given = copy.deepcopy(tokenizer)
    given.pad_token = pad
    padding = given.eos_token_id if pad is None else given.pad_token_id
    options, loaded = save(tmp_path, given, pad_token_id=padding)
    model = load_model(options, loaded, torch.float32, seed=0)
    eos = loaded.eos_token_id
    ids = torch.tensor([[5, eos, 6, 7, loaded.pad_token_id]])
    labels = torch.tensor([[5, eos, 6, 7, -100]])
    model(input_ids=ids, labels=labels, attention_mask=torch.tensor([[1, 1, 1, 1, 0]])).loss.backward()
    moved = model.get_input_embeddings().weight.grad.abs().sum(1) > 0
    assert moved.nonzero().flatten().tolist() == sorted([5, 6, eos])


def test_a_vocabulary_with_gaps_is_told_before_the_first_step(tmp_path):
    options, _ = save(tmp_path, byte_level("</s>"))
    file = tmp_path / "tokenizer.json"
    pieces = json.loads(file.read_text())
    first = next(iter(pieces["model"]["vocab"]))
    pieces["model"]["vocab"][first] = 401
    file.write_text(json.dumps(pieces))
    loaded = load_tokenizer(options)
    size = LlamaConfig.from_pretrained(tmp_path).vocab_size
    assert len(loaded) <= size < 401
    with pytest.raises(UserError) as error:
        load_model(options, loaded, torch.float32, seed=0)
    rows = f"--resize_embeddings true adds the {402 - size} rows"
    assert all(word in str(error.value) for word in (f"{first!r} has 401", f"a vocabulary of {size}", rows))
    options.resize_embeddings = True
    assert load_model(options, loaded, torch.float32, seed=0).config.vocab_size == 402


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("pad", ["</s>", "<new>"])
def test_rows_are_added_for_tokens_of_a_larger_tokenizer(tmp_path, tokenizer, tied, pad):
    """Padding may be a token that is learned, old or new; a model that has all rows stays as it is."""
    given = copy.deepcopy(tokenizer)
    options, _ = save(tmp_path, given, tie_word_embeddings=tied, pad_token_id=given.pad_token_id)
    options.resize_embeddings = True
    small = load_model(options, given, torch.float32, seed=0)
    size = small.config.vocab_size
    given.add_tokens(["<new>", "<other>"])
    given.pad_token = pad
    with pytest.raises(UserError, match="--resize_embeddings true adds the 2 rows"):
        load_model(SftOptions(model=str(tmp_path)), given, torch.float32, seed=0)
    model, again = (load_model(options, given, torch.float32, seed=0) for _ in range(2))
    assert model.config.vocab_size == model.lm_head.out_features == size + 2
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    for one, other, old in zip(model.parameters(), again.parameters(), small.parameters(), strict=True):
        assert torch.equal(one, other) and torch.equal(one[: len(old)], old)
        if len(one) > len(old):
            near = old.mean(0).expand(2, -1)
            torch.testing.assert_close(one[len(old) :], near, rtol=0, atol=1e-4)
    new = given.convert_tokens_to_ids(["<new>", "<other>", "</s>"])
    ids = torch.tensor([[5, *new]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert (model.get_input_embeddings().weight.grad[new[:2]].abs().sum(1) > 0).all()


def two_matrices(folder, tokenizer, equal: bool = False):
    options, _ = save(folder, tokenizer, tie_word_embeddings=False)
    if equal:
        weights = load_file(folder / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return options


@pytest.mark.parametrize("sharded", [False, True])
def test_two_matrices_are_not_tied_whatever_the_configuration_says(tmp_path, tokenizer, capsys, sharded):
    options = two_matrices(tmp_path, tokenizer)
    if sharded:
        loaded = LlamaForCausalLM.from_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        loaded.config.tie_word_embeddings = False
        loaded.save_pretrained(tmp_path, max_shard_size="10KB")
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        assert (tmp_path / "model.safetensors.index.json").exists()
    model = load_model(options, tokenizer, torch.float32, seed=0)
    assert not model.config.tie_word_embeddings and not torch.equal(
        model.lm_head.weight, model.get_input_embeddings().weight
    )
    assert "holds two matrices, lm_head.weight and model.embed_tokens.weight" in capsys.readouterr().out


def test_one_matrix_that_is_stored_twice_stays_tied(tmp_path, tokenizer, capsys):
    model = load_model(two_matrices(tmp_path, tokenizer, equal=True), tokenizer, torch.float32, seed=0)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.get_input_embeddings().weight
    assert "two matrices" not in capsys.readouterr().out
