"""Losses in models that torch or transformers has split: tensor parallel by DTensors, FSDP2, and both at once.

Held to the same model on one process with the loss written out, prior and z-loss with it: losses and all gradients.
"""

import contextlib
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from smoothing import install_smoothed_loss, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from smoothing.install import causal_lm
from smoothing.reference import onehot_cross_entropy
from tests.smoothing.model.test_install import EXTRAS, HIDDEN, TOKENS, VOCAB, batch, model_of
from tests.support.ranks import pool

transformers = pytest.importorskip("transformers")


WHOLE_LOGITS = ("fsdp", "fsdp1", "fsdp1-flat", "ddp")  # these split or copy weights, not logits


class Gathered(TorchDispatchMode):
    """The most numbers that any collective has handed a rank."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "_c10d_functional" and "gather" in func.name() and isinstance(result, torch.Tensor):
            self.most = max(self.most, result.numel())
        return result


def plain(extras: bool) -> dict:
    """Loss and gradients of one process."""
    model, inputs = model_of(), batch()
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    more = {"prior_V": EXTRAS["smoothing_prior"], "z_loss": EXTRAS["z_loss"]} if extras else {}
    loss = onehot_cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), 0.1, **more)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@contextlib.contextmanager
def fsdp1_on_a_cpu():
    """Tell the first FSDP to run here: it looks for a GPU, but needs none."""
    from torch.distributed.fsdp import fully_sharded_data_parallel as module
    from torch.distributed.fsdp._common_utils import _FSDPDeviceHandle

    def init_device_handle(state, *_):
        state._device_handle = _FSDPDeviceHandle.from_device(torch.device("cpu"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_init_device_handle", init_device_handle)
        yield


def split(way: str, path: str | None):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.fsdp.wrap import CustomPolicy
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
    from torch.nn.parallel import DistributedDataParallel
    from transformers.distributed import DistributedConfig

    size = dist.get_world_size()
    if way == "tp_plan":
        rank = str(dist.get_rank())
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=str(size))  # as torchrun has set them
        model = transformers.LlamaForCausalLM.from_pretrained(
            path, distributed_config=DistributedConfig(tp_size=size)
        )
        assert model.lm_head.weight.to_local().shape[0] < VOCAB
        return model.train()
    model = model_of()
    plans = {
        "local": ColwiseParallel(output_layouts=Shard(-1), use_local_output=True),
        "dtensor": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        "replicated": ColwiseParallel(output_layouts=Replicate()),
    }
    if way == "ddp":
        return DistributedDataParallel(model)
    if way in ("fsdp1", "fsdp1-flat"):
        # the head is a unit of its own, as under a size-based policy
        wrapped = CustomPolicy(lambda module: module in (model.lm_head, *model.model.layers))
        with fsdp1_on_a_cpu():
            return FullyShardedDataParallel(model, auto_wrap_policy=wrapped, use_orig_params=way == "fsdp1")
    if way == "fsdp":
        fully_shard(model.lm_head, mesh=init_device_mesh("cpu", (size,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    elif way == "fsdp-tp":
        mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], {"lm_head": plans["local"]})
        fully_shard(model.model.layers[0], mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    else:
        parallelize_module(model, init_device_mesh("cpu", (size,)), {"lm_head": plans[way]})
    return model


def weights(model) -> dict[str, torch.Tensor]:
    """Whole weights, by their names in the model itself."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    whole = contextlib.nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model)
    with whole:
        return {
            name.replace("module.", "").replace("_fsdp_wrapped_", ""): (
                weight.full_tensor() if isinstance(weight, DTensor) else weight
            )
            .detach()
            .clone()
            for name, weight in causal_lm(model).named_parameters()
        }


def train(way: str, head: str, path: str | None) -> dict:
    model = split(way, path)
    before = {name: weight.clone() for name, weight in weights(model).items()}
    with install_smoothed_loss(model, head=head, **({} if head == "dense" else EXTRAS)):
        with Gathered() as gathered:
            loss = model(**batch()).loss
            loss.backward()
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        gradients = {name: before[name] - weight for name, weight in weights(model).items()}
        model.eval()
        with torch.no_grad():
            evaluation = model(**batch())
    return {"loss": loss.detach(), **gradients}, evaluation.loss, evaluation.logits.shape[-1], gathered.most


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    model_of().save_pretrained(path)
    return path


def ways():
    for way in ("local", "dtensor", "replicated", "tp_plan", "fsdp", "fsdp1", "fsdp1-flat", "ddp"):
        yield way, "fused"
        if way not in WHOLE_LOGITS:
            yield way, "sharded"
    yield "local", "dense"
    yield "dtensor", "dense"


@pytest.mark.parametrize(("way", "head"), ways())
def test_a_split_model_trains_as_one_process_does(way, head, saved):
    expected, nll = plain(extras=head != "dense"), None
    for result, evaluation, width, most in pool(2).run(train, way, head, saved, time_limit=90):
        nll = evaluation if nll is None else nll
        assert torch.equal(evaluation, nll)
        assert (width < VOCAB) == (way == "local"), "logits are as the plan of torch leaves them"
        assert result.keys() == expected.keys()
        if head == "fused" and way not in WHOLE_LOGITS:
            assert most <= 8, "more than a loss and its probes has been gathered"
        elif head == "sharded" and way != "replicated":
            assert most < 2 * TOKENS * VOCAB, "logits have been gathered"
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def fsdp_by_tp() -> tuple:
    return train("fsdp-tp", "fused", None)


def test_fsdp_by_tensor_parallelism():
    expected = plain(extras=True)
    for result, *_ in pool(4).run(fsdp_by_tp, time_limit=120):
        for name, value in expected.items():
            torch.testing.assert_close(result[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def from_dtensors(rank_columns: int) -> list:
    """Losses and gradients straight from DTensors, the vocabulary split as `torch.chunk` does it: 3, 3 and 1."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    hidden, weight, target = tensors(rank_columns)
    split = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    states = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    options = {"label_smoothing": 0.1, "logit_scale": 0.3}
    results = []
    for loss in (
        vocab_parallel_linear_cross_entropy(states, split, target, **options),
        vocab_parallel_cross_entropy(torch.nn.functional.linear(states, split), target, **options),
    ):
        gradients = torch.autograd.grad(loss, [states, split])
        results.append([loss.detach(), *(grad.full_tensor() for grad in gradients)])
    halves = distribute_tensor(weight, mesh, [Shard(1)])
    with pytest.raises(ValueError, match="split along its vocabulary"):
        vocab_parallel_linear_cross_entropy(hidden, halves, target)
    return results


def tensors(columns: int) -> tuple:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, HIDDEN, generator=generator, dtype=torch.double)
    weight = torch.randn(columns, HIDDEN, generator=generator, dtype=torch.double)
    return hidden, weight, torch.tensor([0, columns - 1, -100, 3, 1])


@pytest.mark.parametrize("columns", [7, 5], ids=["3-3-1", "2-2-1"])
def test_losses_take_dtensors(columns):
    hidden, weight, target = tensors(columns)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = F.cross_entropy(0.3 * hidden @ weight.T, target, label_smoothing=0.1)
    expected = [loss.detach(), *torch.autograd.grad(loss, [hidden, weight])]
    for results in pool(3).run(from_dtensors, columns):
        for result in results:
            for got, value in zip(result, expected, strict=True):
                torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)
