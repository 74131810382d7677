"""Which precision computes what, and on which device: decided here and nowhere else."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the precisions of weights, by the names that flags take


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def sampling_dtype(device: str) -> torch.dtype:
    """The precision of weights in sampling and evaluation: bf16 on CUDA, fp32 elsewhere.

    [ours] The published code samples from Llama with bf16 weights too, but from T5 with fp32 weights under bf16
    autocast; `--dtype fp32` is nearest to that, and slower.
    """
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The precision in which log-probabilities are computed: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """The precision of training's forward passes: bf16 on a CUDA device that has it, fp32 elsewhere.

    Master weights are fp32 throughout. A forward pass uses each weight once, so that a cache of bf16 copies would cost
    memory and save nothing.
    """
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)
    return nullcontext()
