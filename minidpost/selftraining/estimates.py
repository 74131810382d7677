"""What a run costs, before it begins and after: memory and floating-point operations.

Memory. How much a run will need, estimated before anything is allocated, and how much there is.

Training keeps fp32 weights, their gradients and AdamW's two moments: 16 bytes a parameter. To these come the
activations of one micro-batch and one chunk of logits with its gradient. Sampling keeps the weights, the cache, and
logits a slot. The counts of activations a layer are rough and lean upwards.

FLOPs. Floating-point operations of a run, by the paper's figure 1 (after Yuan et al. 2023, appendix E).

Training costs 6 a parameter and token, a forward pass 2. An encoder's parameters see source tokens, a decoder's target
tokens. Decoding costs 1.66 N + 2·n_layer·n_ctx·d a token; the paper prints a factor i inside that sum, which would make
the cost of one token grow with its position twice over, and is left out. The samples of a question share its prefill.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from minidpost.errors import UserError
from minidpost.models.weights import empty_model
from minidpost.sampling.generate import MAX_PROMPT_TOKENS
from minidpost.sampling.sampler import PREFILL_BATCH
from minidpost.selftraining.presets import Preset
from minidpost.training.losses import LOGITS_AT_ONCE

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
    rows = preset.slots + PREFILL_BATCH
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


# -- floating-point operations --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """What the formulas need of a model: parameters that a source and a target token pass, layers they pass, width."""

    n_source: int
    n_target: int
    n_source_layers: int
    n_target_layers: int
    width: int


def model_size(model: nn.Module) -> Size:
    """Parameters without the input embedding; the output layer counts with the target tokens, tied or not."""
    source, target = model.stacks
    head = model.head.weight if model.head is not None else model.embedding.weight
    return Size(
        n_source=count(source),
        n_target=count(target) + head.numel(),
        n_source_layers=len(source.layers),
        n_target_layers=len(target.layers),
        width=model.config.d_model,
    )


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(size: Size, n_source: int, n_target: int) -> float:
    """One forward pass over so many tokens."""
    return 2.0 * (size.n_source * n_source + size.n_target * n_target)


def training_flops(size: Size, n_source: int, n_target: int) -> float:
    """Forward and backward."""
    return 3 * forward_flops(size, n_source, n_target)


def sampling_flops(size: Size, prompt_lengths: list[int], completion_lengths: list[int]) -> float:
    """Prefill of the prompts, each once, and cached decoding of the completions."""
    prefill = sum(n * (2 * size.n_source + 2 * size.n_source_layers * n * size.width) for n in prompt_lengths)
    context = 2 * size.n_target_layers * size.width
    return float(prefill + sum(n * (1.66 * size.n_target + context * n / 2) for n in completion_lengths))
