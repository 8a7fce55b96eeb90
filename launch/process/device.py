"""Whether this run's tensors lie on a GPU: DeepSpeed decides, by what is there or by `DS_ACCELERATOR=cpu`."""


def uses_gpu() -> bool:
    from deepspeed.accelerator import get_accelerator  # slow to import, and not needed to read data

    return get_accelerator().device_name() == "cuda"
