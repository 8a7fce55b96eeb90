"""What a step asks of a GPU, seen without one (`fake_gpu`): for what the host waits, what is launched, what memory.

Sizes are those of real models. That the numbers are right is for `test_kernels.py` and `test_device.py` to say.
"""

import importlib.util
import math

import pytest
import torch
import torch.distributed as dist

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from smoothing import (
    VocabShard,
    install_smoothed_loss,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from tests.support.fake_gpu import allow_cuda_tensors, fake_gpu, gradients

TOKENS, VOCAB, HIDDEN = 8192, 128256, 4096
MIB = 1 << 20


@pytest.fixture(scope="module")
def cuda_tensors(tmp_path_factory):
    allow_cuda_tensors(tmp_path_factory.mktemp("fake_gpu"))


@pytest.fixture
def gpu(cuda_tensors, monkeypatch):
    with fake_gpu(monkeypatch) as seen:
        yield seen


@pytest.fixture(params=[1, 8])
def shard(request):
    """The whole vocabulary, or one of eight ranks' share of it that the ranks have agreed on before."""
    if request.param == 1:
        yield VocabShard.whole(VOCAB)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=request.param)
    try:
        shard = VocabShard.split(VOCAB, dist.group.WORLD)
        shard.agree(shard.size)
        yield shard
    finally:
        dist.destroy_process_group()


def leaf(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)


def labels(tokens: int) -> torch.Tensor:
    return torch.zeros(tokens, dtype=torch.int64, device="cuda")


def fused(shard: VocabShard, tokens: int = TOKENS, **options):
    """A step of the fused head, which gives the gradients of hidden states and weight."""
    hidden, weight, target = leaf(tokens, HIDDEN), leaf(shard.size, HIDDEN), labels(tokens)

    def step():
        return gradients(
            vocab_parallel_linear_cross_entropy(hidden, weight, target, shard, label_smoothing=0.1, **options)
        )

    return step


@pytest.mark.parametrize("labelled", [TOKENS, 3000])
@pytest.mark.parametrize("told", [True, False])
def test_the_fused_head_waits_for_a_count_unless_it_is_told(gpu, shard, labelled, told):
    gpu.labelled = labelled
    step = fused(shard, label_tokens=labelled if told else None)
    step()  # what is the same in each step is brought to the device
    gpu.forget()
    step()
    assert gpu.waits == ([] if told else ["nonzero"])


def test_a_captured_graph_depends_on_no_number_of_labels(gpu, shard, monkeypatch):
    """Its replays may have more or fewer."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    done = []
    for count in (3000, None):
        step = fused(shard, label_tokens=count)
        step()
        gpu.forget()
        step()
        assert gpu.waits == []
        done.append(gpu.operations + gpu.launches)
    assert done[0] == done[1] and "labelled_kernel" not in done[0]


OPTIONS = {
    "bias": {"bias": True},
    "softcap": {"logit_softcap": 5.0},
    "softcap, bias": {"logit_softcap": 5.0, "bias": True},
    "prior": {"smoothing_prior": True},
    "z-loss": {"z_loss": 1e-4},
    "probabilities": {"probabilities": True},
    "probabilities, prior": {"probabilities": True, "smoothing_prior": True},
    "none": {"reduction": "none"},
    "none, bias": {"reduction": "none", "bias": True},
    "items": {"num_items_in_batch": 7},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_no_option_of_the_fused_head_makes_the_host_wait(gpu, shard, name, dtype):
    tokens, hidden, options = 256, 64, dict(OPTIONS[name])
    inputs = [leaf(tokens, hidden, dtype=dtype), leaf(shard.size, hidden, dtype=dtype)]
    if options.pop("probabilities", False):
        inputs.append(torch.empty(tokens, shard.size, device="cuda"))
    else:
        inputs.append(labels(tokens))
        options["label_tokens"] = 200
    if "bias" in options:
        options["bias"] = leaf(shard.size, dtype=dtype)
    if "smoothing_prior" in options:
        options["smoothing_prior"] = torch.empty(shard.size, device="cuda")

    def step():
        return gradients(vocab_parallel_linear_cross_entropy(*inputs, shard, label_smoothing=0.1, **options))

    step()
    gpu.forget()
    for gradient, given in zip(step(), inputs[:2], strict=False):
        assert (gradient.shape, gradient.dtype) == (given.shape, given.dtype)
    assert gpu.waits == []


def test_the_sharded_head_waits_for_nothing(gpu, shard):
    logits, target = leaf(TOKENS, shard.size), labels(TOKENS)

    def step():
        return gradients(vocab_parallel_cross_entropy(logits, target, shard, label_smoothing=0.1))

    step()
    gpu.forget()
    (gradient, *_) = step()
    assert gradient.shape == logits.shape and gradient.dtype == logits.dtype
    assert gpu.waits == []
    assert gpu.launches == dict.fromkeys(("statistics_kernel", "combine_kernel", "sum_kernel", "gradient_kernel"), 1)
    # torch's own, beside the kernels: each takes longer to launch than to do, and a rank's pass takes a tenth of a ms
    assert own_operations(gpu) <= {1: 1, 8: 36}[shard.world_size]
    assert gpu.most_bytes <= gradient.nbytes + 2 * MIB  # the gradient, and some numbers a token


def own_operations(gpu) -> int:
    """Torch operations that launch a kernel, but for the upstream gradient that `gradients` makes."""
    return gpu.operations.total() - gpu.operations["ones_like"] - gpu.operations["clone"]  # of nothing: an anchor


@pytest.mark.parametrize("labelled", [TOKENS, 5000])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_launches_and_collectives_are_as_many_as_groups(gpu, shard, groups, labelled):
    """At most 6 a group of tokens, 11 for two pieces on several ranks, and 8 besides; what ranks compare on top."""
    pieces = groups if shard.world_size == 1 else 2 * groups
    step = fused(shard, label_tokens=labelled, chunk_bytes=2 * shard.size * -(-labelled // groups))
    gpu.forget()
    step()
    each = ("statistics_kernel", "combine_kernel", "gradient_kernel")
    once = ["gather_kernel", "prior_rows_kernel", "hidden_gradient_kernel", "sum_kernel", "scale_kernel"]
    once += ["labelled_kernel"] * (labelled < TOKENS)
    assert gpu.launches == dict.fromkeys(each, pieces) | dict.fromkeys(once, 1)
    assert gpu.operations["mm"] + gpu.operations["addmm"] == 2 * pieces + groups
    # Σ W, an assertion, and, of a sum over groups, its rounding; between ranks the handshake
    own = 2 * pieces + groups + 2 + (groups > 1)
    assert own_operations(gpu) <= own + (0 if shard.world_size == 1 else 34)
    # a handshake and statistics; Σ W and hidden gradients
    assert gpu.collectives == (
        {} if shard.world_size == 1 else {"allgather_base": 1 + pieces, "allreduce": 1 + pieces}
    )


@pytest.mark.parametrize("chunks", [1, 3])
def test_launches_with_logits_in_fp32(gpu, shard, chunks):
    buffers = 1 if shard.world_size == 1 else 2
    budget = buffers * 4 * shard.size * -(-TOKENS // chunks)
    step = fused(shard, label_tokens=TOKENS, chunk_bytes=budget, fp32_logits=True)
    gpu.forget()
    step()
    kernels = ("statistics_kernel", "combine_kernel", "gradient_kernel")
    assert gpu.launches == dict.fromkeys(kernels, chunks) | {"scale_kernel": 1}
    assert gpu.collectives == (
        {} if shard.world_size == 1 else {"allgather_base": 1 + chunks, "allreduce": 1 + chunks}
    )


@pytest.mark.parametrize("labelled", [TOKENS, 2000, 3 * TOKENS])
def test_memory_of_the_fused_head(gpu, shard, labelled):
    """Over the inputs, what `docs/scaling.md` says.

    Labelled hidden states, their gradient in fp32, a group's logits, and the weight's gradient, in fp32 if there are
    several groups; or, when the logits are gone, the gradients as they are returned.
    """
    tokens = max(labelled, TOKENS)
    step = fused(shard, tokens, label_tokens=labelled)
    gpu.forget()
    returned = step()[:2]
    assert [gradient.dtype for gradient in returned] == [torch.bfloat16] * 2
    states, weight = 2 * labelled * HIDDEN, 2 * shard.size * HIDDEN
    one = labelled <= 2 * HIDDEN
    groups = 1 if one else math.ceil(labelled / (max(256 * MIB, weight) // (2 * shard.size)))
    logits = 2 * shard.size * math.ceil(labelled / groups)
    most = max(3 * states + logits + weight * (1 if one else 2), weight * (1 if one else 3) + 2 * tokens * HIDDEN)
    assert most <= gpu.most_bytes <= most + 20 * MIB  # sums of hidden states over 32 tokens, and some numbers a token


@pytest.mark.parametrize("labelled", [TOKENS, 2000])
def test_memory_with_logits_in_fp32(gpu, shard, labelled):
    """Over the inputs: labelled hidden states, if not all are, both gradients' sums in fp32 and a chunk's logits.

    Or the weight's sum and both gradients as they are returned.
    """
    step = fused(shard, label_tokens=labelled, fp32_logits=True)
    gpu.forget()
    returned = step()[:2]
    states, weight = 2 * labelled * HIDDEN, 2 * shard.size * HIDDEN
    buffers = 1 if shard.world_size == 1 else 2
    chunks = math.ceil(labelled / (max(256 * MIB, weight) // (4 * buffers * shard.size)))
    logits = 4 * shard.size * min(buffers, chunks) * math.ceil(labelled / chunks)
    picked = 0 if labelled == TOKENS else states
    most = max(picked + 2 * states + 2 * weight + logits, 2 * weight + sum(gradient.nbytes for gradient in returned))
    assert most <= gpu.most_bytes <= most + 18 * MIB  # 1,024 hidden states in fp32, and some numbers a token


@pytest.mark.parametrize(("head", "once"), [("fused", ["allclose"]), ("sharded", [])])
def test_a_model_with_the_loss_installed_waits_for_nothing(gpu, head, once):
    """But that the fused head looks once, in the first forward, whether the model changes its logits."""
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, use_cache=False, **sizes)).train()
        ids, items = torch.zeros(2, 64, dtype=torch.int64), torch.ones((), dtype=torch.int64)
    install_smoothed_loss(model, head=head, on_stats=lambda stats: stats.nll.sum())
    for waits in (once, []):
        gpu.forget()
        outputs = model(input_ids=ids, labels=ids, num_items_in_batch=items, label_tokens=100)
        assert outputs.loss.shape == ()
        assert gpu.waits == waits
