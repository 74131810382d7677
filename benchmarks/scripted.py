"""Models of true shape whose rows write what a script has: sampling's work at real lengths, without trained weights.

`ScriptedModel` puts a great number on one logit a row and step, where the row's script stands, and leaves everything
else to the model: it computes as much as ever. Scripts are the gold rationales of GSM8K's test questions as the model
would be trained to write them, so that lengths and annotations are real; the calculator forces the very ids that stand
there.
"""

import argparse
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from benchmarks.calculator_gsm8k import walk
from minidpost.cli import POSITIVE
from minidpost.data import datasets
from minidpost.data.example import Example
from minidpost.models.hf_config import mapping_for, model_type, read_config
from minidpost.models.hub import WEIGHTS_DIR
from minidpost.models.kvcache import KVCache, T5Cache, indices
from minidpost.models.weights import load_model, load_template
from minidpost.sampling.cuda_graphs import recorded_steps
from minidpost.sampling.sampler import Request, SamplingSettings, sample
from minidpost.selftraining.presets import T5
from minidpost.text.templates import Template, template_for
from minidpost.text.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
# Beside the repository, or within it where it was copied to another machine.
SHARED = REPOSITORY / "shared" if (REPOSITORY / "shared").is_dir() else REPOSITORY.parent / "shared"
BUNDLED = {"tiny-t5": "tiny-t5-dpo-st", "tiny-llama": "tiny-llama"}  # name: directory of weights/
SHAPES = {  # name: config, tokenizer, both in ../shared
    "flan-t5-small": ("flan-t5-small", "t5"),
    "flan-t5-base": ("flan-t5-base", "t5"),
    "flan-t5-large": ("flan-t5-large", "t5"),
    "flan-t5-xl": ("flan-t5-xl", "t5"),
    "smollm2-135m": ("smollm2-135m", "smollm2"),
    "llama-3.2-1b": ("Llama-3.2-1B", "llama3"),
    "llama-3-8b": ("Meta-Llama-3-8B", "llama3"),
}
MODELS = (*BUNDLED, *SHAPES)
TEMPERATURE = T5.temperature  # of samples
SPREAD = 0.25  # how the lengths of a question's samples scatter
LIBRARY = 1000  # rationales they are taken from
CERTAIN = 1e4  # a logit beside which all others are nothing, and whose softmax is still a number

Cache = KVCache | T5Cache
Step = Callable[[Tensor], Tensor]


class ScriptedCache:
    """The model's cache, and where in the scripts each row stands."""

    def __init__(self, cache: Cache, step: Step, n_rows: int, device: torch.device):
        self.cache = cache
        self.step = step  # the model's decode for this cache, plain or recorded
        self.pointer_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.starts: dict[int, Iterator[int]] = {}  # of prefilled rows: where the scripts of the next samples begin

    def clear(self) -> None:
        """Forget all rows."""
        self.cache.clear()
        self.starts.clear()

    @torch.inference_mode()
    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Make each target row a copy of its source row, or the next sample of its prompt."""
        self.cache.copy_rows(source_ids, target_ids)
        source_N = indices(source_ids, self.pointer_B.device)
        self.pointer_B[indices(target_ids, self.pointer_B.device)] = self.pointer_B[source_N]
        for source, target in zip(source_ids, target_ids, strict=True):
            if source in self.starts:
                self.pointer_B[target] = next(self.starts[source])


class ScriptedModel:
    """A model for `sampler.sample` whose tokens are those of the prompt's script.

    On a GPU it takes the model's steps as CUDA graphs itself: its own cannot be recorded, `sample` must not try.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[int, ...]],
        scripts: Sequence[Sequence[int]],
        use_cuda_graphs: bool = True,
    ):
        """Scripts are ids, the end id among them; those of one prompt are for its samples in turn."""
        self.model = model
        self.device = next(model.parameters()).device
        self.use_cuda_graphs = use_cuda_graphs and self.device.type == "cuda"
        self.starts: dict[tuple[int, ...], list[int]] = {}
        ids = []
        for prompt, script in zip(prompts, scripts, strict=True):
            self.starts.setdefault(prompt, []).append(len(ids))
            ids += script
        self.script_N = torch.tensor([*ids, 0], device=self.device)  # a row may be decoded once more after its end

    def parameters(self) -> Iterator[Tensor]:
        """Those of the model."""
        return self.model.parameters()

    def decoding(self) -> AbstractContextManager[None]:
        """The model's."""
        return self.model.decoding()

    def new_cache(self, n_rows: int, max_prompt: int, max_new: int) -> ScriptedCache:
        """The model's, and a pointer a row."""
        step: Step
        if self.use_cuda_graphs:
            step = recorded_steps(self.model, n_rows, max_prompt, max_new)
            cache = step.cache
        else:
            cache = self.model.new_cache(n_rows, max_prompt, max_new)
            step = partial(self.model.decode, cache)
        return ScriptedCache(cache, step, n_rows, self.device)

    @torch.inference_mode()
    def prefill(self, cache: ScriptedCache, row_ids: Sequence[int], prompts: Sequence[tuple[int, ...]]) -> list[int]:
        """The model's; a row that is copied from one of these begins at the first id of a script."""
        for row, prompt in zip(row_ids, prompts, strict=True):
            cache.starts[row] = cycle(self.starts[tuple(prompt)])
        return self.model.prefill(cache.cache, row_ids, prompts)

    @torch.inference_mode()
    def decode(self, cache: ScriptedCache, ids_B: Tensor) -> Tensor:
        """The model's logits_BV, with the scripts' ids certain."""
        logits_BV = cache.step(ids_B)
        pointer_B = cache.pointer_B[: len(ids_B)]
        logits_BV.scatter_(1, self.script_N[pointer_B, None], CERTAIN)
        pointer_B += 1
        return logits_BV


@dataclass(frozen=True)
class Work:
    """Completions to be made: prompts, the script of each (None: what the model will), and the model's template.

    With several samples a question, its prompt stands there as often; they are random, single ones are greedy.
    """

    template: Template
    prompts: list[tuple[int, ...]]
    scripts: list[list[int]] | None
    max_new_tokens: int
    n_samples: int = 1

    def part(self, n_rows: int, max_new_tokens: int | None = None) -> "Work":
        """The first questions, of about so many completions, which are cut at `max_new_tokens`."""
        n_rows = -(-n_rows // self.n_samples) * self.n_samples
        scripts = None if self.scripts is None else self.scripts[:n_rows]
        limit = self.max_new_tokens if max_new_tokens is None else min(max_new_tokens, self.max_new_tokens)
        return replace(self, prompts=self.prompts[:n_rows], scripts=scripts, max_new_tokens=limit)

    @property
    def temperature(self) -> float:
        """0 for single completions, the method's for samples."""
        return TEMPERATURE if self.n_samples > 1 else 0.0


def scripted_work(template: Template, n_questions: int, shared: Path = SHARED, n_samples: int = 1) -> Work:
    """The first questions whose gold rationale the calculator agrees with: GSM8K's test split, toy where it is not.

    A question's further samples say rationales of others, of the gold one's length times a random factor (log-normal).
    """
    path = shared / "data" / "gsm8k" / "test.jsonl"
    prompts: list[tuple[int, ...]] = []
    scripts: list[list[int]] = []
    if path.is_file():
        records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        examples = [Example(record["question"], "", record["answer"]) for record in records]
    else:
        examples = datasets.load("toy", "test")
    for example in examples:
        prompt = tuple(template.prompt_ids(example.question))
        agrees = all(forced == standing for forced, standing in walk(template, example.rationale))
        if agrees and prompt not in prompts:
            prompts.append(prompt)
            scripts.append(template.target_ids(example.rationale))
        if len(prompts) == max(n_questions, LIBRARY if n_samples > 1 else 0):
            break
    if n_samples > 1:
        length_buckets = sorted(scripts, key=len)
        prompts = [prompt for prompt in prompts[:n_questions] for _ in range(n_samples)]
        scripts = [script for gold in scripts[:n_questions] for script in stand_ins(gold, length_buckets, n_samples)]
    return Work(template, prompts, scripts, max(map(len, scripts)), n_samples)


def stand_ins(gold: list[int], length_buckets: list[list[int]], n_samples: int) -> Iterator[list[int]]:
    """A rationale, and others, of those sorted by length, whose lengths scatter around its own."""
    random = Random(len(gold))
    yield gold
    for _ in range(n_samples - 1):
        place = bisect_left(length_buckets, len(gold) * random.lognormvariate(0, SPREAD), key=len)
        yield length_buckets[min(place, len(length_buckets) - 1)]


def natural_work(template: Template, n_questions: int, max_new_tokens: int) -> Work:
    """Toy questions, to which the model writes what it will."""
    examples = [*datasets.load("toy", "test"), *datasets.load("toy", "longer")][:n_questions]
    prompts = [tuple(template.prompt_ids(example.question)) for example in examples]
    return Work(template, prompts, None, max_new_tokens)


def sampled(
    model: nn.Module, work: Work, n_slots: int, has_calculator: bool = True, use_cuda_graphs: bool = True
) -> list[list[int]]:
    """All of our completions, ids in the order of the work."""
    is_scripted = work.scripts is not None
    scripted = ScriptedModel(model, work.prompts, work.scripts, use_cuda_graphs) if is_scripted else model
    requests = []
    for index, prompt in enumerate(work.prompts):
        question, sample_index = divmod(index, work.n_samples)
        requests.append(Request(prompt, str(question), sample_index))
    settings = SamplingSettings(work.temperature, max_new_tokens=work.max_new_tokens, slots=n_slots)
    new_override = work.template.new_calculator if has_calculator else None
    use_cuda_graphs = use_cuda_graphs and not is_scripted  # a scripted model sees to it itself
    eos_id = work.template.eos_id
    rows = sample(scripted, requests, settings, eos_id, new_override=new_override, use_cuda_graphs=use_cuda_graphs)
    in_order = sorted(rows, key=lambda row: row.request_index)
    return [row.token_ids for row in in_order]


def model_names(text: str) -> list[str]:
    """A flag's type: names of models, or directories, with commas between."""
    for name in text.split(","):
        if name not in MODELS and not (Path(name) / "config.json").is_file():
            known = f"a directory with a config.json or one of {', '.join(MODELS)}"
            raise argparse.ArgumentTypeError(f"{known} is expected, found {name!r}")
    return text.split(",")


def row_counts(text: str) -> list[int]:
    """A flag's type: whole numbers above 0 with commas between, in order."""
    return sorted({*map(POSITIVE, text.split(","))})


def weights_directory(name: str) -> Path | None:
    """Where a model's own weights lie; None for the shape of a published model whose weights are not at hand."""
    if name not in SHAPES:
        return WEIGHTS_DIR / BUNDLED[name] if name in BUNDLED else Path(name)
    published = WEIGHTS_DIR / name
    return published if (published / "config.json").is_file() else None


def open_shape(
    name: str, dtype: torch.dtype, device: str, shared: Path = SHARED, seed: int = 0
) -> tuple[nn.Module, Template]:
    """A model in eval mode and how it writes: the weights of `weights_directory`, else a shape's random ones.

    UserError: a broken directory, `shared` without the shape's config or tokenizer.
    """
    directory = weights_directory(name)
    if directory is not None:
        return load_model(directory, dtype, device), load_template(directory)
    config_name, tokenizer_name = SHAPES[name]
    config_dir, tokenizer_dir = shared / "configs" / config_name, shared / "tokenizers" / tokenizer_name
    template = template_for(model_type(config_dir), load_tokenizer(tokenizer_dir))
    config = read_config(config_dir)
    torch.manual_seed(seed)
    with torch.device(device):
        model = mapping_for(config).model(config).initialise()
    return model.to(dtype).eval(), template
