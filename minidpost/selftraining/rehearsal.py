"""The largest batches of a run, tried before its first step: a lack of memory shows at once, not after hours.

A throwaway copy of the base model is trained on the largest micro-batches that the run's SFT and DPO can meet, and
makes one decoding step with all slots at their last position. The trainings' own functions do it, so that what is
rehearsed is what will happen: fp32 weights (or frozen ones with adapters), gradients of a micro-batch before, AdamW's
moments, activations. Nothing is different afterwards: no file is written, and all generators of random numbers are as
they were.

On a GPU a rehearsal takes seconds, and is always made. On a CPU it is made only where it is a small fraction of the
run.
"""

import gc
import random
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidpost.errors import when_memory_runs_out
from minidpost.models.hf_config import Model
from minidpost.models.kvcache import T5Cache
from minidpost.models.weights import load_model
from minidpost.processes import rank, world_size
from minidpost.progress import Progress
from minidpost.sampling.cuda_graphs import recorded_steps
from minidpost.sampling.sampler import cached_tokens, default_chunk_size, overlaps, prefill_batch
from minidpost.sampling.token_choice import choose
from minidpost.selftraining.estimates import (
    Plan,
    forward_flops,
    model_size,
    most_examples_of_rank,
    most_pairs_of_rank,
    question_tokens,
    run_flops,
    size_text,
    training_flops,
)
from minidpost.selftraining.presets import n_parameters
from minidpost.selftraining.steps import (
    less_for_sampling,
    less_for_training,
    load_for_training,
)
from minidpost.training.batching import (
    PaddedShape,
    TokenizedExample,
    counted,
    epoch_steps,
    micro_batches,
    padded_shape,
)
from minidpost.training.dpo import (
    PreferencePair,
    dpo_gradients,
    reference_batch_tokens,
    reference_log_probabilities,
)
from minidpost.training.optim import adamw, apply_step
from minidpost.training.parallel import deal
from minidpost.training.sft import begin_sft, sft_gradients

# On a CPU:
MIN_PARAMETERS = 20_000_000  # smaller models need little memory
MAX_FRACTION_OF_RUN = 0.01  # of the run's floating-point operations


def rehearse(plan: Plan, model: Model) -> str | None:
    """Rehearse a run and say in one line what it took; None where that would take too long on a CPU.

    `model` has the shape of the base, and may be on the meta device. UserError where memory does not suffice.
    """
    if not is_worth_it(plan, model):
        return None
    # Of sampling, a small one, of SFT on the labelled set and with pseudo-labels, of DPO's reference and of DPO.
    n_batches = 3 + (1 if plan.n_iterations else 0) + (2 if plan.has_dpo else 0)
    progress = Progress(total=n_batches, desc="rehearsal", unit="batch", disable=rank() > 0)
    with unchanged_random_numbers(plan.device), progress:
        with when_memory_runs_out(f"in the rehearsal of sampling {less_for_sampling(plan.preset)}"):
            begin_peak(plan.device)
            rehearse_sampling(plan)
            progress.update()
            sampling = peak_bytes(plan.device)
        less = less_for_training(plan.preset)
        if not plan.preset.freezes_weights:  # LoRA may still be chosen, as nothing has begun
            less += ", and so does --lora-rank"
        with when_memory_runs_out(f"in the rehearsal of training {less}"):
            begin_peak(plan.device)
            rehearse_training(plan, progress)
            training = peak_bytes(plan.device)
    begin_peak(plan.device)  # what the training held goes back to the device
    return f"rehearsed: training {size_text(training)}, sampling {size_text(sampling)} (measured, at their peaks)"


def is_worth_it(plan: Plan, model: Model) -> bool:
    """Always on a GPU; on a CPU for models that are not small, and a small fraction of the run's operations."""
    if not plan.labelled:
        return False  # all are longer than the preset's limits, and the first SFT will say so
    if torch.device(plan.device).type != "cpu":
        return True
    if n_parameters(model) < MIN_PARAMETERS:
        return False
    size = model_size(model)
    preset = plan.preset
    n_tokens = max(preset.micro_batch_tokens, question_tokens(model, preset, preset.pairs_per_question))
    # Three micro-batches (two of SFT, one of DPO with its reference), a prefill, a decoding step.
    half = n_tokens // 2  # source and target tokens
    training = 3 * training_flops(size, half, half, is_frozen=preset.freezes_weights) + forward_flops(size, half, half)
    sampling = forward_flops(size, prefill_batch(preset.slots, plan.device) * preset.max_source, preset.slots)
    return training + sampling <= MAX_FRACTION_OF_RUN * run_flops(plan, size)


# -- the stages -------------------------------------------------------------------------------------------------------


def rehearse_sampling(plan: Plan) -> None:
    """One prefill of the longest prompt, and a decoding step with all slots at their last position."""
    model: Any = load_model(plan.base, plan.dtype, plan.device)
    settings = plan.preset.sampling(seed=0)
    n_slots = min(settings.slots, default_chunk_size(model, settings.slots))
    n_prompts = prefill_batch(settings.slots, plan.device)
    # Evaluation has other questions than the pool, of which one may be the longest.
    evaluated = [example.question for examples in plan.data.evaluation_sets().values() for example in examples]
    prompts = [*plan.tokens.prompt_ids.values(), *(tuple(plan.template.prompt_ids(text)) for text in evaluated)]
    prompt = max(prompts, key=len)
    max_new_tokens = cached_tokens(settings.max_new_tokens, overlaps(plan.device))
    sizes = (n_slots + n_prompts, len(prompt), max_new_tokens)
    cache: Any
    step: Callable[[Tensor], Tensor]
    if torch.device(plan.device).type == "cuda":
        step = recorded_steps(model, *sizes)
        cache = step.cache
    else:
        cache = model.new_cache(*sizes)
        step = partial(model.decode, cache)

    with model.decoding():
        # 1) Prefill as many prompts as are prefilled together, and give every slot one of them.
        first_ids = model.prefill(cache, range(n_slots, n_slots + n_prompts), [prompt] * n_prompts)
        for slot in range(n_slots):
            cache.copy_rows([n_slots + slot % n_prompts], [slot])
        # 2) All rows stand at the last position that there is.
        tokens = cache.own if isinstance(cache, T5Cache) else cache
        last_position = tokens.keys_LBGSK.shape[3] - 1
        with torch.inference_mode():
            tokens.set_lengths(range(n_slots), [last_position] * n_slots)
        # 3) One step.
        logits_BV = step(torch.tensor([first_ids[0]] * n_slots).to(plan.device))
    uniform_B = torch.full((n_slots,), 0.5, dtype=torch.float64).to(plan.device)
    choose(logits_BV, uniform_B, settings).tolist()


def rehearse_training(plan: Plan, progress: Progress) -> None:
    """The largest micro-batches of SFT, DPO's reference and DPO, each in an optimizer step that has a second one.

    `progress` counts them.
    """
    preset = plan.preset
    sft = preset.sft(0, plan.training_dtype)
    if plan.has_dpo:
        reference_log_probabilities(
            load_for_training(plan.base, preset, dtype=plan.training_dtype, device=plan.device, seed=None),
            largest_pairs_of_reference(plan),
            micro_batch_tokens=preset.micro_batch_tokens,
            stage="rehearsal, DPO's reference",
            dtype=plan.training_dtype,
        )
        progress.update()

    model = load_for_training(plan.base, preset, dtype=plan.training_dtype, device=plan.device, seed=0)
    # A first step with little to do, after which AdamW has its moments.
    optimizer = adamw(model, sft.schedule)
    small = [min(plan.labelled, key=lambda example: example.n_tokens)] * world_size()
    micro_batch_tokens = preset.micro_batch_tokens
    sft_gradients(model, small, micro_batch_tokens, dtype=sft.dtype)
    apply_step(model, optimizer, sft.schedule, step=0, n_steps=1)
    progress.update()

    begin_sft(model, sft)
    for examples in largest_sft_batches(plan, model):
        # The small micro-batch leaves gradients, to which those of the large one are added; of several processes each
        # holds them whole until then.
        sft_gradients(model, small, micro_batch_tokens, dtype=sft.dtype, ends_step=False)
        sft_gradients(model, once_for_every_rank(examples), micro_batch_tokens, dtype=sft.dtype)
        apply_step(model, optimizer, sft.schedule, step=0, n_steps=1)
        progress.update()

    if plan.has_dpo:
        pairs = largest_pairs(plan)
        model.eval()  # without dropout, as in train_dpo
        dpo = preset.dpo(len(pairs), 0, plan.training_dtype)
        sft_gradients(model, small, micro_batch_tokens, dtype=dpo.dtype, ends_step=False)
        dpo_gradients(
            model,
            pairs,
            torch.zeros(len(pairs), 2),
            beta=dpo.beta,
            micro_batch_tokens=micro_batch_tokens,
            dtype=dpo.dtype,
        )
        apply_step(model, optimizer, dpo.schedule, step=0, n_steps=1)
        progress.update()


# -- the largest batches ----------------------------------------------------------------------------------------------


def largest_sft_batches(plan: Plan, model: Model) -> list[list[TokenizedExample]]:
    """The largest micro-batch of the labelled set's first epoch, and of pseudo-labels the largest that there can be.

    Of several processes one that any of them gets.
    """
    preset = plan.preset
    labelled = plan.labelled
    batches = []
    n_steps = -(-len(labelled) // preset.sft_examples_per_step)  # of an epoch
    for step in epoch_steps(len(labelled), preset.sft_examples_per_step, n_steps, seed=0):
        items = [[labelled[i]] for i in step]
        for own in deal(items, world_size()):
            own_items = [items[i] for i in own]
            for batch in micro_batches(model.config, own_items, preset.micro_batch_tokens, plan.device):
                batches.append([example for i in batch for example in own_items[i]])

    def size(batch: list[TokenizedExample]) -> float:
        shape = reduce(PaddedShape.beside, (padded_shape(model.config, [example]) for example in batch))
        return counted(shape, sum(example.n_tokens for example in batch))

    largest = [max(batches, key=size)]
    if plan.n_iterations:
        n_source, n_target = longest_lengths(plan)
        n_most = most_examples_of_rank(preset, world_size())
        n_rows = min(preset.micro_batch_tokens // (n_source + n_target), n_most)
        largest.append(
            [TokenizedExample(distinct_ids(row, n_source), (0,) * n_target) for row in range(max(1, n_rows))]
        )
    return largest


def once_for_every_rank(examples: list[TokenizedExample]) -> list[TokenizedExample]:
    """As many copies of each as there are ranks, one after the other: dealt out by size, each rank gets one of each."""
    return [example for example in examples for _ in range(world_size())]


def largest_pairs(plan: Plan) -> list[PreferencePair]:
    """The pairs of the largest micro-batch of DPO, for each rank as many."""
    n_most = most_pairs_of_rank(plan.preset, world_size())
    return of_all_ranks(plan, plan.preset.micro_batch_tokens, n_most=n_most)


def largest_pairs_of_reference(plan: Plan) -> list[PreferencePair]:
    """Those of the reference's largest micro-batch: of all pairs that the run can have, as it knows no steps."""
    n_tokens = reference_batch_tokens(plan.preset.micro_batch_tokens, plan.device)
    n_pairs = len(plan.data.pool) * plan.preset.pairs_per_question
    return of_all_ranks(plan, n_tokens, n_most=-(-n_pairs // world_size()))


def of_all_ranks(plan: Plan, n_tokens: int, *, n_most: int) -> list[PreferencePair]:
    """What `pairs_of` gives, once for every rank."""
    made: list[PreferencePair] = []
    for _ in range(world_size()):
        made += pairs_of(plan, n_tokens, n_most=n_most, first=len(made))
    return made


def pairs_of(plan: Plan, n_tokens: int, *, n_most: int, first: int = 0) -> list[PreferencePair]:
    """As many of the longest pairs as `n_tokens` allow, `n_most` at most: each of its own question.

    All pairs of one question are in one micro-batch, even where they exceed it: then there are these alone. Questions
    are numbered from `first` on.
    """
    n_source, n_target = longest_lengths(plan)
    pair_tokens = 2 * (n_source + n_target)
    n_of_question = min(plan.preset.pairs_per_question, n_most)
    has_one_question = n_of_question * pair_tokens > n_tokens
    n_pairs = n_of_question if has_one_question else min(n_tokens // pair_tokens, n_most)
    pairs = []
    for index in range(n_pairs):
        prompt = distinct_ids(first if has_one_question else first + index, n_source)
        chosen = TokenizedExample(prompt, distinct_ids(2 * index, n_target))
        rejected = TokenizedExample(prompt, distinct_ids(2 * index + 1, n_target))
        pairs.append(PreferencePair(chosen, rejected))
    return pairs


def longest_lengths(plan: Plan) -> tuple[int, int]:
    """The tokens of the longest prompt that is trained on, and of the longest completion that there can be."""
    preset = plan.preset
    prompts = [len(prompt) for prompt in plan.tokens.prompt_ids.values() if len(prompt) <= preset.max_source]
    longest_label = max(len(example.target_ids) for example in plan.labelled)
    longest_sample = min(preset.max_new_tokens, preset.max_target)
    return max(prompts), max(longest_label, longest_sample)


def distinct_ids(index: int, length: int) -> tuple[int, ...]:
    """Token ids of a given length, others for every index: its binary digits, then zeros."""
    return tuple((index >> position) & 1 for position in range(length))


# -- what must be as it was, and the peak -----------------------------------------------------------------------------


@contextmanager
def unchanged_random_numbers(device: str) -> Iterator[None]:
    """Leave the generators of Python, numpy and torch, on the CPU and on the device, as they were."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [device] if torch.device(device).type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def begin_peak(device: str) -> None:
    """Free what nothing refers to, and begin to look for the peak."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> int:
    """The most memory that tensors had on a GPU since `begin_peak`; of a CPU the most that this process ever had."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
