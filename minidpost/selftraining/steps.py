"""What each step of self-training reads, does and writes; the order of the steps is algorithm.py's.

Every step takes the run and the number of an iteration, reads files of the run's directory and writes one stage of it:

    step                      reads                              writes, under iteration-N/
    fine_tune                 base, L or pseudo-labels.jsonl     sft/ (with LoRA merged, and sft/adapter/)
    sample_rationales         a model                            samples-dpo.jsonl or samples-sft.jsonl
    build_preference_pairs    samples-dpo.jsonl of 1 … N         pairs.jsonl
    compute_reference         a model, pairs.jsonl               reference.safetensors
    train_preferences         the same model, both of these      dpo/ (likewise)
    build_pseudo_labels       samples-sft.jsonl of 1 … N         pseudo-labels.jsonl
    evaluate                  sft/, dpo/                         evaluation.json

has_converged reads the run's accuracies on dev, and writes stopped.json where they no longer rise. remove_models
removes weights that are not needed any more, if it was asked to.

A step whose stage is finished does nothing. One that was stopped continues from its last saved training state or chunk
of samples; the others begin again. Pairs and pseudo-labels are stored as the very token ids that were sampled, which
are trained on as they are.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from minidpost.data.example import Example
from minidpost.errors import UserError, when_memory_runs_out
from minidpost.models.hf_config import Model
from minidpost.models.llama import LlamaConfig
from minidpost.models.lora import adapters, add_adapters, save_adapters, save_merged
from minidpost.models.weights import in_memory, load_model, open_tensors, save_model, tokenizer_files, write_safetensors
from minidpost.processes import on_rank_0, rank, world_size
from minidpost.sampling.generate import Sample, generate, shared_chunk_size
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.comparison import questions_hash
from minidpost.selftraining.estimates import forward_flops, model_size, sampling_flops, training_flops
from minidpost.selftraining.evaluation import greedy_outcomes, mean_score, sampled_scores
from minidpost.selftraining.presets import Preset
from minidpost.selftraining.run import Run
from minidpost.selftraining.run_directory import Chunks, Stage, json_object, model_hash
from minidpost.selftraining.selection import Candidates, jaccard, preference_pairs, pseudo_labels
from minidpost.storage import read_json, read_jsonl, write_json, write_jsonl
from minidpost.text.tokenizer import add_end_id
from minidpost.training.batching import TokenizedExample, drop_too_long, token_counts
from minidpost.training.dpo import PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import derived_seed
from minidpost.training.parallel import load_spread
from minidpost.training.sft import train_sft

STOP = "stopped.json"  # which iteration a run was stopped after by its patience, and by which hyperparameters

TrainingItem = TypeVar("TrainingItem", TokenizedExample, PreferencePair)


# -- fine-tuning ------------------------------------------------------------------------------------------------------


def fine_tune(run: Run, iteration: int, labels: Path | None = None) -> None:
    """SFT of the base model (equation 2), on a file of pseudo-labels or else on the labelled set."""
    name = f"iteration-{iteration}/sft"
    if run.directory.is_finished(name):
        return
    with run.directory.stage(name) as stage, when_memory_runs_out(training_advice(run, name)):
        examples = labelled_examples(run) if labels is None else read_pseudo_labels(run, labels)
        examples = within_limits(run, examples, f"{iteration}/sft")
        model = load_with_adapters(run, run.base, f"{iteration}/sft")
        settings = run.preset.sft(run.seed, run.training_dtype)
        train_sft(
            model,
            examples,
            settings,
            log_path=log_path(stage),
            stage=f"{iteration}/sft",
            state=run.training_state(name),
        )
        save_trained(
            model,
            stage.path,
            start=run.base,
            template=run.template_name,
            eos_id=run.template.eos_id,
            dtype=run.save_dtype,
        )

        n_source, n_target = token_counts(examples)
        is_frozen = run.preset.freezes_weights
        flops = training_flops(model_size(model), n_source, n_target, is_frozen=is_frozen)
        stage.metadata["flops"] = settings.epochs * flops


def load_with_adapters(run: Run, directory: Path, stage: str) -> Model:
    """A model that is to be trained in a stage; adapters, where there are any, are seeded by (seed, stage)."""
    seed = derived_seed(run.seed, stage, "adapters")
    return load_for_training(directory, run.preset, dtype=run.training_dtype, device=run.device, seed=seed)


def load_for_training(
    directory: Path, preset: Preset, *, dtype: torch.dtype | None, device: str, seed: int | None
) -> Model:
    """A model as training needs it: fp32, or with a `lora_rank` frozen, with fresh adapters drawn from `seed`.

    `dtype` is the precision of forward passes (precision.autocast), in which frozen weights are held. Without a seed
    there are no adapters: that is the policy before its first step, DPO's reference.
    """
    free_models()
    weights_dtype = preset.weights_dtype(device, dtype)

    def add(model: Model) -> None:
        if preset.lora_rank is not None and seed is not None:
            alpha = 2.0 * preset.lora_rank if preset.lora_alpha is None else preset.lora_alpha
            add_adapters(model, rank=preset.lora_rank, alpha=alpha, seed=seed)

    if world_size() > 1:
        return load_spread(
            directory, weights_dtype=weights_dtype, dtype=dtype, device=device, add=add, adapter_seed=seed or 0
        )
    model = load_model(directory, weights_dtype, device)
    add(model)
    return model


def free_models() -> None:
    """Free the models of the stages before: hooks of fully_shard refer to them in circles, which outlive the stage."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def save_trained(
    model: Model,
    directory: Path,
    *,
    start: Path,
    template: str | None = None,
    eos_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write what a training has made of the model in `start`; adapters are merged, and kept in adapter/.

    `eos_id` is what a decoder-only model was trained to end in. Adapters lie in a folder of their own, as transformers
    takes a directory that has an adapter_config.json for an adapter and loads the model that is named there.
    """
    if adapters(model):
        save_adapters(model, directory / "adapter", start)
        files = tokenizer_files(start)
        save_merged(model, directory, start=start, tokenizer_files=files, template=template, dtype=dtype)
    else:
        save_model(model, directory, tokenizer_files(start), template, dtype)
    if eos_id is not None and isinstance(model.config, LlamaConfig) and rank() == 0:
        add_end_id(directory, eos_id)


def log_path(stage: Stage) -> Path | None:
    """Where a training logs its steps; of several processes rank 0 does."""
    return stage.path / "log.jsonl" if rank() == 0 else None


def training_advice(run: Run, name: str) -> str:
    """What needs less memory in training: for the message where a stage runs out of it."""
    return f"in {name} {less_for_training(run.preset)}; the same command with them continues here"


def sampling_advice(run: Run, name: str) -> str:
    """What needs less memory in sampling and evaluation."""
    return f"in {name} {less_for_sampling(run.preset)}; the same command with them continues here"


def less_for_training(preset: Preset) -> str:
    """The flags that make training need less memory."""
    return f"smaller --micro-batch-tokens (now {preset.micro_batch_tokens:,}) or --activation-checkpointing need less"


def less_for_sampling(preset: Preset) -> str:
    """The flag that makes sampling need less memory."""
    return f"fewer --slots (now {preset.slots:,}) need less"


def labelled_examples(run: Run) -> list[TokenizedExample]:
    """The labelled set L; how many of its rationales cannot be written is logged."""
    if run.tokens.n_unwritable:
        fraction = f"{run.tokens.n_unwritable} of {len(run.data.labelled)}"
        run.directory.log(f"{fraction} rationales left out: the tokenizer cannot write them")
    return list(run.tokens.gold.values())


def read_pseudo_labels(run: Run, path: Path) -> list[TokenizedExample]:
    """The examples of a file of pseudo-labels, gold ones among them."""
    return [run.tokens.example(record["question"], record["token_ids"]) for _, record in read_jsonl(path)]


def within_limits(run: Run, items: list[TrainingItem], stage: str) -> list[TrainingItem]:
    """The examples or pairs within the preset's lengths; how many are longer is logged. UserError where all are."""
    max_source = run.preset.max_source
    max_target = run.preset.max_target
    remaining = drop_too_long(items, max_source, max_target)
    n_dropped = len(items) - len(remaining)
    if n_dropped:
        run.directory.log(
            f"{stage}: {n_dropped} of {len(items)} left out, being longer than {max_source} source or {max_target} "
            "target tokens"
        )
    if items and not remaining:
        raise UserError(f"{stage}: all {len(items)} examples are longer than the limits of the model's preset")
    return remaining


# -- sampling ---------------------------------------------------------------------------------------------------------


def sample_rationales(run: Run, iteration: int, name: str, *, model: Path, n_samples: int) -> None:
    """Sample `n_samples` rationales from a model for every question of the pool, and grade them."""
    stage_name = f"iteration-{iteration}/{name}.jsonl"
    if run.directory.is_finished(stage_name):
        return
    with run.directory.stage(stage_name) as stage, when_memory_runs_out(sampling_advice(run, stage_name)):
        loaded = load_for_sampling(run, model)
        settings = run.sampling_settings(f"{iteration}/{name}")

        weights = on_rank_0(lambda: weights_of(run, model))
        chunks = saved_chunks(run, stage_name, weights, n_samples, settings=settings)
        default_size = shared_chunk_size(loaded, settings.slots, len(run.data.pool) * n_samples)
        first_chunk, chunk_size = on_rank_0(lambda: chunks.where_to_go_on(default_size))
        generated = generate(
            loaded,
            run.template,
            [example.question for example in run.data.pool],
            settings,
            answers=[example.answer for example in run.data.pool],
            n_samples=n_samples,
            calculator=run.calculator,
            label=f"{iteration}/{name}",
            first_chunk=first_chunk,
            chunk_size=chunk_size,
        )
        chunks.save((asdict(sample) for sample in generated), chunk_size)
        if rank() > 0:
            return  # of several processes rank 0 gets the samples, and the others none

        # Rows finish in any order; the file is sorted by question.
        samples = [Sample(**record) for record in chunks.records()]
        samples.sort(key=lambda sample: (sample.example_index, sample.sample_index))
        write_jsonl(stage.path, (asdict(sample) for sample in samples))

        prompt_lengths = [len(run.tokens.prompt_ids[example.question]) for example in run.data.pool]
        completion_lengths = [len(sample.token_ids) for sample in samples]
        stage.metadata["n_samples"] = len(samples)
        stage.metadata["n_correct"] = sum(sample.is_correct is True for sample in samples)
        stage.metadata["flops"] = sampling_flops(model_size(loaded), prompt_lengths, completion_lengths)


def saved_chunks(run: Run, stage_name: str, *identity: object, settings: SamplingSettings) -> Chunks:
    """The samples that an interrupted stage left, of these settings and whatever else the `identity` has.

    A chunk depends on its requests and the model alone (on the slots by rounding at most): none is sampled again.
    """
    without_slots = replace(settings, slots=1)
    return Chunks(run.directory.progress(stage_name), stage_name, *identity, without_slots, run.calculator, run.dtype)


def weights_of(run: Run, model: Path) -> object:
    """What tells a model's weights from any others: the hashes that its stage has already; the base's are taken now."""
    if model == run.base:
        return model_hash(model)
    hashes: dict[str, str] = run.directory.stages[str(model.relative_to(run.directory.path))]["sha256"]
    return {name: sha256 for name, sha256 in hashes.items() if name.endswith(".safetensors")}


def read_samples(path: Path) -> Iterator[Sample]:
    """The samples of a file that `sample_rationales` wrote."""
    for _, record in read_jsonl(path):
        yield Sample(**record)


def candidates(run: Run, iteration: int, name: str, *, merges_iterations: bool = True) -> list[Candidates]:
    """Gold, correct and incorrect rationales of every question of the pool, from this and all earlier iterations.

    The newest samples come first, so that of near-duplicates the newest remains. Without `merges_iterations` the
    samples are those of this iteration alone.
    """
    questions = [example.question for example in run.data.pool]
    known = [Candidates(run.tokens.prompt_ids[question], run.tokens.gold.get(question)) for question in questions]
    first_iteration = 1 if merges_iterations else iteration
    for sampled_in in range(iteration, first_iteration - 1, -1):
        for sample in read_samples(run.path(sampled_in) / f"{name}.jsonl"):
            known[sample.example_index].add(sample)
    return known


def load_for_sampling(run: Run, directory: Path) -> Model:
    """A model in the precision that sampling uses on this device."""
    free_models()
    return load_model(directory, run.dtype, run.device)


# -- preferences ------------------------------------------------------------------------------------------------------


def build_preference_pairs(run: Run, iteration: int) -> None:
    """Preference pairs (equation 4) from the samples-dpo of this and all earlier iterations."""
    name = f"iteration-{iteration}/pairs.jsonl"
    if run.directory.is_finished(name):
        return
    with run.directory.stage(name) as stage:
        if rank() == 0:
            records = pair_records(run, iteration)
            write_jsonl(stage.path, records)
            stage.metadata["pairs"] = len(records)


def pair_records(run: Run, iteration: int) -> list[dict[str, Any]]:
    """The preference pairs as they are written, question by question."""
    records = []
    for example, of_question in zip(run.data.pool, candidates(run, iteration, "samples-dpo"), strict=True):
        pairs = preference_pairs(
            of_question,
            max_similarity=run.preset.max_similarity,
            pairs_per_question=run.preset.pairs_per_question,
        )
        for pair in pairs:
            record = question_and_answer(example)
            record["chosen"] = run.template.decode(pair.chosen.target_ids)
            record["rejected"] = run.template.decode(pair.rejected.target_ids)
            record["chosen_ids"] = pair.chosen.target_ids
            record["rejected_ids"] = pair.rejected.target_ids
            record["similarity"] = round(jaccard(pair.chosen, pair.rejected), 4)
            records.append(record)
    return records


def read_pairs(run: Run, iteration: int) -> list[PreferencePair]:
    """The preference pairs of an iteration as they are trained on."""
    pairs = []
    for _, record in read_jsonl(run.path(iteration) / "pairs.jsonl"):
        chosen = run.tokens.example(record["question"], record["chosen_ids"])
        rejected = run.tokens.example(record["question"], record["rejected_ids"])
        pairs.append(PreferencePair(chosen, rejected))
    return pairs


def compute_reference(run: Run, iteration: int, *, model: Path) -> None:
    """log π_ref of every pair (equation 5), once for all steps of DPO: a (P, 2) tensor, columns chosen and rejected.

    P counts the pairs within the preset's lengths, in their order.
    """
    name = f"iteration-{iteration}/reference.safetensors"
    if run.directory.is_finished(name):
        return
    with run.directory.stage(name) as stage, when_memory_runs_out(training_advice(run, name)):
        pairs = within_limits(run, read_pairs(run, iteration), f"{iteration}/reference")
        reference_P2 = torch.empty(0, 2)
        flops = 0.0
        if pairs:
            policy = load_for_training(model, run.preset, dtype=run.training_dtype, device=run.device, seed=None)
            reference_P2 = reference_log_probabilities(
                policy,
                pairs,
                micro_batch_tokens=run.preset.micro_batch_tokens,
                stage=f"{iteration}/dpo",
                dtype=run.training_dtype,
            )
            n_source, n_target = token_counts(pairs)
            flops = forward_flops(model_size(policy), n_source, n_target)
        write_safetensors(in_memory({"reference_P2": reference_P2}), stage.path)
        stage.metadata["flops"] = flops


def train_preferences(run: Run, iteration: int, *, model: Path) -> None:
    """DPO of a model, against the reference that it gave itself. Without pairs the model stays as it is."""
    name = f"iteration-{iteration}/dpo"
    if run.directory.is_finished(name):
        return
    with run.directory.stage(name) as stage, when_memory_runs_out(training_advice(run, name)):
        pairs = within_limits(run, read_pairs(run, iteration), f"{iteration}/dpo")
        policy = load_with_adapters(run, model, f"{iteration}/dpo")
        flops = 0.0
        if pairs:
            with open_tensors(run.path(iteration) / "reference.safetensors") as file:
                reference_P2 = file.get_tensor("reference_P2")
            settings = run.preset.dpo(len(pairs), run.seed, run.training_dtype)
            if settings.steps < run.preset.dpo_steps:
                run.directory.log(
                    f"{iteration}/dpo: {settings.steps} steps instead of {run.preset.dpo_steps}, because {len(pairs)} "
                    f"pairs are used in {run.preset.dpo_max_epochs} epochs at most (--dpo-max-epochs)"
                )
            train_dpo(
                policy,
                pairs,
                reference_P2,
                settings,
                log_path=log_path(stage),
                stage=f"{iteration}/dpo",
                state=run.training_state(name),
            )
            n_source, n_target = token_counts(pairs)
            steps_per_epoch = -(-len(pairs) // settings.pairs_per_step)  # rounded up
            n_epochs = settings.steps / steps_per_epoch
            is_frozen = run.preset.freezes_weights
            flops = n_epochs * training_flops(model_size(policy), n_source, n_target, is_frozen=is_frozen)
        else:
            run.directory.log(f"iteration {iteration}: no preference pairs, so DPO leaves the model as it is")
        save_trained(policy, stage.path, start=model, eos_id=run.template.eos_id, dtype=run.save_dtype)
        stage.metadata["flops"] = flops


# -- pseudo-labels ----------------------------------------------------------------------------------------------------


def build_pseudo_labels(run: Run, iteration: int) -> Path:
    """What the base is fine-tuned on, by the method's rules: S_α, from samples-sft, and L. Returns the file's path.

    UserError where there is nothing to fine-tune on.
    """
    name = f"iteration-{iteration}/pseudo-labels.jsonl"
    path = run.directory.path / name
    if run.directory.is_finished(name):
        return path
    with run.directory.stage(name) as stage:
        if rank() == 0:
            records = label_records(run, iteration)
            if not records:
                nothing = "not one sample was correct, so there is nothing to fine-tune on"
                raise UserError(f"iteration {iteration}: {nothing}")
            write_jsonl(stage.path, records)
            stage.metadata["pseudo_labels"] = sum(record["source"] == "sample" for record in records)
            stage.metadata["examples"] = len(records)
    return path


def label_records(run: Run, iteration: int) -> list[dict[str, Any]]:
    """The pseudo-labels as they are written, question by question."""
    method = run.rules
    questions = candidates(run, iteration, "samples-sft", merges_iterations=method.merges_iterations)
    seed = derived_seed(run.seed, f"{iteration}/pseudo-labels")
    labels = pseudo_labels(questions, method, run.preset, seed=seed)
    records = []
    for example, of_question, rationales in zip(run.data.pool, questions, labels, strict=True):
        for rationale in rationales:
            record = question_and_answer(example)
            record["rationale"] = run.template.decode(rationale.target_ids)
            # A sample may have the very ids of the human rationale and yet be a sample, so `is` and not `==`.
            record["source"] = "gold" if rationale is of_question.gold else "sample"
            record["token_ids"] = rationale.target_ids
            records.append(record)
    return records


def question_and_answer(example: Example) -> dict[str, Any]:
    """The two fields that every record of pairs.jsonl and pseudo-labels.jsonl begins with."""
    return {"question": example.question, "answer": example.answer}


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluate(run: Run, iteration: int) -> float:
    """Score f_θ' on dev and the test sets, and f_θd, where the iteration has one, on dev.

    Returns the greedy accuracy of f_θ' on dev, in [0, 1]. evaluation.json has "sft" and "dpo", one `evaluate_model`
    each. f_θ' as it was before this iteration's DPO is in the evaluation of the iteration before (figure 6).
    """
    name = f"iteration-{iteration}/evaluation.json"
    path = run.directory.path / name
    dev = {run.data.dev_name: run.data.dev}
    if not run.directory.is_finished(name):
        with run.directory.stage(name) as stage, when_memory_runs_out(sampling_advice(run, name)):
            sets = dev | limited_test_sets(run)
            evaluation = {"sft": evaluate_model(run, name, f"{iteration}/sft", model=run.model(iteration), sets=sets)}
            if f"iteration-{iteration}/dpo" in run.directory.stages:
                dpo = run.path(iteration) / "dpo"
                evaluation["dpo"] = evaluate_model(run, name, f"{iteration}/dpo", model=dpo, sets=dev)
            if rank() == 0:
                write_json(stage.path, evaluation)

    content: Any = on_rank_0(lambda: read_json(path))
    accuracy: float = content["sft"]["greedy"][run.data.dev_name]["value"]
    return accuracy


def limited_test_sets(run: Run) -> dict[str, Sequence[Example]]:
    """The first `test_questions` of each test set, by name; none at all for 0."""
    n_questions = run.preset.test_questions
    if n_questions == 0:
        return {}
    return {name: examples[:n_questions] for name, examples in run.data.tests.items()}


def evaluate_model(
    run: Run, stage_name: str, label: str, *, model: Path, sets: dict[str, Sequence[Example]]
) -> dict[str, Any]:
    """The scores of one model, each with what it is a mean of, so that models can be compared question by question.

    "greedy" has the accuracy on each set and, as "correct", 1 or 0 for each question; "sampled" the fields of a
    SampledScores, for pass@1 to pass@`pass_at` and maj@`pass_at` on dev. It is None for pass_at = 1: greedy accuracy is
    the paper's pass@1. What has been sampled is saved, chunk after chunk, until the stage is finished.
    """
    loaded = load_for_sampling(run, model)
    # Every model gets the same random numbers, so that less of the difference between two is chance.
    settings = run.sampling_settings("evaluation")

    weights = on_rank_0(lambda: weights_of(run, model))

    def chunks(kind: str, examples: Sequence[Example]) -> Chunks:
        return saved_chunks(run, stage_name, label, kind, weights, questions_hash(examples), settings=settings)

    # All sets in one go: at the end of each, slots would stand empty.
    all_examples = [example for examples in sets.values() for example in examples]
    outcomes = greedy_outcomes(
        loaded,
        run.template,
        all_examples,
        settings,
        calculator=run.calculator,
        label=f"{label}, greedy",
        chunks=chunks("greedy", all_examples),
    )
    remaining = iter(outcomes)
    greedy = {}
    for name, examples in sets.items():
        correct = list(islice(remaining, len(examples)))
        greedy[name] = {**asdict(mean_score(correct)), "correct": correct}

    sampled = None
    pass_at = run.preset.pass_at
    if pass_at > 1:
        asked = run.data.dev[: run.preset.pass_questions]
        scores = sampled_scores(
            loaded,
            run.template,
            asked,
            settings,
            pass_at=range(1, pass_at + 1),
            maj_at=(pass_at,),
            calculator=run.calculator,
            label=f"{label}, pass@{pass_at}",
            chunks=chunks(f"{pass_at} samples", asked),
        )
        sampled = asdict(scores)
    return {"greedy": greedy, "sampled": sampled}


# -- which models stay ------------------------------------------------------------------------------------------------


def remove_models(run: Run, accuracies: Sequence[float]) -> None:
    """Remove the weights of models that are no longer needed, after an iteration, as `run.keep` has it.

    "all": none are removed. "last": the last f_θ' stays, which the next iteration begins with. "best": so does the one
    that is the best on dev so far; `accuracies` are those of all iterations.
    """
    if run.keep == "all":
        return
    last = len(accuracies) - 1
    staying = {last}
    if run.keep == "best":
        staying.add(accuracies.index(max(accuracies)))  # the earliest in a tie, as in the report
    for iteration in range(last + 1):
        for name in ("sft", "dpo"):
            stage = f"iteration-{iteration}/{name}"
            if stage in run.directory.stages and (name == "dpo" or iteration not in staying):
                run.directory.remove_weights(stage)


# -- convergence ------------------------------------------------------------------------------------------------------


def has_converged(run: Run, accuracies: Sequence[float]) -> bool:
    """Whether to stop after the last of the iterations with these accuracies on dev, the warm-up's first.

    That is where the best one is `patience` iterations old. A run that was stopped so goes on where a command asks for
    more iterations or more patience: it counts again from where it stopped.
    """
    return on_rank_0(lambda: _has_converged(run, accuracies))


def _has_converged(run: Run, accuracies: Sequence[float]) -> bool:
    patience = run.preset.patience
    if patience is None:
        return False
    directory = run.directory.path
    earlier = earlier_stop(directory)["after"]
    last = len(accuracies) - 1
    if last <= earlier:
        return last == stopped_after(directory, run.preset)
    best = accuracies.index(max(accuracies))  # the earliest in a tie
    if last - max(best, earlier) < patience:
        return False
    write_json(directory / STOP, {"after": last, "iterations": run.preset.iterations, "patience": patience})
    run.directory.log(
        f"stopped after iteration {last}: dev accuracy has not risen above the {accuracies[best]:.1%} of iteration "
        f"{best} for {patience} iterations (--patience); with more --iterations or --patience the run goes on"
    )
    return True


def stopped_after(directory: Path, preset: Preset) -> int | None:
    """The iteration that a run in this directory was stopped after for want of patience; None where it may go on.

    It may where it was not stopped, and where a preset has more iterations or more patience than it was stopped with.
    UserError where the record of the stop is broken.
    """
    stopped = earlier_stop(directory)
    if preset.patience is None or preset.iterations > stopped["iterations"] or preset.patience > stopped["patience"]:
        return None
    return stopped["after"]


def earlier_stop(directory: Path) -> dict[str, int]:
    """What is recorded of a stop: the iteration that it came after, and the hyperparameters it came by; zeros without.

    UserError where the record is broken.
    """
    path = directory / STOP
    names = ("after", "iterations", "patience")
    if not path.is_file():
        return dict.fromkeys(names, 0)
    try:
        return {name: int(json_object(path)[name]) for name in names}
    except (OSError, ValueError, LookupError, TypeError):
        raise UserError(f"{path} is not readable; restore it, or --fresh") from None
