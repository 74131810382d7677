"""What a run costs, before it begins and after: memory, disk, floating-point operations, and hours on a CPU.

Memory is estimated before anything is allocated, and compared with what is free. Training needs fp32 weights, their
gradients and AdamW's two moments: 16 bytes a parameter; then the activations of one micro-batch, and one chunk of
logits with its gradient. With LoRA it is the adapters' parameters that take 16 bytes, and the frozen ones take 2 (bf16)
or 4. Sampling needs the weights, the KV cache, and the logits of all slots. The activations of a layer are counted
roughly, and rather too high; what a rehearsal measures (rehearsal.py) is exact.

A run's models stay on the disk (those that --keep names), 4 bytes a parameter for each SFT and DPO, or 2 with
--save-dtype bf16, and with LoRA their adapters too. While a training is at work, so do two saved states of it, weights
and AdamW's moments, 12 bytes a parameter that is trained: the last one, until the next is whole.

FLOPs are counted as in the paper's figure 1 (after Yuan et al. 2023, appendix E). Training costs 6 a parameter and
token, a forward pass 2. With LoRA training costs 4, as frozen weights pass gradients on but get none. An encoder's
parameters see source tokens, a decoder's target tokens. Decoding costs 1.66 N + 2·n_layer·n_ctx·d a token. Departure:
the paper prints a factor i inside that sum, which would make the cost of one token grow with the square of its
position, and is left out. The samples of a question share its prefill.
"""

import shutil
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minidpost.errors import UserError
from minidpost.models.blocked_weights import copied
from minidpost.models.hf_config import Config, Model
from minidpost.models.kvcache import KVCache, SharedPromptCache, T5Cache, whole_length
from minidpost.models.layers import Linear
from minidpost.models.lora import n_adapter_parameters
from minidpost.models.packed_attention import suits_kernel
from minidpost.models.t5 import T5Config
from minidpost.models.weights import empty_model
from minidpost.precision import key_dtype
from minidpost.processes import available_memory, max_over_ranks, processes_of_machine, world_size
from minidpost.sampling.generate import MAX_PROMPT_TOKENS
from minidpost.sampling.sampler import cached_tokens, overlaps, prefill_batch
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import Preset, n_parameters
from minidpost.selftraining.run import Data, Keep, TokenizedData
from minidpost.selftraining.run_directory import PlannedStage
from minidpost.text.templates import Template
from minidpost.training.batching import TokenizedExample, drop_too_long, token_counts
from minidpost.training.dpo import reference_batch_tokens
from minidpost.training.losses import LOGITS_AT_ONCE
from minidpost.training.parallel import MAX_WHOLE_GRADIENTS, is_spread_by_layer

GB = 10**9
# [ours] What a process has on a CPU besides its tensors. glibc takes tensors below 32 MiB from a heap that has gaps
# where others were freed: 8 to 20 % of the activations for SmolLM2-135M and Flan-T5-Small, and nothing where every
# tensor is mapped by itself (MALLOC_MMAP_THRESHOLD_=1048576). With LoRA the small tensors between an adapter's matrices
# stay in the gaps, in which the next large one then has no room: in fp32 30 to 60 %. Libraries allocate what they need
# when they are first used.
CPU_ALLOCATOR = 1.12
CPU_ALLOCATOR_OF_FP32_ADAPTERS = 1.45
CPU_LIBRARY_BYTES = GB // 10
GPU_SLOTS = (1024, 512, 256, 128)  # of which the first that fits is taken
FRACTION_FOR_SAMPLING = 1 / 3  # of a GPU's memory
GPU_MICRO_BATCH_TOKENS = (65536, 49152, 32768, 24576, 16384)  # of which the first that fits is taken
FRACTION_FOR_TRAINING = 0.8  # of a GPU's memory
GPU_MARGIN = 1.3  # an estimate above what a GPU has free may be this much too high; the rehearsal decides
TIGHT = 1.25  # free disk space below this multiple of what is needed is warned about
MIN_PARAMETERS_FOR_WARNING = 50_000_000  # from here on training on a CPU takes long enough for a warning
# [ours] On a CPU, of the operations a second that products of large square matrices alone reach: measured for
# SmolLM2-135M in bf16 on two cores, in SFT and in sampling with 128 slots (results/smollm2-few.md).
CPU_EFFICIENCY = {"training": 0.4, "inference": 0.25}


# -- memory -----------------------------------------------------------------------------------------------------------


def check_memory(
    model: Model,
    preset: Preset,
    *,
    dtype: torch.dtype,
    device: str,
    training_dtype: torch.dtype = torch.float32,
    has_dpo: bool = True,
) -> str:
    """What training and sampling need and what is free, in one line; UserError where it cannot fit.

    On a GPU an estimate that is a little too large is only a warning, as the rehearsal, which is always made there,
    measures it. `model` may be on the meta device; `dtype` is that of sampling, `training_dtype` that of training's
    forward passes.
    """
    n_ranks = world_size()
    needed = {
        "training": training_bytes(model, preset, training_dtype, device, n_ranks, has_dpo=has_dpo),
        "sampling": sampling_bytes(model, preset, dtype, device),
    }
    text = ", ".join(f"{stage} {size_text(size)}" for stage, size in needed.items())
    if n_ranks > 1:
        text += f" in each of {n_ranks} processes"
    free = available_bytes(device)
    if free is not None and torch.device(device).type == "cpu":
        free //= processes_of_machine()
    if free is None:
        return f"memory: {text} (estimated)"
    on_gpu = torch.device(device).type == "cuda"
    if max(needed.values()) > (GPU_MARGIN * free if on_gpu else free):
        less_memory = "--activation-checkpointing"
        if not preset.freezes_weights:
            less_memory += " or --lora-rank (training)"
        raise UserError(
            f"memory: {text} needed (estimated), but {device} has {size_text(free)} free; a smaller model, or smaller "
            f"--micro-batch-tokens (training) and --slots (sampling), or {less_memory} might fit"
        )
    line = f"memory: {text} (estimated) of {size_text(free)} free on {device}"
    if max(needed.values()) > free:
        warnings.warn(f"{line}: too much by the estimate, which may be too high; the rehearsal decides", stacklevel=2)
    return line


def training_bytes(
    model: Model,
    preset: Preset,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    n_ranks: int = 1,
    *,
    has_dpo: bool = True,
) -> int:
    """The peak of an SFT or DPO step whose forward pass is computed in `dtype`, in each of `n_ranks` processes.

    Or that of DPO's reference, where it is higher: with LoRA or small steps.
    """
    n_layers = max(len(stack.layers) for stack in model.stacks)
    n_tokens = largest_micro_batch(model, preset, n_ranks, has_dpo=has_dpo)
    layer_bytes = n_tokens * activation_bytes_a_token(model, preset, dtype, device)
    n_trained = n_trained_parameters(model, preset)
    number_bytes = preset.weights_dtype(device, dtype).itemsize  # of a frozen weight, and of the residual stream
    frozen_bytes = number_bytes * n_parameters(model) if preset.freezes_weights else 0
    # The forward pass in bf16 keeps a bf16 copy of every fp32 weight for the backward pass: of the layers that it
    # keeps. Frozen weights are bf16 themselves.
    # Of several processes on GPUs each gathers bf16 weights, and lets them go.
    on_gpu = torch.device(device).type == "cuda"
    copies_bytes = 2 * n_trained if dtype == torch.bfloat16 and not (on_gpu and n_ranks > 1) else 0
    if preset.activation_checkpointing:  # every layer's input, and one layer at a time computed again
        inputs_bytes = n_layers * number_bytes * n_tokens * model.config.d_model
        activation_bytes = inputs_bytes + layer_bytes + copies_bytes // n_layers
    else:
        activation_bytes = n_layers * layer_bytes + copies_bytes
    # Logits, their gradient, and on a GPU their log-softmax.
    logits_bytes = (12 if on_gpu else 8) * min(LOGITS_AT_ONCE, n_tokens * model.config.vocab_size)
    # The copy of a training state that is written while training goes on does not count: where the host has no room for
    # one, the state is written without (training/saving.py).
    weights_bytes = frozen_bytes + 16 * n_trained
    if n_ranks > 1:
        weights_bytes = weights_bytes // n_ranks + gathered_bytes(model, preset, dtype, device)
    passing_bytes = activation_bytes + logits_bytes
    if torch.device(device).type == "cpu":
        has_many_gaps = preset.freezes_weights and dtype == torch.float32
        allocator = CPU_ALLOCATOR_OF_FP32_ADAPTERS if has_many_gaps else CPU_ALLOCATOR
        passing_bytes = int(allocator * passing_bytes) + CPU_LIBRARY_BYTES
        if not preset.freezes_weights:  # a chunk's gradient of the output matrix, beside the sum of those before it
            entry_bytes = 4 if dtype == torch.float32 else 4 + dtype.itemsize
            passing_bytes += entry_bytes * model.output_matrix.numel()
    reference = reference_bytes(model, preset, dtype, device, n_ranks) if has_dpo else 0
    return max(weights_bytes + passing_bytes, reference)


def largest_micro_batch(model: Model, preset: Preset, n_ranks: int = 1, *, has_dpo: bool = True) -> int:
    """The padded tokens of the largest micro-batch that one of `n_ranks` processes can have in a step.

    An example may exceed what the preset allows, and so may a question with all its pairs, which stay together. A step
    may have fewer examples or questions than would fit; of several processes each gets its share of them.
    """
    example_tokens = preset.max_source + preset.max_target
    n_examples = most_examples_of_rank(preset, n_ranks)
    largest = max(example_tokens, min(preset.micro_batch_tokens, n_examples * example_tokens))
    if has_dpo:
        n_together = min(preset.pairs_per_question, preset.dpo_pairs_per_step)
        # Most where each pair has its own question.
        step_tokens = most_pairs_of_rank(preset, n_ranks) * question_tokens(model, preset, 1)
        largest = max(largest, question_tokens(model, preset, n_together), min(preset.micro_batch_tokens, step_tokens))
    return largest


def most_examples_of_rank(preset: Preset, n_ranks: int) -> int:
    """How many examples of an SFT step one of several processes has, at most."""
    return -(-preset.sft_examples_per_step // n_ranks)


def most_pairs_of_rank(preset: Preset, n_ranks: int) -> int:
    """How many pairs of a DPO step one of several processes has, at most: those of a question stay together."""
    n_together = min(preset.pairs_per_question, preset.dpo_pairs_per_step)
    n_questions = -(-preset.dpo_pairs_per_step // (n_together * n_ranks))
    return min(n_questions * n_together, preset.dpo_pairs_per_step)


def question_tokens(model: Model, preset: Preset, n_pairs: int) -> int:
    """The padded tokens of so many pairs of one question, each of two other completions."""
    n_prompts = 1 if model.config.is_encoder_decoder else 2 * n_pairs  # an encoder reads the question once
    return n_prompts * preset.max_source + 2 * n_pairs * preset.max_target


def reference_bytes(model: Model, preset: Preset, dtype: torch.dtype, device: str, n_ranks: int) -> int:
    """The peak of DPO's reference: weights without gradients and moments, and of the activations what is at work.

    These are the residual stream and, in the feed-forward, its input, both branches of the hidden units, their product.
    """
    weights_bytes = preset.weights_dtype(device, dtype).itemsize * n_parameters(model)
    if n_ranks > 1:
        weights_bytes = weights_bytes // n_ranks + gathered_weights_bytes(model, preset, dtype, device)
    n_tokens = max(
        question_tokens(model, preset, preset.pairs_per_question),
        reference_batch_tokens(preset.micro_batch_tokens, device),
    )
    config = model.config
    activation_bytes = n_tokens * (4 * config.d_model + 3 * dtype.itemsize * (config.d_model + config.d_ff))
    logits_bytes = 12 * min(LOGITS_AT_ONCE, n_tokens * config.vocab_size)
    return weights_bytes + activation_bytes + logits_bytes


def gathered_bytes(model: Model, preset: Preset, dtype: torch.dtype, device: str) -> int:
    """What a rank holds besides its slices (parallel.py): gathered weights, and gradients that are not summed yet.

    Of a model that is not large a rank holds all gradients until the last micro-batch; of a large one those of the
    gathered parameters.
    """
    n_trained = n_trained_parameters(model, preset)
    n_gradients = n_trained if n_trained <= MAX_WHOLE_GRADIENTS else n_gathered_parameters(model)
    return gathered_weights_bytes(model, preset, dtype, device) + 4 * n_gradients


def gathered_weights_bytes(model: Model, preset: Preset, dtype: torch.dtype, device: str) -> int:
    """What the weights take that a rank has gathered, at most."""
    weight_bytes = preset.weights_dtype(device, dtype).itemsize
    if torch.device(device).type == "cuda":
        weight_bytes = dtype.itemsize
    return weight_bytes * n_gathered_parameters(model)


def n_gathered_parameters(model: Model) -> int:
    """Those of two layers, the one at work and the next, and of what belongs to no layer; of a small model all."""
    n_gathered = n_parameters(model)
    if is_spread_by_layer(n_gathered):
        layer_sizes = [n_parameters(layer) for stack in dict.fromkeys(model.stacks) for layer in stack.layers]
        n_gathered += 2 * max(layer_sizes) - sum(layer_sizes)
    return n_gathered


def n_trained_parameters(model: Model, preset: Preset) -> int:
    """The parameters that training changes: all, or with LoRA those of the adapters, which `model` need not have."""
    if preset.lora_rank is None:
        return n_parameters(model)
    return n_adapter_parameters(model, preset.lora_rank)


def activation_bytes_a_token(model: Model, preset: Preset, dtype: torch.dtype, device: str) -> int:
    """What a layer keeps of a token for the backward pass."""
    config = model.config
    width = config.d_kv if isinstance(config, T5Config) else config.d_head
    if suits_kernel(torch.device(device), dtype, width):
        layer_bytes = packed_layer_bytes(config)
    else:
        layer_bytes = padded_layer_bytes(config, preset, dtype, device)
    adapter_bytes = 0
    if preset.lora_rank is not None:
        # Between the two matrices of each adapter there are as many numbers as its rank.
        last_layer = model.stacks[1].layers[-1]
        n_adapters = sum(isinstance(module, Linear) for module in last_layer.modules())
        adapter_bytes = n_adapters * dtype.itemsize * preset.lora_rank
    return layer_bytes + adapter_bytes


def packed_layer_bytes(config: Config) -> int:
    """What a layer keeps of a token where kernels of ours attend (models/packed_kernels.py), counted one by one.

    That is under bf16 autocast on a GPU, where the stream is fp32. On an H200 steps of SFT took 0.92 (Flan-T5-Large)
    and 1.01 (SmolLM2-135M) of the memory that this gives (benchmarks/results/gpu.json).
    """
    norm = 4 + 2  # its input, and what the linear layers after it take
    if isinstance(config, T5Config):
        # Of a decoder's layer, which keeps more than an encoder's: three norms and masks of dropout; queries, keys,
        # values and what was read; queries and what was read of the prompt, whose tokens have keys and values.
        inner = config.n_heads * config.d_kv
        attention = 3 * (norm + 1) * config.d_model + (8 + 4) * inner
        # Both branches, the activation, the product, dropout's mask and result; of an ungated one the first, and these.
        hidden = 4 * 2 + 1 if config.gated else 2 + 1 + 2
        return attention + hidden * config.d_ff
    n_queries, n_keys = config.n_heads * config.d_head, config.n_kv_heads * config.d_head
    attention = 2 * norm * config.d_model + 4 * n_queries + 4 * n_keys
    if config.qk_norm:  # their inputs
        attention += 4 * (n_queries + n_keys)
    return attention + 4 * 2 * config.d_ff


def padded_layer_bytes(config: Config, preset: Preset, dtype: torch.dtype, device: str) -> int:
    """What a layer keeps of a token where attention is torch's, in padded rows: on a CPU, in fp32, with other heads.

    The numbers are fitted to the tensors that autograd keeps (saved_tensors_hooks) with the shapes of Flan-T5 and
    SmolLM2: tensors of the width of the model are fp32 in part even under autocast (the residual stream, the norms),
    those of the feed-forward are of `dtype`. T5 has more of the former, by its cross-attention and its dropout.
    """
    is_t5 = isinstance(config, T5Config)
    if is_t5:
        width_bytes = 72 if dtype == torch.float32 else 46
    else:
        width_bytes = 40 if dtype == torch.float32 else 28
    if preset.freezes_weights and torch.device(device).type == "cpu":
        # Linear layers keep no input for gradients of theirs, and the stream may be bf16. Not measured on a GPU.
        width_bytes = width_bytes // 2 if is_t5 else width_bytes * 3 // 4
    # The hidden units before and after the activation, the other branch of a gated one, and the product; in T5 also
    # what dropout makes of them, and its mask.
    n_hidden = 6 if is_t5 else 4
    attention_bytes = 0
    if is_t5 and torch.device(device).type == "cpu":
        # There T5's attention weights are kept (see t5.FullAttention) and dropout's mask, in fp32, and what dropout
        # makes of them. A source token sees the source, a target token the target and, in cross-attention, the source.
        n_source, n_target = preset.max_source, preset.max_target
        n_seen = (n_source**2 + n_target * (n_target + n_source)) // (n_source + n_target)
        attention_bytes = (8 + dtype.itemsize) * config.n_heads * n_seen
    return width_bytes * config.d_model + n_hidden * dtype.itemsize * config.d_ff + attention_bytes


def sampling_bytes(model: Model, preset: Preset, dtype: torch.dtype, device: str = "cpu") -> int:
    """Weights, their copies on a CPU, KV cache for the longest prompts that the preset trains on, all slots' logits."""
    max_prompt = min(preset.max_source, MAX_PROMPT_TOKENS)
    n_rows = preset.slots + prefill_batch(preset.slots, device)
    max_new_tokens = cached_tokens(preset.max_new_tokens, overlaps(device))
    if torch.device(device).type == "cuda":  # as cuda_graphs.recorded_steps has it
        max_prompt, max_new_tokens = whole_length(max_prompt), whole_length(max_new_tokens)
    cache = empty_model(model.config).to(dtype).new_cache(n_rows, max_prompt, max_new_tokens)
    stores = [cache.own, cache.prompt.store] if isinstance(cache, T5Cache) else [cache]
    n_keys = sum(store.keys_LBGSK.numel() for store in stores)
    cache_bytes = tensor_bytes(cache) + n_keys * (key_dtype(dtype, device).itemsize - dtype.itemsize)
    logits_bytes = 12 * preset.slots * model.config.vocab_size
    n_copied = sum(weight_OD.numel() for weight_OD in copied(model.matrices(), dtype, device))
    return dtype.itemsize * (n_parameters(model) + n_copied) + cache_bytes + logits_bytes


def slots_for(model: Model, preset: Preset, dtype: torch.dtype, device: str) -> int:
    """How many rows are decoded at once where nothing else is asked for.

    On a CPU the preset's number. On a GPU a step of many rows hardly takes longer than one of few: as many as need no
    more than a third of its memory, so that every GPU of one kind has the same number, whatever else is at work there.
    All processes have the same number, by which they share questions out.
    """
    if torch.device(device).type != "cuda":
        return preset.slots
    n_bytes = memory_of_smallest_gpu(device)
    for slots in GPU_SLOTS:
        if FRACTION_FOR_SAMPLING * n_bytes >= sampling_bytes(model, replace(preset, slots=slots), dtype, device):
            return slots
    return preset.slots


def micro_batch_tokens_for(
    model: Model, preset: Preset, dtype: torch.dtype, device: str, *, has_dpo: bool = True
) -> int:
    """How many tokens a micro-batch has where nothing else is asked for; `dtype` is that of training's forward passes.

    On a CPU the preset's number. A GPU takes hardly longer for a large micro-batch than for a small one, until it is
    busy: as many as are estimated to need no more than four fifths of its memory, but no fewer than the preset's.
    All processes have the same number, as they compute an optimizer step together.
    """
    if torch.device(device).type != "cuda":
        return preset.micro_batch_tokens
    n_bytes = memory_of_smallest_gpu(device)
    for tokens in GPU_MICRO_BATCH_TOKENS:
        larger = replace(preset, micro_batch_tokens=tokens)
        needed = training_bytes(model, larger, dtype, device, world_size(), has_dpo=has_dpo)
        if tokens > preset.micro_batch_tokens and needed <= FRACTION_FOR_TRAINING * n_bytes:
            return tokens
    return preset.micro_batch_tokens


def memory_of_smallest_gpu(device: str) -> int:
    """The whole memory of this process's GPU or, of several processes, of the one that has least: all decide alike."""
    return -max_over_ranks(-torch.cuda.get_device_properties(device).total_memory)[0]


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
    return available_memory()


# -- disk -------------------------------------------------------------------------------------------------------------


def size_text(n_bytes: float) -> str:
    """A size for readers, in GB or, where there would be nothing but zeros, in MB."""
    return f"{n_bytes / GB:.1f} GB" if n_bytes >= 0.05 * GB else f"{n_bytes / 10**6:.1f} MB"


def check_disk(
    model: Model,
    preset: Preset,
    *,
    method: str,
    run_dir: Path,
    fresh: bool = False,
    save_dtype: torch.dtype = torch.float32,
    keep: Keep = "all",
    n_trainings: int | None = None,
) -> str:
    """What a run writes and what is free, in one line; UserError where it cannot fit, a warning where it hardly does.

    What an earlier command has left of the run counts as written, unless it begins anew (`fresh`). `n_trainings` are
    those that are not finished, None where all are to be made: models that were written and removed (`keep`) are not
    written again, and without a training there is no state to save.
    """
    written = 0
    if run_dir.is_dir() and not fresh:
        written = sum(path.stat().st_size for path in run_dir.rglob("*.safetensors"))
    needed = max(0, disk_bytes(model, preset, method, save_dtype=save_dtype, keep=keep) - written)
    if n_trainings is not None:
        model_bytes, state_bytes = bytes_of_training(model, preset, save_dtype)
        needed = min(needed, n_trainings * model_bytes + (2 * state_bytes if n_trainings else 0))
    existing = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    text = f"disk: {size_text(needed)} (estimated) of {size_text(free)} free in {existing}"
    if needed > free:
        raise UserError(
            f"disk: {size_text(needed)} needed (estimated: its models, and two saved states of a training at work), "
            f"but {existing} has {size_text(free)} free; choose a --run-dir on another disk, --keep best, "
            "--save-dtype bf16, or fewer --iterations"
        )
    if needed * TIGHT > free:
        warnings.warn(f"{text}: hardly enough", stacklevel=2)
    return text


def disk_bytes(
    model: Model,
    preset: Preset,
    method: str,
    *,
    save_dtype: torch.dtype = torch.float32,
    keep: Keep = "all",
) -> int:
    """The models of a whole run that are there at one time, and two saved states of a training at work."""
    rules = METHODS[method]
    n_models = int(preset.warm_up) + preset.iterations_of(rules) * (1 + int(rules.has_dpo))
    if keep != "all":
        # The last iteration's model, this one's, and what DPO made of the former; with "best" perhaps one more.
        n_models = min(n_models, 2 + int(rules.has_dpo) + int(keep == "best"))
    model_bytes, state_bytes = bytes_of_training(model, preset, save_dtype)
    return n_models * model_bytes + 2 * state_bytes


def bytes_of_training(model: Model, preset: Preset, save_dtype: torch.dtype) -> tuple[int, int]:
    """What a training writes: the finished model, with LoRA its adapters too, and one saved state before that."""
    n_trained = n_trained_parameters(model, preset)
    model_bytes = save_dtype.itemsize * n_parameters(model)
    if preset.freezes_weights:
        model_bytes += 4 * n_trained  # the adapters lie beside the merged model, in fp32
    return model_bytes, 12 * n_trained


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
    return ModelSize(
        n_source=n_parameters(source),
        n_target=n_parameters(target) + model.output_matrix.numel(),
        n_source_layers=len(source.layers),
        n_target_layers=len(target.layers),
        width=model.config.d_model,
    )


def forward_flops(size: ModelSize, n_source: int, n_target: int) -> float:
    """One forward pass over `n_source` source and `n_target` target tokens."""
    return 2.0 * (size.n_source * n_source + size.n_target * n_target)


def training_flops(size: ModelSize, n_source: int, n_target: int, *, is_frozen: bool = False) -> float:
    """Forward and backward pass; where the weights are frozen (LoRA), a backward pass without their gradients."""
    return training_passes(is_frozen) * forward_flops(size, n_source, n_target)


def training_passes(is_frozen: bool) -> int:
    """How many forward passes cost what a forward and a backward pass do."""
    return 2 if is_frozen else 3


def sampling_flops(size: ModelSize, prompt_lengths: Sequence[int], completion_lengths: Sequence[int]) -> float:
    """Prefill of the prompts, each once, and cached decoding of the completions; lengths in tokens."""
    prefill = sum(n * (2 * size.n_source + 2 * size.n_source_layers * n * size.width) for n in prompt_lengths)
    # The i-th token of a completion attends to i tokens, a token of an n-token completion to n / 2 on average.
    attention = 2 * size.n_target_layers * size.width
    decoding = sum(n * (1.66 * size.n_target + attention * n / 2) for n in completion_lengths)
    return float(prefill + decoding)


# -- a whole run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A run before it begins: what its cost depends on.

    `dtype` is that of weights in sampling and evaluation, `training_dtype` that of forward passes in training.
    """

    base: Path
    method: str
    preset: Preset
    data: Data
    template: Template
    tokens: TokenizedData
    dtype: torch.dtype
    training_dtype: torch.dtype
    device: str

    @cached_property
    def labelled(self) -> list[TokenizedExample]:
        """The labelled examples that are trained on: those within the preset's lengths."""
        return drop_too_long(list(self.tokens.gold.values()), self.preset.max_source, self.preset.max_target)

    @property
    def n_iterations(self) -> int:
        """The iterations after the warm-up."""
        return self.preset.iterations_of(METHODS[self.method])

    @property
    def has_dpo(self) -> bool:
        """Whether there are iterations that tune by DPO."""
        return self.preset.tunes_by_dpo(METHODS[self.method])


def run_flops(plan: Plan, size: ModelSize) -> float:
    """The operations of a whole run, estimated: those of all its stages (`planned_stages`)."""
    return sum(stage.flops for stage in planned_stages(plan, size).values())


def planned_stages(plan: Plan, size: ModelSize, last: int | None = None) -> dict[str, PlannedStage]:
    """All stages that a run has if it does not stop early, by name and in order, with their operations.

    Completions are taken to be as long as the labelled rationales are on average. Half of the pool's questions are
    taken to get a pseudo-label for each iteration so far, and as many preference pairs as a question may have; DPO is
    taken to make all its steps. How many there really are depends on what the model gets right. Iterations later than
    the `last`, where one is given, are left out.
    """
    preset = plan.preset
    labelled = plan.labelled
    n_source, n_target = token_counts(labelled)
    mean_target = n_target // max(1, len(labelled))
    prompt_lengths = [len(plan.tokens.prompt_ids[example.question]) for example in plan.data.pool]
    mean_prompt = sum(prompt_lengths) // len(prompt_lengths)
    n_questions = len(prompt_lengths)
    is_frozen = preset.freezes_weights
    n_passes = training_passes(is_frozen)
    recomputed = (n_passes + 1) / n_passes if preset.activation_checkpointing else 1.0  # a second forward pass

    def training(n_sources: int, n_targets: int) -> PlannedStage:
        return PlannedStage("training", recomputed * training_flops(size, n_sources, n_targets, is_frozen=is_frozen))

    def sampling(n_questions: int, n_samples: int) -> float:
        return sampling_flops(size, [mean_prompt] * n_questions, [mean_target] * (n_questions * n_samples))

    def sft(n_labels: int) -> PlannedStage:
        """On the labelled set and so many pseudo-labels."""
        return training(
            preset.sft_epochs * (n_source + n_labels * mean_prompt),
            preset.sft_epochs * (n_target + n_labels * mean_target),
        )

    # Evaluations: f_θ' on all sets greedily, f_θd on dev; dev `pass_at` times more.
    n_dev = len(plan.data.dev)
    n_tests = sum(len(examples[: preset.test_questions]) for examples in plan.data.tests.values())
    passing = sampling(len(plan.data.dev[: preset.pass_questions]), preset.pass_at) if preset.pass_at > 1 else 0.0
    evaluation_of_sft = sampling(n_dev + n_tests, 1) + passing
    evaluation_of_dpo = sampling(n_dev, 1) + passing

    stages = {}
    if preset.warm_up:
        stages["iteration-0/sft"] = sft(0)
    stages["iteration-0/evaluation.json"] = PlannedStage("inference", evaluation_of_sft)
    n_iterations = plan.n_iterations if last is None else min(last, plan.n_iterations)
    for iteration in range(1, n_iterations + 1):
        path = f"iteration-{iteration}"
        evaluation = evaluation_of_sft
        if plan.has_dpo:
            n_pairs = n_questions // 2 * preset.pairs_per_question
            of_pairs = forward_flops(size, 2 * n_pairs * mean_prompt, 2 * n_pairs * mean_target)
            n_sequences = 2 * preset.dpo_steps * preset.dpo_pairs_per_step
            stages[f"{path}/samples-dpo.jsonl"] = PlannedStage("inference", sampling(n_questions, preset.dpo_samples))
            stages[f"{path}/pairs.jsonl"] = PlannedStage()
            stages[f"{path}/reference.safetensors"] = PlannedStage("training", of_pairs)
            stages[f"{path}/dpo"] = training(n_sequences * mean_prompt, n_sequences * mean_target)
            evaluation += evaluation_of_dpo
        stages[f"{path}/samples-sft.jsonl"] = PlannedStage("inference", sampling(n_questions, preset.samples))
        stages[f"{path}/pseudo-labels.jsonl"] = PlannedStage()
        stages[f"{path}/sft"] = sft(iteration * (n_questions // 2))
        stages[f"{path}/evaluation.json"] = PlannedStage("inference", evaluation)
    return stages


def warn_of_hours(plan: Plan, model: Model, finished: Collection[str] = ()) -> None:
    """A warning with an estimate of the hours, where a model of a published one's size is to be trained on a CPU.

    The stages that are `finished` take no time any more; where all are, there is no warning.
    """
    is_large = n_parameters(model) >= MIN_PARAMETERS_FOR_WARNING
    if torch.device(plan.device).type != "cpu" or not is_large:
        return
    left = [stage for name, stage in planned_stages(plan, model_size(model)).items() if name not in finished]
    if not left:
        return
    flops = sum(stage.flops for stage in left)
    rate = product_flops_per_second(plan.training_dtype)
    seconds = sum(stage.flops / (rate * CPU_EFFICIENCY[stage.work]) for stage in left if stage.work is not None)
    what = "the rest of the run takes" if finished else "the run takes"
    warnings.warn(
        f"{plan.base.name} has {n_parameters(model) / 1e6:,.0f} million parameters, and this is a CPU: {what} "
        f"about {written_hours(seconds / 3600)}, by an estimate ({flops:.1e} floating-point operations; products of "
        f"{str(plan.training_dtype).removeprefix('torch.')} matrices alone reach {rate:.1e} a second here)",
        stacklevel=2,
    )


def written_hours(hours: float) -> str:
    """Hours with two significant digits, at least 0.1."""
    return f"{max(hours, 0.1):.1f} hours" if hours < 10 else f"{float(f'{hours:.2g}'):,.0f} hours"


def product_flops_per_second(dtype: torch.dtype, seconds: float = 1.0, width: int = 1024) -> float:
    """How fast this machine's CPU multiplies matrices of a precision, measured for about so many seconds."""
    left = torch.ones(width, width, dtype=dtype)
    right = torch.ones(width, width, dtype=dtype)
    torch.mm(left, right)  # sets the library up
    n_products = 0
    started = time.perf_counter()
    while n_products == 0 or time.perf_counter() - started < seconds:
        torch.mm(left, right)
        n_products += 1
    return n_products * 2 * width**3 / max(time.perf_counter() - started, 1e-9)
