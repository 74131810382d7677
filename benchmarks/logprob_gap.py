"""How far the log-probabilities that tokens are sampled by are from those that the trainer computes.

Every token of a completion has its log-probability twice: when it is drawn, from the logits of cached decoding, where a
row stands among other rows, at its own position, with the keys and values of its earlier steps; and when the completion
is trained on, from a forward pass over whole sequences. In exact arithmetic both are the same. Where they are not,
training is off-policy without knowing it: DPO's rewards and reference are log-probabilities too.

Completions are sampled by temperature 0.7 without top-k or top-p, as continuous batching does it, with slots that are
refilled; both sides' log-probabilities are those of temperature 1, in nats. Three pairs of precisions: fp32 on both
sides (a CPU's default); weights in bf16 for sampling, and fp32 weights under bf16 autocast for training (a GPU's
default, here on a CPU); bf16 for sampling and fp32 for training (a CPU with `--dtype bf16`).

The bundled models answer questions of the toy world. A Llama of SmolLM2-135M's shape has random weights and prompts;
its embedding, which is its output matrix too, is scaled so that its distributions are about as peaked as a trained
model's, as a nearly uniform one would hide most of a gap. With `--checkpoint` real weights answer questions of GSM8K.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, command_line, instruction_set, machine_line, write_result  # noqa: E402
from minidpost.data import datasets  # noqa: E402
from minidpost.data.example import Example  # noqa: E402
from minidpost.models.hf_config import Model  # noqa: E402
from minidpost.models.hub import find_model  # noqa: E402
from minidpost.models.layers import token_log_probabilities  # noqa: E402
from minidpost.models.llama import Llama, LlamaConfig  # noqa: E402
from minidpost.models.weights import load_model, load_template  # noqa: E402
from minidpost.sampling import sampler  # noqa: E402
from minidpost.sampling.sampler import Request, Row, SamplingSettings, sample  # noqa: E402
from minidpost.sampling.token_choice import row_uniforms  # noqa: E402
from minidpost.storage import markdown_table  # noqa: E402
from minidpost.training.batching import TokenizedExample, collate, micro_batches  # noqa: E402
from minidpost.training.losses import log_probabilities  # noqa: E402

BUNDLED = ("tiny-t5-sft", "tiny-t5-dpo-st", "tiny-llama")
SMOLLM2 = LlamaConfig(49152, 576, 1536, 30, n_heads=9, n_kv_heads=3, d_head=64, rope_theta=1e5, tied=True)
SMOLLM2_LOGITS = 3.0  # their standard deviation
PRECISIONS = [("fp32", "fp32"), ("bf16", "bf16 autocast"), ("bf16", "fp32")]  # of sampling, of training
SAMPLES_EACH = 2
MICRO_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Task:
    """A model in fp32, what it is asked, and how its completions are sampled and end."""

    name: str
    model: Model
    requests: list[Request]
    settings: SamplingSettings
    eos_id: int


def main() -> None:
    """Measure every model in every pair of precisions and write benchmarks/results/logprob-gap.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=100, help="for a bundled model (default %(default)s)")
    parser.add_argument("--random-questions", type=int, default=8, help="for the random one (default %(default)s)")
    parser.add_argument("--checkpoint", help="a further model, for the first --random-questions of GSM8K's test set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where GSM8K lies (default: data)")
    parser.add_argument("--output", type=Path, default=RESULTS / "logprob-gap.md")
    options = parser.parse_args()
    torch.set_num_threads(1)  # with more the sampler may work in processes of its own, where nothing can be noted

    tasks = [bundled_task(name, options.questions) for name in BUNDLED]
    tasks.append(random_task(options.random_questions))
    if options.checkpoint:
        tasks.append(checkpoint_task(options.checkpoint, options.random_questions, options.data_dir))
    rows = []
    for task in tasks:
        for sampling, training in PRECISIONS:
            print(f"{task.name}, {sampling}, {training}", file=sys.stderr, flush=True)
            rows.append([task.name, sampling, training, *measure(task, sampling, training)])
    heads = ["model", "sampled in", "trained in", "tokens", "mean", "99 %", "largest", "largest of a completion's sum"]
    introduction = __doc__.split("\n\n", 1)[1].strip()
    columns = (
        "Columns, in nats: the mean, the 99th percentile and the greatest of the absolute differences of a token's\n"
        "two log-probabilities; then the greatest absolute difference of a whole completion's log-probability."
    )
    where = f"`{command_line()}` · {machine_line()}, {instruction_set()}"
    title = __doc__.splitlines()[0].rstrip(".")
    write_result(options.output, title, [where, introduction, columns, markdown_table(heads, rows)])


def bundled_task(name: str, n_questions: int) -> Task:
    """A model of the repository, and questions of the toy world."""
    settings = SamplingSettings(temperature=0.7, max_new_tokens=160, slots=64)
    return task_of(name, datasets.load("toy", "test")[:n_questions], settings)


def checkpoint_task(name: str, n_questions: int, data_dir: Path) -> Task:
    """Real weights, and questions of GSM8K."""
    settings = SamplingSettings(temperature=0.7, max_new_tokens=100, slots=8)
    return task_of(name, datasets.load("gsm8k", "test", data_dir)[:n_questions], settings)


def task_of(name: str, examples: Sequence[Example], settings: SamplingSettings) -> Task:
    """A model that answers questions, several samples of each."""
    directory = find_model(name)
    template = load_template(directory)
    questions = [example.question for example in examples]
    requests = [
        Request(tuple(template.prompt_ids(question)), question, sample_index)
        for question in questions
        for sample_index in range(SAMPLES_EACH)
    ]
    return Task(directory.name, load_model(directory), requests, settings, template.eos_id)


def random_task(n_questions: int) -> Task:
    """A Llama of SmolLM2-135M's shape with random weights, and prompts of 60 to 200 random ids."""
    torch.manual_seed(0)
    model = Llama(SMOLLM2).initialise().eval()
    with torch.no_grad():
        # Hidden states have norm √D after the last RMS norm, so a logit is √D times as wide as an embedding's entry.
        model.embedding.weight.normal_(std=SMOLLM2_LOGITS * SMOLLM2.d_model**-0.5)
    numbers = Random(0)
    requests = []
    for index in range(n_questions):
        prompt = tuple(numbers.randrange(SMOLLM2.vocab_size) for _ in range(numbers.randint(60, 200)))
        requests += [Request(prompt, str(index), sample_index) for sample_index in range(SAMPLES_EACH)]
    settings = SamplingSettings(temperature=0.7, max_new_tokens=64, slots=8)
    return Task("SmolLM2-135M's shape, random", model, requests, settings, eos_id=2)


def measure(task: Task, sampling: str, training: str) -> list[str]:
    """The cells of one line of the table."""
    sampled_model: Model = type(task.model)(task.model.config)
    sampled_model.load_state_dict(task.model.state_dict())
    rows, drawn = sample_noted(task, sampled_model.to(torch.bfloat16 if sampling == "bf16" else torch.float32).eval())
    trained = trained_log_probabilities(task.model, rows, "bf16" in training)

    gaps = [(ours - theirs).abs() for ours, theirs in zip(drawn, trained, strict=True)]
    sums = [(ours.sum() - theirs.sum()).abs() for ours, theirs in zip(drawn, trained, strict=True)]
    gap_N = torch.cat(gaps)
    figures = [gap_N.mean(), gap_N.quantile(0.99), gap_N.max(), torch.stack(sums).max()]
    return [f"{len(gap_N):,}", *(f"{figure:.1e}" for figure in figures)]


def sample_noted(task: Task, model: Model) -> tuple[list[Row], list[Tensor]]:
    """The completions of a task's requests, and the log-probability of each of their tokens as it was drawn, (T,).

    Where rows stand from step to step is the sampler's own affair. But every token is drawn by a uniform number that
    no other has, so that the number says whose token it is, and which.
    """
    settings = task.settings
    place_of = {}
    for index, request in enumerate(task.requests):
        uniforms = row_uniforms(settings, request.question, request.sample_index).tolist()
        place_of.update({uniform: (index, position) for position, uniform in enumerate(uniforms)})
    drawn_at: dict[tuple[int, int], float] = {}
    choose = sampler.choose

    def choose_and_note(logits_BV: Tensor, uniform_B: Tensor, settings: SamplingSettings) -> Tensor:
        ids_B = choose(logits_BV, uniform_B, settings)
        drawn_B = token_log_probabilities(logits_BV, ids_B)
        places = [place_of[uniform] for uniform in uniform_B.tolist()]
        drawn_at.update(zip(places, drawn_B.tolist(), strict=True))
        return ids_B

    with patch.object(sampler, "choose", choose_and_note):
        rows = list(sample(model, task.requests, settings, task.eos_id))
    drawn = [
        torch.tensor([drawn_at[row.request_index, position] for position in range(len(row.token_ids))]) for row in rows
    ]
    return rows, drawn


@torch.no_grad()
def trained_log_probabilities(model: Model, rows: Sequence[Row], is_bf16: bool) -> list[Tensor]:
    """The log-probability of each token of the completions as a training step computes it, (T,) for each row."""
    examples = [TokenizedExample(row.request.prompt_ids, tuple(row.token_ids)) for row in rows]
    result = [torch.empty(0)] * len(rows)
    for indices in micro_batches(model.config, [[example] for example in examples], MICRO_BATCH_TOKENS, "cpu"):
        batch = collate(model.config, [examples[i] for i in indices], "cpu")
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False, enabled=is_bf16):
            log_probability_BT = log_probabilities(model, batch)
        for index, log_probability_T, label_T in zip(indices, log_probability_BT, batch.label_BT, strict=True):
            result[index] = log_probability_T[label_T >= 0]
    return result


if __name__ == "__main__":
    main()
