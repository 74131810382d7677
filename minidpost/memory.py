"""How much memory a run will need, estimated before anything is allocated, and how much there is.

Training keeps fp32 weights, their gradients and AdamW's two moments: 16 bytes a parameter. To these come the
activations of one micro-batch and one chunk of logits with its gradient. Sampling keeps the weights, the cache, and
logits a slot. The counts of activations a layer are rough and lean upwards.
"""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from minidpost.checkpoint import empty_model
from minidpost.files import UserError
from minidpost.generation import MAX_PROMPT_TOKENS
from minidpost.objectives import LOGITS_AT_ONCE
from minidpost.presets import Preset
from minidpost.sampler import SHELF

GB = 10**9
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
MEMORY = Path("/proc/meminfo")


def check_memory(model: nn.Module, preset: Preset, dtype: torch.dtype, device: str) -> str:
    """What the stages need and what there is, in one line; UserError where it cannot fit.

    `model` may be on the meta device; `dtype` is that of sampling.
    """
    needs = {"training": training_bytes(model, preset), "sampling": sampling_bytes(model, preset, dtype)}
    text = ", ".join(f"{stage} {size / GB:.1f} GB" for stage, size in needs.items())
    free = available_bytes(device)
    if free is not None and max(needs.values()) > free:
        raise UserError(
            f"memory: {text} needed (estimated), but {device} has {free / GB:.1f} GB free; a smaller model, or smaller "
            "--micro-batch-tokens (training) and --slots (sampling), or --activation-checkpointing might fit"
        )
    return f"memory: {text} (estimated)" + ("" if free is None else f" of {free / GB:.1f} GB free on {device}")


def training_bytes(model: nn.Module, preset: Preset) -> int:
    """The peak of an SFT or DPO step."""
    config, stacks = model.config, dict.fromkeys(model.stacks)
    n_tokens = max(preset.micro_batch_tokens, preset.max_source + preset.max_target)
    a_layer = 4 * n_tokens * (10 * config.d_model + 4 * config.d_ff)
    n_layers = max(len(stack.layers) for stack in stacks)
    inputs = n_layers * 4 * n_tokens * config.d_model
    layers = inputs + a_layer if preset.activation_checkpointing else n_layers * a_layer
    logits = 12 * min(LOGITS_AT_ONCE, n_tokens * config.vocab_size)  # logits, log-softmax, gradient
    return 16 * sum(p.numel() for p in model.parameters()) + layers + logits


def sampling_bytes(model: nn.Module, preset: Preset, dtype: torch.dtype) -> int:
    """Weights, cache for the longest prompts that the preset trains on, and logits of all slots."""
    rows = preset.slots + SHELF
    empty = empty_model(model.config).to(dtype)
    cache = tensor_bytes(empty.new_cache(rows, min(preset.max_source, MAX_PROMPT_TOKENS), preset.max_new_tokens))
    logits = 12 * preset.slots * model.config.vocab_size
    return dtype.itemsize * sum(p.numel() for p in model.parameters()) + cache + logits


def tensor_bytes(holder: object) -> int:
    """The size of all tensors that an object, or what it holds, has as attributes."""
    parts = vars(holder).values() if hasattr(holder, "__dict__") else ()
    return sum(part.nbytes if isinstance(part, Tensor) else tensor_bytes(part) for part in parts)


def available_bytes(device: str) -> int | None:
    """Free memory of a device; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if torch.device(device).type != "cpu":
        return None
    found = []
    if MEMORY.is_file():
        fields = dict(line.split(":", 1) for line in MEMORY.read_text(encoding="ascii").splitlines() if ":" in line)
        found.append(1024 * int(fields["MemAvailable"].split()[0]))
    elif hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if CGROUP_LIMIT.is_file() and (limit := CGROUP_LIMIT.read_text(encoding="ascii").strip()) != "max":
        found.append(int(limit))
    return min(found, default=None)
