"""Training: SFT against transformers' Trainer, DPO against TRL 0.28.0, the last release that trains encoder-decoders.

Both sides get the same weights (fp32), the very same token ids, the same AdamW (fused) and schedule, forward passes in
the same precision (plain fp32, or bf16 autocast), as many examples a step and as many epochs, so that both go through
the same tokens. What is timed is a whole training, the reference's log-probabilities included; loading the model,
tokenising and building the trainer are not. Before anything is timed, three steps on one batch are compared in fp32:
losses and gradient norms must agree.

The peers appear *as they come* (their defaults, but for precision and what the comparison sets: micro-batches of 8 in
random order, for TRL also gradient checkpointing and a reference model at every step) and *tuned* (micro-batches of the
size that was fastest here, of examples of like length; for TRL no gradient checkpointing and the reference before the
first step). The last column is the median over the rounds of a variant's time divided by ours.

Dropout is on in SFT where the model has it (flan-t5: 0.1; tiny-t5 has none) and off in DPO, on both sides: there the
model's config.json says so, as what TRL 0.28.0 does by itself leaves T5's attention dropout on. TRL also leaves the
last column of an encoder-decoder's batch out of its log-probabilities, and with it the EOS of the longest
completion; for the comparison of losses its batches get one more column of padding, it is timed as it is. With several
micro-batches a step, transformers 5.2.0 adds T5's mean losses up where their mean is meant: another size of the
gradient, the same work.

tiny-t5 has toy problems: the labelled set, and pairs out of samples of tiny-t5-dpo-st, from which DPO starts, in three
epochs, about as many as in `python train.py`. Other shapes have random weights and GSM8K (toy where its files are not
at hand), one epoch, and pairs out of five stand-ins for samples a question: rationales of other questions, of nearly
the gold one's length, three in ten of which count as correct. All pairs are chosen by `selection.preference_pairs`; the
steps are those that our own loop would begin with on all pairs of a thousand questions, since what the pairs of a step
share depends on how many others there are.

The environment, apart from the tests', as TRL 0.28.0 cannot be imported with transformers later than 5.2.0:

    python -m venv trl-env && . trl-env/bin/activate
    pip install torch==2.13.0 numpy==2.4.6 sentencepiece==0.2.3 safetensors==0.8.0 tqdm matplotlib huggingface_hub
    pip install trl==0.28.0 transformers==5.2.0 accelerate==1.15.0 datasets==5.2.0
"""

import argparse
import gc
import os
import shutil
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # both are read by imports; a program that imports this one keeps its own
    os.environ.setdefault("TQDM_DISABLE", "1")  # no bars on either side
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, command_line, instruction_set, machine_line, timed, write_result  # noqa: E402
from minidpost.cli import POSITIVE, Parser, run_command  # noqa: E402
from minidpost.data import datasets  # noqa: E402
from minidpost.data.example import Example  # noqa: E402
from minidpost.errors import UserError  # noqa: E402
from minidpost.models.t5 import T5  # noqa: E402
from minidpost.models.weights import load_model, load_template  # noqa: E402
from minidpost.precision import DTYPES, forward_dtype  # noqa: E402
from minidpost.sampling.generate import generate  # noqa: E402
from minidpost.selftraining.presets import Preset, preset_for  # noqa: E402
from minidpost.selftraining.selection import Candidates, preference_pairs  # noqa: E402
from minidpost.storage import markdown_table, read_json, write_json  # noqa: E402
from minidpost.text.templates import Template  # noqa: E402
from minidpost.training.batching import TokenizedExample, drop_too_long, epoch_steps  # noqa: E402
from minidpost.training.dpo import DPOSettings, PreferencePair, reference_log_probabilities, train_dpo  # noqa: E402
from minidpost.training.optim import Schedule, adamw, read_log  # noqa: E402
from minidpost.training.sft import SFTSettings, train_sft  # noqa: E402
from tools import random_model  # noqa: E402

SEED = 0
N_STEPS_COMPARED = 3  # steps whose losses and gradient norms are compared
N_ROWS_COMPARED = 4  # examples or pairs of each of these steps
DEFAULT_MICRO_BATCH = 8  # the peers' own
MAX_QUESTIONS = 1000  # that examples and pairs are chosen from
SAMPLES_PER_QUESTION = 5  # as in the paper
N_STAND_IN_CANDIDATES = 9  # rationales of which the one nearest in length stands in for a sample
FRACTION_CORRECT = 0.3  # of the stand-ins
BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
TUNED_DPO = {"gradient_checkpointing": False, "precompute_ref_log_probs": True, **BY_LENGTH}
LOGGED = {"logging_strategy": "steps", "logging_steps": 1}


@dataclass(frozen=True)
class Plan:
    """How much is trained, and the peers' fastest micro-batches."""

    examples_per_step: int
    pairs_per_step: int
    sft_steps: int  # one epoch
    dpo_steps: int  # of each epoch
    dpo_epochs: int
    sft_micro_batch: int
    dpo_micro_batch: int


PLANS = {"tiny-t5": Plan(16, 32, sft_steps=25, dpo_steps=5, dpo_epochs=3, sft_micro_batch=16, dpo_micro_batch=32)}
OTHERS = Plan(16, 16, sft_steps=2, dpo_steps=1, dpo_epochs=1, sft_micro_batch=8, dpo_micro_batch=4)


@dataclass(frozen=True)
class Where:
    """Where the peers train, and a directory that they may write to."""

    scratch: Path
    device: str = "cpu"


@dataclass(frozen=True)
class Task:
    """What both sides are given: directories of weights, ids, settings; where peers may write; the data in words."""

    sft_model: Path
    dpo_model: Path
    examples: list[TokenizedExample]
    pairs: list[PreferencePair]
    sft: SFTSettings
    dpo: DPOSettings
    scratch: Path
    description: str


def main() -> None:
    options = parse_options()
    check_environment()
    if options.threads:
        torch.set_num_threads(options.threads)
    sections = []
    for name in options.model:
        plan = PLANS.get(name, OTHERS)
        if options.steps:
            plan = replace(plan, sft_steps=options.steps, dpo_steps=options.steps)
        if options.per_step:
            plan = replace(plan, examples_per_step=options.per_step, pairs_per_step=options.per_step)
        with TemporaryDirectory() as scratch:
            task = prepare(name, plan, DTYPES[options.dtype], options.shared, Path(scratch))
            sections += [f"## {name}", task.description, *sft_section(task, plan, options.rounds)]
            sections += dpo_section(task, plan, options.rounds)
    versions = machine_line("transformers", "trl", "accelerate")
    header = [
        f"`{command_line()}` · {versions}, {instruction_set()}, {options.dtype}",
        f"Medians of {options.rounds} interleaved rounds.",
    ]
    header += __doc__.split("\n\n", 1)[1].strip().split("\n\n")
    write_result(options.output, "Training against transformers' Trainer and TRL's DPOTrainer", header + sections)


def parse_options() -> argparse.Namespace:
    description, environment = __doc__.split("\n\n")[0], __doc__[__doc__.index("The environment") :]
    parser = Parser(description=description, epilog=environment, formatter_class=argparse.RawDescriptionHelpFormatter)
    models, shared = ["tiny-t5", "flan-t5-small"], ROOT.parent / "shared"
    parser.add_argument(
        "--model", nargs="+", default=models, help="tiny-t5, or a T5 under SHARED/configs (default: both)"
    )
    parser.add_argument("--rounds", type=POSITIVE, default=5, help="timed rounds; the medians count (default: 5)")
    parser.add_argument("--steps", type=POSITIVE, help="optimizer steps an epoch (default: the model's)")
    parser.add_argument(
        "--per-step", type=POSITIVE, help="examples, and pairs, a step (default: 16; tiny-t5: 32 pairs)"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of forward passes (default: fp32)")
    parser.add_argument("--threads", type=POSITIVE, help="default: torch's choice")
    parser.add_argument("--shared", type=Path, default=shared, help="where configs/, tokenizers/ and data/ lie")
    parser.add_argument("--output", type=Path, default=RESULTS / "training.md")
    return parser.parse_args()


def check_environment() -> None:
    """UserError where the peers cannot be imported; else they are made quiet."""
    try:
        import accelerate  # noqa: F401
        import datasets as arrow_datasets
        import transformers
        from trl import DPOTrainer  # noqa: F401
    except (ImportError, RuntimeError) as error:  # TRL's lazy imports raise the latter
        raise UserError(
            f"trl and what it needs cannot be imported ({error}); --help says how to install them"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arrow_datasets.disable_progress_bars()


# -- what is trained on -----------------------------------------------------------------------------------------------


def prepare(name: str, plan: Plan, dtype: torch.dtype, shared: Path, scratch: Path) -> Task:
    """Weights, ids and settings of one model; UserError where its config, vocabulary or enough data are missing."""
    n_examples = plan.examples_per_step * plan.sft_steps
    n_pairs = plan.pairs_per_step * plan.dpo_steps
    if name == "tiny-t5":
        base, policy, source = ROOT / "weights" / "tiny-t5", ROOT / "weights" / "tiny-t5-dpo-st", "toy"
    else:
        base = policy = scratch / name
        random_model.make(shared / "configs" / name, shared / "tokenizers" / "t5", base, SEED, None)
        source = "gsm8k" if (shared / "data" / "gsm8k" / "train.jsonl").is_file() else "toy"
    template, preset = load_template(base), preset_for(base, "dpo-st")
    labelled = datasets.load(source, "train", shared / "data")
    labelled = Random(SEED).sample(labelled, min(len(labelled), MAX_QUESTIONS))
    gold = gold_sequences(labelled, template, preset)
    examples = list(gold.values())[:n_examples]
    if name == "tiny-t5":
        pool = [*labelled, *datasets.load("toy", "unlabelled")[: MAX_QUESTIONS - len(labelled)]]
        all_pairs = sampled_pairs(policy, pool, gold, template, preset)
    else:
        all_pairs = stand_in_pairs(list(gold.values()), preset)
    if len(examples) < n_examples or len(all_pairs) < n_pairs:
        raise UserError(
            f"{name}: {n_examples} examples and {n_pairs} pairs are asked for, {source} has {len(gold)} and "
            f"{len(all_pairs)}; take fewer --steps or --per-step"
        )
    steps = epoch_steps(len(all_pairs), plan.pairs_per_step, plan.dpo_steps, SEED)
    pairs = [all_pairs[i] for pair_indices in steps for i in pair_indices]
    sft = replace(preset.sft(SEED), epochs=1, examples_per_step=plan.examples_per_step, dtype=dtype)
    n_dpo_steps = plan.dpo_steps * plan.dpo_epochs
    dpo = replace(preset.dpo(n_pairs, SEED), steps=n_dpo_steps, pairs_per_step=plan.pairs_per_step, dtype=dtype)
    policy = without_dropout(policy, scratch / "dpo")
    description = f"{source}: {described(examples, pairs, all_pairs)}"
    return Task(base, policy, examples, pairs, sft, dpo, scratch, description)


def described(examples: list[TokenizedExample], pairs: list[PreferencePair], all_pairs: list[PreferencePair]) -> str:
    """The data in words."""
    completions = {sequence for pair in pairs for sequence in pair.sequences}
    prompts = {pair.chosen.prompt_ids for pair in pairs}
    return (
        f"{len(examples)} examples ({mean_tokens(examples)}); {len(pairs)} of {len(all_pairs)} pairs, of "
        f"{len(prompts)} questions, with {len(completions)} different completions ({mean_tokens(completions)})."
    )


def mean_tokens(sequences: Collection[TokenizedExample]) -> str:
    """Mean lengths of prompts and targets, in words."""
    n_prompt = sum(len(sequence.prompt_ids) for sequence in sequences)
    n_target = sum(len(sequence.target_ids) for sequence in sequences)
    return f"mean tokens: question {n_prompt / len(sequences):.0f}, rationale {n_target / len(sequences):.0f}"


def gold_sequences(labelled: list[Example], template: Template, preset: Preset) -> dict[str, TokenizedExample]:
    """The labelled set as ids, by question: what the tokenizer can write and the preset's lengths allow."""
    gold = {}
    for example in labelled:
        prompt_ids = tuple(template.prompt_ids(example.question))
        sequence = TokenizedExample(prompt_ids, tuple(template.target_ids(example.rationale)))
        round_trips = template.round_trips(template.target(example.rationale))
        if round_trips and drop_too_long([sequence], preset.max_source, preset.max_target):
            gold[example.question] = sequence
    return gold


def sampled_pairs(
    policy: Path, pool: list[Example], gold: dict, template: Template, preset: Preset
) -> list[PreferencePair]:
    """Pairs as the method makes them: samples of the policy, graded, chosen by our rules."""
    questions = [example.question for example in pool]
    known = [Candidates(tuple(template.prompt_ids(question)), gold.get(question)) for question in questions]
    answers = [example.answer for example in pool]
    settings = preset.sampling(SEED)
    samples = generate(
        load_model(policy), template, questions, settings, answers=answers, n_samples=SAMPLES_PER_QUESTION
    )
    for sample in samples:
        known[sample.example_index].add(sample)
    return [pair for candidates in known for pair in pairs_of(candidates, preset)]


def stand_in_pairs(gold: list[TokenizedExample], preset: Preset) -> list[PreferencePair]:
    """Pairs of real rationales where no model is at hand that could sample: see the head of this file."""
    random = Random(SEED)
    pairs = []
    for sequence in gold:
        candidates = Candidates(sequence.prompt_ids, sequence)
        for _ in range(SAMPLES_PER_QUESTION):
            others = [other.target_ids for other in random.sample(gold, N_STAND_IN_CANDIDATES) if other is not sequence]
            nearest = min(others, key=lambda ids, gold=sequence.target_ids: abs(len(ids) - len(gold)))
            same_grade = candidates.correct if random.random() < FRACTION_CORRECT else candidates.incorrect
            same_grade.append(TokenizedExample(sequence.prompt_ids, nearest))
        pairs += pairs_of(candidates, preset)
    return pairs


def pairs_of(candidates: Candidates, preset: Preset) -> list[PreferencePair]:
    """The preference pairs of one question by the preset's numbers."""
    return preference_pairs(
        candidates, max_similarity=preset.max_similarity, pairs_per_question=preset.pairs_per_question
    )


# -- the peers --------------------------------------------------------------------------------------------------------


def peer_model(directory: Path):
    """transformers' T5 with these weights; releases from 5 on tie a head that is not, so it is put in place again."""
    from safetensors.torch import load_file
    from transformers import T5ForConditionalGeneration

    model = T5ForConditionalGeneration.from_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    if "lm_head.weight" in tensors:
        model.lm_head.weight = torch.nn.Parameter(tensors["lm_head.weight"])
    return model


def pad_only_tokenizer():
    """All that the peers ask of a tokenizer when they get ids: how to pad."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<pad>": 0})), pad_token="<pad>")


def common_arguments(settings: SFTSettings | DPOSettings, per_step: int, micro_batch: int, where: Where) -> dict:
    """What TrainingArguments and DPOConfig have in common."""
    return {
        "output_dir": str(where.scratch / "peer"),
        "use_cpu": where.device == "cpu",
        "bf16": forward_dtype(torch.device(where.device), settings.dtype) == torch.bfloat16,
        "seed": SEED,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": per_step // micro_batch,
        "max_grad_norm": settings.schedule.max_grad_norm,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def dividing(per_step: int, size: int) -> int:
    """The largest micro-batch of at most `size` that a step consists of a whole number of."""
    return max(smaller for smaller in range(1, size + 1) if per_step % smaller == 0)


def optimizers(model, schedule: Schedule, n_steps: int) -> tuple:
    """Our AdamW and our schedule, for the peers."""

    def fraction_of_peak(step: int) -> float:
        return schedule.at(step, n_steps) / schedule.learning_rate

    optimizer = adamw(model, schedule)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, fraction_of_peak)


def sft_trainer(model, examples: list[TokenizedExample], settings: SFTSettings, micro_batch: int, where: Where, **more):
    """transformers' Seq2SeqTrainer of a model of transformers, ready to train; `more` goes to its arguments."""
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    tokenizer = pad_only_tokenizer()
    arguments = common_arguments(settings, settings.examples_per_step, micro_batch, where)
    arguments |= {"num_train_epochs": settings.epochs, **more}
    is_encoder_decoder = model.config.is_encoder_decoder
    n_steps = settings.epochs * len(examples) // settings.examples_per_step
    return Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(**arguments),
        DataCollatorForSeq2Seq(tokenizer, model),
        [sft_row(example, is_encoder_decoder) for example in examples],
        processing_class=tokenizer,
        optimizers=optimizers(model, settings.schedule, n_steps),
    )


def sft_row(example: TokenizedExample, is_encoder_decoder: bool) -> dict[str, list[int]]:
    """An example as the Trainer takes it: of a decoder-only model prompt and target are one row."""
    input_ids, labels = [*example.prompt_ids], [*example.target_ids]
    if not is_encoder_decoder:
        labels = [-100] * len(input_ids) + labels  # no loss at the prompt
        input_ids += example.target_ids
    return {"input_ids": input_ids, "attention_mask": [1] * len(input_ids), "labels": labels}


def dpo_trainer(model, pairs: list[PreferencePair], settings: DPOSettings, micro_batch: int, where: Where, **more):
    """TRL's DPOTrainer of a model of transformers, ready to train; `more` goes to its DPOConfig."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class DPOTrainerOfIds(DPOTrainer):
        """Takes ids, so that both sides train on the same."""

        def _prepare_dataset(self, dataset, *_):
            return dataset

    arguments = common_arguments(settings, settings.pairs_per_step, micro_batch, where)
    arguments |= {"max_steps": settings.steps, "beta": settings.beta}
    arguments |= {"remove_unused_columns": False, **more}  # for `length`, which is what they are grouped by
    rows = [
        {
            "prompt_input_ids": pair.chosen.prompt_ids,
            "chosen_input_ids": pair.chosen.target_ids,
            "rejected_input_ids": pair.rejected.target_ids,
            "length": pair.n_tokens,
        }
        for pair in pairs
    ]
    return DPOTrainerOfIds(
        model,
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(rows),
        processing_class=pad_only_tokenizer(),
        optimizers=optimizers(model, settings.schedule, settings.steps),
    )


# -- the comparison ---------------------------------------------------------------------------------------------------


def sft_section(task: Task, plan: Plan, n_rounds: int) -> list[str]:
    """Compare and time SFT; paragraphs."""

    def ours() -> Callable[[], object]:
        return partial(train_sft, load_model(task.sft_model), task.examples, task.sft)

    def peer(micro_batch: int, **more) -> Callable[[], object]:
        model = peer_model(task.sft_model)
        return sft_trainer(model, task.examples, task.sft, micro_batch, Where(task.scratch), **more).train

    default, size = (dividing(plan.examples_per_step, size) for size in (DEFAULT_MICRO_BATCH, plan.sft_micro_batch))
    variants = {
        "ours": ours,
        "Trainer, as it comes": partial(peer, default),
        f"Trainer, tuned: micro-batches of {size}, by length": partial(peer, size, **BY_LENGTH),
    }
    n_tokens = sum(sequence.n_tokens for sequence in task.examples)
    what = f"SFT, {plan.examples_per_step} examples a step, steps: {plan.sft_steps}; {n_tokens:,} tokens."
    return [f"{what} {compare_sft(task)}", *race(variants, n_rounds, n_tokens)]


def dpo_section(task: Task, plan: Plan, n_rounds: int) -> list[str]:
    """Compare and time DPO; paragraphs."""

    def ours() -> Callable[[], object]:
        return partial(dpo_with_reference, load_model(task.dpo_model), task)

    def peer(micro_batch: int, **more) -> Callable[[], object]:
        model = peer_model(task.dpo_model)
        return dpo_trainer(model, task.pairs, task.dpo, micro_batch, Where(task.scratch), **more).train

    default, size = (dividing(plan.pairs_per_step, size) for size in (DEFAULT_MICRO_BATCH, plan.dpo_micro_batch))
    variants = {
        "ours": ours,
        "TRL, as it comes": partial(peer, default),
        f"TRL, tuned: micro-batches of {size}, by length, reference before": partial(peer, size, **TUNED_DPO),
    }
    n_tokens = plan.dpo_epochs * sum(pair.n_tokens for pair in task.pairs)
    what = f"DPO, {plan.pairs_per_step} pairs a step, steps: {task.dpo.steps}, epochs: {plan.dpo_epochs};"
    what += f" {n_tokens:,} tokens."
    return [f"{what} {compare_dpo(task)}", *race(variants, n_rounds, n_tokens)]


def compare_sft(task: Task) -> str:
    """A few steps of both sides on one small batch, in fp32 and without dropout."""
    model = without_dropout(task.sft_model, task.scratch / "sft-compared")
    settings = replace(task.sft, epochs=N_STEPS_COMPARED, examples_per_step=N_ROWS_COMPARED, dtype=torch.float32)
    examples = task.examples[:N_ROWS_COMPARED]
    log = task.scratch / "sft.jsonl"
    train_sft(load_model(model), examples, settings, log_path=log)
    trainer = sft_trainer(peer_model(model), examples, settings, N_ROWS_COMPARED, Where(task.scratch), **LOGGED)
    return agreement(list(read_log(log)), trainer)


def dpo_with_reference(model: T5, task: Task, log_path: Path | None = None) -> None:
    """Our DPO from beginning to end: the reference's log-probabilities, then the optimizer steps."""
    settings = task.dpo
    reference_P2 = reference_log_probabilities(
        model, task.pairs, micro_batch_tokens=settings.micro_batch_tokens, dtype=settings.dtype
    )
    train_dpo(model, task.pairs, reference_P2, settings, log_path=log_path)


def compare_dpo(task: Task) -> str:
    """A few steps of both sides on one small batch, in fp32."""
    settings = replace(task.dpo, steps=N_STEPS_COMPARED, pairs_per_step=N_ROWS_COMPARED, dtype=torch.float32)
    small = replace(task, pairs=task.pairs[:N_ROWS_COMPARED], dpo=settings)
    log = task.scratch / "dpo.jsonl"
    dpo_with_reference(load_model(task.dpo_model), small, log)
    model = peer_model(task.dpo_model)
    trainer = dpo_trainer(model, small.pairs, settings, N_ROWS_COMPARED, Where(task.scratch), **LOGGED)
    trainer.data_collator = partial(with_spare_column, trainer.data_collator)
    return agreement(list(read_log(log)), trainer)


def without_dropout(directory: Path, copy: Path) -> Path:
    """The same model with dropout 0."""
    shutil.copytree(directory, copy)
    write_json(copy / "config.json", read_json(copy / "config.json") | {"dropout_rate": 0.0})
    return copy


def with_spare_column(collate: Callable[[list], dict], rows: list) -> dict:
    """TRL's batch with one column of padding more, for the one that it leaves out."""
    batch = collate(rows)
    for name in ("chosen_input_ids", "chosen_attention_mask", "rejected_input_ids", "rejected_attention_mask"):
        batch[name] = F.pad(batch[name], (0, 1))
    return batch


def agreement(ours: list[dict], trainer) -> str:
    """Train the peer for as many steps as our log has; UserError where losses or gradient norms differ."""
    losses, step = [], trainer.training_step

    def watched(*arguments, **more):
        loss = step(*arguments, **more)
        losses.append(loss.item())
        return loss

    trainer.training_step = watched  # what the peers log may be rounded
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    loss_gap = max(abs(entry["loss"] - loss) for entry, loss in zip(ours, losses, strict=True))
    norm_gap = max(abs(entry["grad_norm"] / norm - 1) for entry, norm in zip(ours, norms, strict=True))
    shown = ", ".join(f"{entry['loss']:.5f}" for entry in ours)
    if not (loss_gap < 1e-3 and norm_gap < 1e-2):
        theirs = ", ".join(f"{loss:.5f}" for loss in losses)
        raise UserError(f"losses differ: ours {shown}, theirs {theirs}; gradient norms by {norm_gap:.1e}")
    return (
        f"Compared on one batch of {N_ROWS_COMPARED}, {N_STEPS_COMPARED} steps without dropout: "
        f"our losses {shown} nats, theirs equal within {loss_gap:.0e}, "
        f"the gradient's norms within {norm_gap:.0e} of each other."
    )


def race(variants: dict[str, Callable[[], Callable[[], object]]], n_rounds: int, n_tokens: int) -> list[str]:
    """Time every variant in every round, in alternating order; the table, and the seconds of all rounds."""
    rounds = []
    for round_index in range(n_rounds):
        seconds = {}
        for name in list(variants)[:: -1 if round_index % 2 else 1]:
            train = variants[name]()
            gc.collect()
            seconds[name] = timed(train)
            print(f"round {round_index + 1}: {name}: {seconds[name]:.2f} s", file=sys.stderr, flush=True)
        rounds.append(seconds)
    rows = []
    for name in variants:
        middle = median(seconds[name] for seconds in rounds)
        ratio = median(seconds[name] / seconds["ours"] for seconds in rounds)
        rows.append([name, f"{middle:.2f}", f"{n_tokens / middle:,.0f}", f"{ratio:.2f}×"])
    each = ", ".join(" / ".join(f"{seconds[name]:.2f}" for name in variants) for seconds in rounds)
    return [markdown_table(["", "seconds", "tokens/s", "time of ours"], rows), f"Rounds, in seconds: {each}"]


if __name__ == "__main__":
    run_command(main)
