"""Self-training as sequences of stages (paper, algorithms 1 and 2), and what lets a run be continued.

    sft      fine-tune the base on the labelled set L: the warm-up, iteration 0 of every method
    st       repeat: sample K rationales a question of U, keep the right ones as S', fine-tune the BASE on L ∪ S'
    dpo-st   repeat: sample 5 from f, prefer right over wrong (DPO from f gives f_d), sample K from f_d, then as st
    rft      one round of st with K = 100
    rest-em  st, but fine-tuned on the kept samples alone

Stages hand over files, so the same command continues behind the last finished one (rundir.py), and within one from its
last checkpoint or chunk (resume.py). The samples of all earlier rounds are merged into the pairs and pseudo-labels of
later ones, as the published code does. A run ends after the given number of iterations, or before, when accuracy on dev
no longer rises.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path

from torch import nn

from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.models.weights import load_model, load_template, save_model
from minidpost.precision import sampling_dtype
from minidpost.sampling import sampler
from minidpost.sampling.generate import Sample, check_prompts, generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.estimates import forward_flops, model_size, sampling_flops, training_flops
from minidpost.selftraining.evaluation import greedy_accuracy, sampled_scores
from minidpost.selftraining.presets import Preset
from minidpost.selftraining.run_directory import Chunks, RunDirectory
from minidpost.selftraining.selection import Candidates, preference_pairs, pseudo_labels
from minidpost.storage import read_jsonl, write_json, write_jsonl
from minidpost.text.templates import Template
from minidpost.training.batching import TokenizedExample, drop_too_long, token_counts
from minidpost.training.dpo import PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import derived_seed
from minidpost.training.sft import train_sft
from minidpost.training.state import TrainingState

PASS_AT = 10  # samples a dev question, before and after each DPO
PASS_QUESTIONS = 100  # dev questions that are sampled for it


@dataclass(frozen=True)
class Data:
    """Labelled examples; the questions to sample for (labelled ones included); dev; test sets by name."""

    labelled: Sequence[Example]
    pool: Sequence[Example]
    dev: Sequence[Example]
    tests: dict[str, Sequence[Example]]
    name: str

    def fingerprint(self) -> str:
        """A short hash of every example, by which a run knows its data again."""
        return hashlib.sha256(repr([self.labelled, self.pool, self.dev, self.tests]).encode()).hexdigest()[:16]


class Run:
    """A method at work: the stages of its iterations, each a file or a directory of the run's directory."""

    def __init__(
        self,
        directory: RunDirectory,
        base: Path,
        method: str,
        preset: Preset,
        data: Data,
        seed: int,
        calculator: bool,
        device: str,
        checkpoint_minutes: float = 5.0,
    ):
        self.directory, self.base, self.method, self.preset, self.data = directory, base, method, preset, data
        self.seed, self.calculator, self.device, self.checkpoint_minutes = seed, calculator, device, checkpoint_minutes
        self.template = load_template(base)
        for examples in (data.pool, data.dev, *data.tests.values()):
            questions = [example.question for example in examples]
            check_prompts(questions, [self.template.prompt_ids(question) for question in questions])
        self.gold = self._encode_labelled()

    # -- the method ---------------------------------------------------------------------------------------------------

    def iterations(self) -> Iterable[int]:
        """Work off the iterations, yielding the number of each when all its files are there."""
        self.fine_tune(0, None)
        best = self.evaluate(0)
        yield 0
        for number in range(1, 1 if self.method == "sft" else self.preset.iterations + 1):
            self.iterate(number)
            accuracy = self.evaluate(number)
            yield number
            if accuracy <= best:
                self.directory.say(
                    f"stopped after iteration {number}: dev accuracy {accuracy:.1%} is not above {best:.1%}"
                )
                return
            best = accuracy

    def iterate(self, number: int) -> None:
        """One iteration: a better model than the last one's makes new pseudo-labels, and the base learns from them."""
        teacher = self.path(number - 1) / "sft"
        if self.method == "dpo-st":
            self.sample(number, "samples-dpo", teacher, self.preset.dpo_samples)
            self.pair(number)
            self.prefer(number, teacher)
            teacher = self.path(number) / "dpo"
        self.sample(number, "samples-sft", teacher, self.preset.samples)
        self.label(number)
        self.fine_tune(number, self.path(number) / "pseudo-labels.jsonl")

    # -- stages -------------------------------------------------------------------------------------------------------

    def fine_tune(self, number: int, labels: Path | None) -> None:
        """SFT of the base on the labelled set (labels None) or on a file of pseudo-labels, gold ones among them."""

        def work(directory: Path) -> dict:
            if labels is None:
                sequences = list(self.gold.values())
            else:
                sequences = [encoded(self.template, row["question"], row["token_ids"]) for _, row in read_jsonl(labels)]
            sequences = self.drop_too_long(sequences, f"{number}/sft")
            model = load_model(self.base, device=self.device)
            settings = self.preset.sft(self.seed)
            log, state = directory / "log.jsonl", self.training_state(f"iteration-{number}/sft")
            train_sft(model, sequences, settings, log_path=log, stage=f"{number}/sft", state=state)
            save_model(model, directory)
            n_source, n_target = token_counts(sequences)
            return {"flops": settings.epochs * training_flops(model_size(model), n_source, n_target)}

        self.directory.stage(f"iteration-{number}/sft", work)

    def sample(self, number: int, name: str, checkpoint: Path, n_samples: int) -> None:
        """Sample `n_samples` rationales for every question of the pool and grade them; chunks that are there count."""
        stage, label, pool = f"iteration-{number}/{name}.jsonl", f"{number}/{name}", self.data.pool

        def row(sample: Sample) -> dict:
            return {
                "index": sample.example_index,
                "sample": sample.sample_index,
                "question": sample.question,
                "answer": sample.answer,
                "completion": sample.completion,
                "correct": sample.is_correct,
                "token_ids": sample.token_ids,
                "forced": sample.forced,
                "finish_reason": sample.finish_reason,
            }

        def work(path: Path) -> dict:
            model, settings = self.load_for_sampling(checkpoint), self.sampling(label)
            questions, answers = [e.question for e in pool], [e.answer for e in pool]
            chunks = Chunks(self.directory.progress(stage), stage, settings, n_samples, self.calculator, sampler.CHUNK)
            first = chunks.n_finished()
            completions = generate(
                model,
                self.template,
                questions,
                settings,
                answers=answers,
                n_samples=n_samples,
                calculator=self.calculator,
                label=label,
                first_chunk=first,
            )
            for chunk in count(first):
                if not (rows := [row(done) for done in islice(completions, sampler.CHUNK)]):
                    break
                chunks.commit(chunk, rows)
            rows = sorted(chunks.rows(), key=lambda row: (row["index"], row["sample"]))
            write_jsonl(path, rows)
            prompts = [len(self.template.prompt_ids(question)) for question in questions]
            flops = sampling_flops(model_size(model), prompts, [len(row["token_ids"]) for row in rows])
            return {"n_samples": len(rows), "n_right": sum(row["correct"] for row in rows), "flops": flops}

        self.directory.stage(stage, work)

    def pair(self, number: int) -> None:
        """Preference pairs from the samples-dpo of this and all earlier iterations."""

        def work(path: Path) -> dict:
            rows = [
                question_and_answer(example)
                | {"chosen": self.template.decode(chosen), "rejected": self.template.decode(rejected)}
                | {"chosen_ids": chosen, "rejected_ids": rejected, "similarity": round(similarity, 4)}
                for example, candidates in zip(self.data.pool, self.candidates(number, "samples-dpo"), strict=True)
                for chosen, rejected, similarity in preference_pairs(candidates)
            ]
            write_jsonl(path, rows)
            return {"pairs": len(rows)}

        self.directory.stage(f"iteration-{number}/pairs.jsonl", work)

    def prefer(self, number: int, policy: Path) -> None:
        """DPO from `policy`, which is also the reference."""

        def work(directory: Path) -> dict:
            pairs = []
            for _, row in read_jsonl(self.path(number) / "pairs.jsonl"):
                chosen, rejected = (
                    encoded(self.template, row["question"], row[f"{k}_ids"]) for k in ("chosen", "rejected")
                )
                pairs.append(PreferencePair(chosen, rejected))
            pairs = self.drop_too_long(pairs, f"{number}/dpo")
            model = load_model(policy, device=self.device)
            size, flops = model_size(model), 0.0
            if pairs:
                settings = self.preset.dpo(len(pairs), self.seed)
                log, state = directory / "log.jsonl", self.training_state(f"iteration-{number}/dpo")
                stage, micro_batch_tokens = f"{number}/dpo", settings.micro_batch_tokens
                reference_P2 = reference_log_probabilities(
                    model, pairs, micro_batch_tokens=micro_batch_tokens, stage=stage
                )
                train_dpo(model, pairs, reference_P2, settings, log_path=log, stage=stage, state=state)
                n_source, n_target = token_counts(pairs)
                epochs = settings.steps / -(-len(pairs) // settings.pairs_per_step)
                flops = epochs * training_flops(size, n_source, n_target)
                flops += forward_flops(size, n_source, n_target)  # the reference
            else:
                self.directory.say(f"iteration {number}: no preference pairs, so DPO leaves the model as it is")
            save_model(model, directory)
            return {"flops": flops}

        self.directory.stage(f"iteration-{number}/dpo", work)

    def label(self, number: int) -> None:
        """Pseudo-labels from the samples-sft of this and all earlier iterations; gold rationales but for ReST-EM."""

        def work(path: Path) -> dict:
            candidates, with_gold = self.candidates(number, "samples-sft"), self.method != "rest-em"
            kept = pseudo_labels(candidates, self.preset.label_cap, with_gold)
            rows = [
                question_and_answer(example)
                | {
                    "rationale": self.template.decode(ids),
                    "source": "gold" if with_gold and ids == known.gold else "sample",
                    "token_ids": ids,
                }
                for example, known, labels in zip(self.data.pool, candidates, kept, strict=True)
                for ids in labels
            ]
            if not rows:
                raise UserError(f"iteration {number}: not one sample was right, so there is nothing to fine-tune on")
            write_jsonl(path, rows)
            return {"pseudo_labels": sum(row["source"] == "sample" for row in rows), "examples": len(rows)}

        self.directory.stage(f"iteration-{number}/pseudo-labels.jsonl", work)

    def evaluate(self, number: int) -> float:
        """Greedy accuracy on dev and all test sets, pass@10 on dev; the accuracy on dev."""
        dev = f"{self.data.name}/dev"

        def work(path: Path) -> dict:
            settings = self.sampling(f"{number}/evaluation")
            model = self.load_for_sampling(self.path(number) / "sft")
            scores = {
                name: asdict(
                    greedy_accuracy(
                        model, self.template, examples, settings, calculator=self.calculator, label=f"{number}/{name}"
                    )
                )
                for name, examples in {dev: self.data.dev, **self.data.tests}.items()
            }
            result = {"greedy": scores, "sampled": {"sft": self.pass_at(model, number, settings)}}
            if (directory := self.path(number) / "dpo").is_dir():
                result["sampled"]["dpo"] = self.pass_at(self.load_for_sampling(directory), number, settings)
            write_json(path, result)
            return {}

        final = self.directory.stage(f"iteration-{number}/evaluation.json", work)
        return json.loads(final.read_text(encoding="utf-8"))["greedy"][dev]["value"]

    # -- what the stages share ----------------------------------------------------------------------------------------

    def path(self, number: int) -> Path:
        """The directory of an iteration."""
        return self.directory.path / f"iteration-{number}"

    def _encode_labelled(self) -> dict[str, TokenizedExample]:
        """The labelled set as ids, by question; UserError where not one rationale survives the tokenizer."""
        gold, lost = {}, 0
        for example in self.data.labelled:
            if self.template.round_trips(self.template.target(example.rationale)):
                ids = self.template.target_ids(example.rationale)
                gold[example.question] = encoded(self.template, example.question, ids)
            else:
                lost += 1
        if lost:
            self.directory.say(
                f"{lost} of {len(self.data.labelled)} rationales left out: the tokenizer cannot write them"
            )
        if not gold:
            raise UserError(f"{self.data.name}: no labelled rationale can be written with the tokenizer of {self.base}")
        return gold

    def drop_too_long(self, items: list, stage: str) -> list:
        """The examples or pairs that keep to the preset's lengths; how many do not is said."""
        max_source, max_target = self.preset.max_source, self.preset.max_target
        kept = drop_too_long(items, max_source, max_target)
        if len(kept) < len(items):
            self.directory.say(
                f"{stage}: {len(items) - len(kept)} of {len(items)} left out, being longer than {max_source} source or "
                f"{max_target} target tokens"
            )
        if items and not kept:
            raise UserError(f"{stage}: all {len(items)} examples are longer than the limits of the model's preset")
        return kept

    def candidates(self, number: int, name: str) -> list[Candidates]:
        """Gold, right and wrong rationales of every question of the pool, newest samples first.

        A completion that was cut by the length limit has no end token, so it can lose but not win.
        """
        known = [
            Candidates(gold=self.gold[e.question].target_ids if e.question in self.gold else None)
            for e in self.data.pool
        ]
        for earlier in range(number, 0, -1):
            for _, row in read_jsonl(self.path(earlier) / f"{name}.jsonl"):
                ids, question = tuple(row["token_ids"]), known[row["index"]]
                if not row["correct"]:
                    question.wrong.append(ids)
                elif row["finish_reason"] == "stop":
                    question.right.append(ids)
        return known

    def load_for_sampling(self, checkpoint: Path) -> nn.Module:
        """A checkpoint in the precision that sampling uses on this device."""
        return load_model(checkpoint, sampling_dtype(self.device), self.device)

    def pass_at(self, model: nn.Module, number: int, settings: SamplingSettings) -> dict:
        """pass@1 and pass@10 on (the first of) dev, from ten samples a question."""
        dev = self.data.dev[:PASS_QUESTIONS]
        label = f"{number}/pass@{PASS_AT}"
        passed, _ = sampled_scores(
            model, self.template, dev, settings, pass_at=(1, PASS_AT), calculator=self.calculator, label=label
        )
        return {f"pass_at_{k}": asdict(score) for k, score in passed.items()}

    def sampling(self, purpose: str) -> SamplingSettings:
        """The preset's sampling settings, seeded for one purpose."""
        return self.preset.sampling(derived_seed(self.seed, purpose))

    def training_state(self, stage: str) -> TrainingState:
        """Where the training of a stage is saved."""
        return TrainingState(self.directory.progress(stage) / "state.safetensors", self.checkpoint_minutes)


def encoded(template: Template, question: str, target: Sequence[int]) -> TokenizedExample:
    """A question and the ids of its rationale, which are trained on as they are."""
    return TokenizedExample(tuple(template.prompt_ids(question)), tuple(target))


def question_and_answer(example: Example) -> dict:
    """The two fields that every row of every file begins with."""
    return {"question": example.question, "answer": example.answer}
