"""What a run costs, before it begins and after: memory and floating-point operations.

Memory is estimated before anything is allocated, and compared with what is free. Training needs fp32 weights, their
gradients and AdamW's two moments: 16 bytes a parameter; then the activations of one micro-batch, and one chunk of
logits with its gradient. Sampling needs the weights, the KV cache, and the logits of all slots. The activations of a
layer are counted roughly, and rather too high.

FLOPs are counted as in the paper's figure 1 (after Yuan et al. 2023, appendix E). Training costs 6 a parameter and
token, a forward pass 2. An encoder's parameters see source tokens, a decoder's target tokens. Decoding costs
1.66 N + 2·n_layer·n_ctx·d a token. Departure: the paper prints a factor i inside that sum, which would make the cost of
one token grow with the square of its position, and is left out. The samples of a question share its prefill.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minidpost.errors import UserError
from minidpost.models.hf_config import Model
from minidpost.models.kvcache import KVCache, SharedPromptCache, T5Cache
from minidpost.models.weights import empty_model
from minidpost.sampling.generate import MAX_PROMPT_TOKENS
from minidpost.sampling.sampler import PREFILL_BATCH
from minidpost.selftraining.presets import Preset, n_parameters
from minidpost.training.losses import LOGITS_AT_ONCE

GB = 10**9
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMORY = Path("/proc/meminfo")


# -- memory -----------------------------------------------------------------------------------------------------------


def check_memory(model: Model, preset: Preset, *, dtype: torch.dtype, device: str) -> str:
    """What training and sampling need and what is free, in one line; UserError where it cannot fit.

    `model` may be on the meta device; `dtype` is that of sampling.
    """
    needed = {"training": training_bytes(model, preset), "sampling": sampling_bytes(model, preset, dtype)}
    text = ", ".join(f"{stage} {size / GB:.1f} GB" for stage, size in needed.items())
    free = available_bytes(device)
    if free is None:
        return f"memory: {text} (estimated)"
    if max(needed.values()) > free:
        raise UserError(
            f"memory: {text} needed (estimated), but {device} has {free / GB:.1f} GB free; a smaller model, or smaller "
            "--micro-batch-tokens (training) and --slots (sampling), or --activation-checkpointing might fit"
        )
    return f"memory: {text} (estimated) of {free / GB:.1f} GB free on {device}"


def training_bytes(model: Model, preset: Preset) -> int:
    """The peak of an SFT or DPO step."""
    config = model.config
    n_layers = max(len(stack.layers) for stack in model.stacks)
    n_tokens = max(preset.micro_batch_tokens, preset.max_source + preset.max_target)
    layer_bytes = 4 * n_tokens * (10 * config.d_model + 4 * config.d_ff)  # the activations of one layer
    if preset.activation_checkpointing:  # every layer's input, and one layer at a time computed again
        activation_bytes = n_layers * 4 * n_tokens * config.d_model + layer_bytes
    else:
        activation_bytes = n_layers * layer_bytes
    logits_bytes = 12 * min(LOGITS_AT_ONCE, n_tokens * config.vocab_size)  # logits, log-softmax, gradient
    return 16 * n_parameters(model) + activation_bytes + logits_bytes


def sampling_bytes(model: Model, preset: Preset, dtype: torch.dtype) -> int:
    """Weights, KV cache for the longest prompts that the preset trains on, and logits of all slots."""
    max_prompt = min(preset.max_source, MAX_PROMPT_TOKENS)
    n_rows = preset.slots + PREFILL_BATCH
    cache = empty_model(model.config).to(dtype).new_cache(n_rows, max_prompt, preset.max_new_tokens)
    logits_bytes = 12 * preset.slots * model.config.vocab_size
    return dtype.itemsize * n_parameters(model) + tensor_bytes(cache) + logits_bytes


def tensor_bytes(cache: KVCache | SharedPromptCache | T5Cache) -> int:
    """The size of all tensors of a cache, those of the caches that it consists of included."""
    size = 0
    for value in vars(cache).values():
        if isinstance(value, Tensor):
            size += value.nbytes
        elif isinstance(value, KVCache | SharedPromptCache):
            size += tensor_bytes(value)
    return size


def available_bytes(device: str) -> int | None:
    """Free memory of a device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type != "cpu":
        return None
    limits = []
    if MEMORY.is_file():
        lines = MEMORY.read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        limits.append(1024 * int(fields["MemAvailable"].split()[0]))
    else:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if CGROUP_LIMIT.is_file():
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
        if limit != "max":
            limits.append(int(limit))
    return min(limits)


# -- floating-point operations ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """What the formulas need: the parameters and the layers that a source and a target token pass, and the width d."""

    n_source: int
    n_target: int
    n_source_layers: int
    n_target_layers: int
    width: int


def model_size(model: Model) -> ModelSize:
    """Parameters without the input embedding; the output layer counts with the target tokens, tied or not."""
    source, target = model.stacks
    head = model.head.weight if model.head is not None else model.embedding.weight
    return ModelSize(
        n_source=n_parameters(source),
        n_target=n_parameters(target) + head.numel(),
        n_source_layers=len(source.layers),
        n_target_layers=len(target.layers),
        width=model.config.d_model,
    )


def forward_flops(size: ModelSize, n_source: int, n_target: int) -> float:
    """One forward pass over `n_source` source and `n_target` target tokens."""
    return 2.0 * (size.n_source * n_source + size.n_target * n_target)


def training_flops(size: ModelSize, n_source: int, n_target: int) -> float:
    """Forward and backward pass."""
    return 3 * forward_flops(size, n_source, n_target)


def sampling_flops(size: ModelSize, prompt_lengths: Sequence[int], completion_lengths: Sequence[int]) -> float:
    """Prefill of the prompts, each once, and cached decoding of the completions; lengths in tokens."""
    prefill = sum(n * (2 * size.n_source + 2 * size.n_source_layers * n * size.width) for n in prompt_lengths)
    # The i-th token of a completion attends to i tokens, a token of an n-token completion to n / 2 on average.
    attention = 2 * size.n_target_layers * size.width
    decoding = sum(n * (1.66 * size.n_target + attention * n / 2) for n in completion_lengths)
    return float(prefill + decoding)
