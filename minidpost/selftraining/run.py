"""What a run consists of: its data, the data as token ids, and the settings that all of its steps share."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.sampling.generate import check_prompts
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.methods import METHODS, Method
from minidpost.selftraining.presets import Preset
from minidpost.selftraining.run_directory import RunDirectory
from minidpost.text.templates import Template
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import derived_seed
from minidpost.training.state import TrainingState

Keep = Literal["all", "best", "last"]  # which finished models stay on the disk


@dataclass(frozen=True)
class Data:
    """The labelled set L; the pool U of questions to sample for (labelled ones included); dev; test sets by name."""

    labelled: Sequence[Example]
    pool: Sequence[Example]
    dev: Sequence[Example]
    tests: dict[str, Sequence[Example]]
    name: str

    def fingerprint(self) -> str:
        """A short hash that identifies the data: of every example."""
        return hashlib.sha256(repr([self.labelled, self.pool, self.dev, self.tests]).encode()).hexdigest()[:16]

    def evaluation_sets(self) -> dict[str, Sequence[Example]]:
        """Dev and all test sets, by name."""
        return {self.dev_name: self.dev, **self.tests}

    @property
    def dev_name(self) -> str:
        """The name of dev among the evaluation sets."""
        return f"{self.name}/dev"


@dataclass(frozen=True)
class TokenizedData:
    """The training data as token ids, so that every step finds a question tokenized.

    `prompt_ids` are those of each question of the pool and of the labelled set; `gold` is the labelled set by question,
    without the `n_unwritable` examples whose rationale does not survive the tokenizer.
    """

    prompt_ids: dict[str, tuple[int, ...]]
    gold: dict[str, TokenizedExample]
    n_unwritable: int

    def example(self, question: str, target_ids: Sequence[int]) -> TokenizedExample:
        """A question and the ids of one of its rationales, which are trained on as they are."""
        return TokenizedExample(self.prompt_ids[question], tuple(target_ids))


def tokenize(data: Data, template: Template, base: Path) -> TokenizedData:
    """Tokenize the training data as the base model writes, and check that every question can be sampled for.

    UserError: a question is empty or too long, or not one labelled rationale survives the tokenizer.
    """
    for examples in (data.pool, *data.evaluation_sets().values()):
        questions = [example.question for example in examples]
        check_prompts(questions, [tuple(template.prompt_ids(question)) for question in questions])

    prompt_ids = {}
    for example in (*data.pool, *data.labelled):
        if example.question not in prompt_ids:
            prompt_ids[example.question] = tuple(template.prompt_ids(example.question))

    gold = {}
    n_unwritable = 0
    for example in data.labelled:
        if example.rationale is not None and template.round_trips(template.target(example.rationale)):
            target_ids = tuple(template.target_ids(example.rationale))
            gold[example.question] = TokenizedExample(prompt_ids[example.question], target_ids)
        else:
            n_unwritable += 1
    if not gold:
        raise UserError(f"{data.name}: no labelled rationale can be written with the tokenizer of {base}")
    return TokenizedData(prompt_ids, gold, n_unwritable)


@dataclass(frozen=True)
class Run:
    """A method, a base model, data and settings, and the directory in which the steps of the method leave their files.

    `base` is f_θ's directory. `template_name` (one of models.weights.TEMPLATES) is what fine-tuned models record of how
    they write, None what the base does. `dtype` is the precision of weights in sampling and evaluation,
    `training_dtype` that of forward passes in training, None what the device is fastest with (precision.autocast).
    `checkpoint_minutes` says how often a training in progress is saved, `save_dtype` in which precision a finished
    model is, `keep` which of those stay (steps.remove_models).
    """

    directory: RunDirectory
    base: Path
    method: str
    preset: Preset
    data: Data
    template: Template
    tokens: TokenizedData
    seed: int = 42
    template_name: str | None = None
    calculator: bool = True
    dtype: torch.dtype = torch.float32
    training_dtype: torch.dtype | None = None
    device: str = "cpu"
    checkpoint_minutes: float = 5.0
    save_dtype: torch.dtype = torch.float32
    keep: Keep = "all"

    @property
    def rules(self) -> Method:
        """What the method does in an iteration."""
        return METHODS[self.method]

    def path(self, iteration: int) -> Path:
        """The directory of an iteration."""
        return self.directory.path / f"iteration-{iteration}"

    def model(self, iteration: int) -> Path:
        """f_θ' of an iteration, the fine-tuned model; of iteration 0 without a warm-up it is the base."""
        if iteration == 0 and not self.preset.warm_up:
            return self.base
        return self.path(iteration) / "sft"

    def sampling_settings(self, purpose: str) -> SamplingSettings:
        """The preset's sampling settings, seeded for one purpose, such as "1/samples-dpo"."""
        return self.preset.sampling(derived_seed(self.seed, purpose))

    def training_state(self, stage_name: str) -> TrainingState:
        """Where the training of a stage is saved."""
        return TrainingState(self.directory.progress(stage_name) / "state.safetensors", self.checkpoint_minutes)
