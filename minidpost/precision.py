"""Which precision computes what, and on which device: decided here and nowhere else."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # the precisions of weights, by the names that flags take

# Where Linux lists a processor's instructions. torch has asked the processor for them under other names from version to
# version (2.6 by private functions alone), so that this file is the one way that holds for all of them.
CPU_INFO = Path("/proc/cpuinfo")
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}  # products of bf16 numbers, summed in fp32
# [ours] From how many parameters on such a processor is faster in bf16 (benchmarks/results/precision.md): a step of a
# smaller model is too short for its products to count. A table and no clock, as a run must repeat.
MIN_PARAMETERS_FOR_BF16 = {"training": 5_000_000, "sampling": 20_000_000}


def default_device() -> str:
    """CUDA where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def prepare_device(device: str) -> None:
    """What is set once for a device that was chosen, before anything is computed on it.

    On an H100 or later, recent versions of torch take cuDNN's kernel for scaled_dot_product_attention where they may.
    That kernel builds a plan for every new shape, which takes from milliseconds to a second, and nearly every
    micro-batch has a shape of its own. The other fused kernels need no plan.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy without waiting for what a GPU is still doing."""
    return pinned(tensor, device).to(device, non_blocking=True)


def pinned(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host in memory that a GPU can read by itself; as it is where `device` is no GPU.

    From other memory a copy of more than 64 KB waits for all that the GPU is still doing. The pinned tensor may be let
    go at once: torch records an event behind the copy, and gives the memory to no other tensor before.
    """
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        return tensor.pin_memory()
    return tensor


def sampling_dtype(name: str, device: str, n_parameters: int) -> torch.dtype:
    """The precision of weights in sampling and evaluation: one of DTYPES, or for "auto" the fastest (`fastest_dtype`).

    [ours] The published code samples from Llama with bf16 weights too, but from T5 with fp32 weights under bf16
    autocast; `--dtype fp32` is nearest to that, and slower.
    """
    return fastest_dtype("sampling", device, n_parameters) if name == "auto" else DTYPES[name]


def training_dtype(name: str, device: str, n_parameters: int) -> torch.dtype:
    """The precision of training's forward passes (see `autocast`): one of DTYPES, or for "auto" the fastest."""
    return fastest_dtype("training", device, n_parameters) if name == "auto" else DTYPES[name]


def fastest_dtype(work: str, device: str, n_parameters: int) -> torch.dtype:
    """The precision in which a device is fastest at "training" or "sampling".

    bf16 on a CUDA device that multiplies it, and for models of at least MIN_PARAMETERS_FOR_BF16 on a CPU that does;
    fp32 elsewhere.
    """
    kind = torch.device(device).type
    is_worth_it = kind == "cpu" and n_parameters >= MIN_PARAMETERS_FOR_BF16[work] and cpu_multiplies_bf16()
    return torch.bfloat16 if cuda_multiplies_bf16(kind) or is_worth_it else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """The name of one of DTYPES."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def key_dtype(dtype: torch.dtype, device: torch.device | str) -> torch.dtype:
    """The precision of the keys in the cache of a model with weights of `dtype`: the same, but fp32 for bf16 on a CPU.

    There products of few queries and bf16 keys take longer, and round the scores. Values keep the weights' precision:
    products with bf16 ones take half the time.
    """
    is_bf16_on_cpu = dtype == torch.bfloat16 and torch.device(device).type == "cpu"
    return torch.float32 if is_bf16_on_cpu else dtype


def cuda_multiplies_bf16(kind: str) -> bool:
    """Whether devices of this kind are CUDA devices that have bf16 themselves; older ones emulate it, slowly."""
    return kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_multiplies_bf16() -> bool:
    """Whether the processor has instructions that multiply bf16; False where the system does not list them."""
    if not CPU_INFO.is_file():
        return False
    for line in CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":  # of the first core; the others have the same
            return not BF16_INSTRUCTIONS.isdisjoint(value.split())
    return False


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The precision in which log-probabilities are computed: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def forward_dtype(device: torch.device, dtype: torch.dtype | None = None) -> torch.dtype:
    """What `autocast` makes of `dtype`, and what weights are held in that are not trained: bf16 or fp32."""
    if dtype is None and cuda_multiplies_bf16(device.type):
        return torch.bfloat16
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype | None = None) -> AbstractContextManager[object]:
    """Training's forward passes in bf16 for `dtype` bf16, and as the weights are for any other.

    None: bf16 on a CUDA device that multiplies it, else as the weights are. Weights that are trained are fp32
    throughout. A forward pass uses each weight once, so that a cache of bf16 copies would cost memory and save nothing.
    """
    if forward_dtype(device, dtype) != torch.bfloat16:
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
