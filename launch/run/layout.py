"""The facts of a run that its checkpoints keep: its layout over ranks, and its data."""

from collections.abc import Callable

from launch.common.errors import UserError
from launch.common.messages import listed
from launch.config.options import SftOptions
from launch.config.training_arguments import SftTrainingArguments
from launch.data.prepared import EncodedData
from launch.process.ranks import on_all_ranks


def layout(options: SftOptions, args: SftTrainingArguments, data: EncodedData) -> dict:
    """Return the facts for a manifest. Raises and collectives: those of `same_everywhere`."""
    replicas = args.world_size // options.tp
    return {
        "tp": options.tp,
        "data_parallel": replicas,
        "zero": args.hf_deepspeed_config.config["zero_optimization"]["stage"],
        "rows_a_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * replicas,
        "data": same_everywhere(lambda: data.digest),
        **({"adapter": adapter_words(options)} if options.lora_rank else {}),
    }


def adapter_words(options: SftOptions) -> str:
    """Return what an adapter's weights depend on besides its base."""
    targets = " ".join(options.lora_targets or ["all-linear"])
    return f"{'DoRA' if options.dora else 'LoRA'} of rank {options.lora_rank} in {targets} of {options.model}"


def same_everywhere(digest: Callable[[], str]) -> str:
    """Return the digest of the rows. Raises `UserError` if ranks have read others, say from other files on each node.

    Collectives: one gather of objects.
    """
    digests = on_all_ranks(digest)
    if other := [rank for rank, value in enumerate(digests) if value != digests[0]]:
        raise UserError(
            f"the training data is not the same on all ranks: {listed('rank', other)} read other rows than rank 0; "
            "give every node the same files"
        )
    return digests[0]
