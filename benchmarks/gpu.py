"""What one GPU gives: sampling and training at true shapes, beside transformers, and the parts of the recipe added up.

    python -m benchmarks.gpu --output FILE.md     everything, in under 25 minutes (by estimate 15 to 18 on an H200)
    python -m benchmarks.gpu --output FILE.md --parts sampling --models flan-t5-large --rows 32,256      a part of it
    python -m benchmarks.gpu --scale try --device cpu       a minute on two cores: that the script itself has no faults

Weights are random, at the models' true shapes; lengths, questions and annotations are GSM8K's (see scripted.py). All
weights of sampling are bf16; training has fp32 weights and bf16 autocast. *MBU* is the share of the memory's bandwidth
and *MFU* the share of the multiplications' peak that the numbers of the method need at least: in a decoding step every
weight of the decoder and every cached key and value is read once; a token of training costs 6 operations a parameter.
*As read* counts keys and values as torch's attention reads them, as much of every row as of the longest; our kernel
(decode_attention.py) reads of each row what it has. The first token is that of as many questions as there are rows,
asked at once. Bandwidth and peak are those that a large copy and a large product reached on the same card, not the data
sheet's.

Every measurement is written to gpu.json as soon as it is there, and gpu.md is made of that; a second call, or one after
a call that was ended, measures what is missing, and only on the same machine. A measurement that fails is a line of the
page, and the next one follows. What an earlier version had, gpu-before.json, stands beside it, and gpu-findings.md at
the head of the page.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import RESULTS, machine_line
from benchmarks.scaling import RECIPE_MODEL, Rates, recipe_seconds
from benchmarks.scripted import SHARED, Work, open_shape, sampled, scripted_work
from benchmarks.training import (
    BY_LENGTH,
    TUNED_DPO,
    Where,
    dividing,
    dpo_trainer,
    gold_sequences,
    sft_trainer,
    stand_in_pairs,
)
from minidpost.data import datasets
from minidpost.models import packed_attention
from minidpost.models.hf_config import Model
from minidpost.models.layers import decoding_kernel
from minidpost.models.t5 import T5Config
from minidpost.precision import default_device, prepare_device
from minidpost.sampling.cuda_graphs import recorded_steps, sizes_of
from minidpost.sampling.sampler import cached_tokens, overlaps
from minidpost.selftraining.presets import T5, n_parameters, preset_of
from minidpost.storage import markdown_table, read_json, write_json
from minidpost.text.templates import Template
from minidpost.training.dpo import DPOSettings, reference_log_probabilities, train_dpo
from minidpost.training.optim import read_log
from minidpost.training.sft import SFTSettings, train_sft

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("ceilings", "tests", "attention", "sampling", "training", "rows", "peers", "trainers", "profile")
# Our kernel, torch's memory-efficient one, cuDNN's, two products and a softmax.
WAYS = ("ours", "efficient", "cudnn", "products")
PEER_ROWS = 32  # where transformers is measured beside us
PEER_MICRO_BATCHES = (16, 64)  # examples, or pairs, that the Trainer and TRL compute at once
SAMPLES = 8  # of a question, in sampling
SEED = 0


@dataclass(frozen=True)
class Scale:
    """How much is measured."""

    models: tuple[str, ...]
    rows: tuple[int, ...]
    waves: int  # completions for each row that is decoded at once
    max_new_tokens: int | None
    steps: int  # of a training, after the first ones
    peak_size: int  # rows and columns of the product that the peak is taken from


SCALES = {
    "whole": Scale(
        models=("flan-t5-large", "smollm2-135m", "llama-3.2-1b", "llama-3-8b"),
        rows=(1, 8, 32, 64, 128, 256, 512),
        waves=3,
        max_new_tokens=None,
        steps=8,
        peak_size=8192,
    ),
    "short": Scale(
        models=("flan-t5-large", "smollm2-135m"),
        rows=(32, 256),
        waves=2,
        max_new_tokens=None,
        steps=5,
        peak_size=8192,
    ),
    "try": Scale(models=("tiny-t5", "tiny-llama"), rows=(2, 4), waves=2, max_new_tokens=12, steps=1, peak_size=256),
}
FIRST_STEPS = 3  # of a training, in which libraries are set up; not timed
MICRO_BATCH_TOKENS = {"flan-t5-large": (16384, 32768)}  # of training; of other models the preset's


@dataclass
class Bench:
    """What is asked for, and what has been found: measurement by name."""

    options: argparse.Namespace
    scale: Scale
    found: dict[str, Any]

    def measure(self, name: str, work: Callable[[], Any]) -> None:
        """Note what `work` gives, or the error that it ends with; not if it is known already."""
        if name in self.found and "error" not in self.found[name]:
            return
        started = time.perf_counter()
        try:
            with warnings.catch_warnings():
                # What is slower would be measured in its place.
                warnings.filterwarnings("error", "no CUDA graphs")
                warnings.filterwarnings("error", "no kernel for attention")
                result = work()
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        seconds = time.perf_counter() - started
        print(f"[{seconds:6.1f} s] {name}: {json.dumps(result)[:300]}", file=sys.stderr, flush=True)
        self.found[name] = result
        write_json(self.options.output.with_suffix(".json"), self.found)
        self.write_page()
        free_memory()

    def write_page(self) -> None:
        """Make the page of what is known."""
        output: Path = self.options.output
        before = output.with_name(f"{output.stem}-before.json")
        findings = output.with_name(f"{output.stem}-findings.md")
        text = page(
            self.found,
            read_json(before) if before.is_file() else None,
            findings.read_text(encoding="utf-8") if findings.is_file() else "",
        )
        output.write_text(text, encoding="utf-8")


def main() -> None:
    """Measure what is asked for and is not known yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--models", help="names of shapes with commas between (default: the scale's)")
    parser.add_argument("--rows", help="rows decoded at once, numbers with commas between (default: the scale's)")
    parser.add_argument("--micro-batch-tokens", type=int, help="of training (default: the preset's)")
    parser.add_argument("--scale", choices=SCALES, default="whole", help="how much (default: whole)")
    parser.add_argument("--shared", type=Path, default=SHARED, help="where configs, tokenizers and data lie")
    parser.add_argument("--device", default=default_device(), help="(default: cuda if any)")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.md", help="(default: benchmarks/results/gpu.md)")
    options = parser.parse_args()
    scale = SCALES[options.scale]
    if options.models:
        scale = replace(scale, models=tuple(options.models.split(",")))
    if options.rows:
        scale = replace(scale, rows=tuple(map(int, options.rows.split(","))))
    options.parts = [part for part in options.parts.split(",") if part]
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"--parts {min(unknown)}: one of {', '.join(PARTS)} is expected")

    prepare_device(options.device)
    data = options.output.with_suffix(".json")
    here = machine(options.device)
    bench = Bench(options, scale, read_json(data) if data.is_file() else {"machine": here})
    if bench.found["machine"] != here:
        there = ", ".join(bench.found["machine"].values())
        sys.exit(f"{data} is of {there}; this is {', '.join(here.values())}: choose another --output")
    if len(bench.found) > 1:
        print(f"{len(bench.found) - 1} measurements of {data} stay; another --output begins anew", file=sys.stderr)
    for part in options.parts:
        measurements = {
            "ceilings": ceilings,
            "tests": gpu_tests,
            "attention": attentions,
            "sampling": sampling,
            "training": training,
            "rows": training_in_rows,
            "peers": peers,
            "trainers": trainers,
            "profile": profiles,
        }[part]
        measurements(bench)
    bench.write_page()
    print(options.output.read_text(encoding="utf-8"))


def machine(device: str) -> dict[str, str]:
    """Where this runs."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "no GPU"
    return {"gpu": name, "line": machine_line()}


def wait(device: str) -> None:
    """Until the device has done all that it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> None:
    """Give back what no tensor needs any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: str) -> float:
    """The most memory that tensors have had since `free_memory`, in GB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.device(device).type == "cuda" else 0.0


def seconds_of(work: Callable[[], object], device: str, n_times: int) -> float:
    """The median of the seconds that `work` takes on the device, after one time that does not count."""
    seconds = []
    for _ in range(n_times + 1):
        wait(device)
        started = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


# -- what the card can do ---------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """The bandwidth of a large copy (read and written), and the speed of a large bf16 product."""
    device, size = bench.options.device, bench.scale.peak_size

    def bandwidth() -> dict[str, float]:
        source = torch.empty(2**29 if size > 1000 else 2**20, dtype=torch.bfloat16, device=device).normal_()
        target = torch.empty_like(source)
        seconds = seconds_of(lambda: target.copy_(source), device, 10)
        return {"gb_s": 2 * source.numel() * source.itemsize / seconds / 1e9}

    def product() -> dict[str, float]:
        left = torch.randn(size, size, dtype=torch.bfloat16, device=device)
        right = torch.randn(size, size, dtype=torch.bfloat16, device=device)
        return {"tflop_s": 2 * size**3 / seconds_of(lambda: left @ right, device, 10) / 1e12}

    bench.measure("ceilings/bandwidth", bandwidth)
    bench.measure("ceilings/product", product)


def gpu_tests(bench: Bench) -> None:
    """The tests that need a GPU; pytest's closing line."""

    def run() -> dict[str, str]:
        tests = str(ROOT / "tests" / "test_gpu.py")
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", tests]
        output = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False).stdout
        if "failed" in output.splitlines()[-1] or "error" in output.splitlines()[-1]:
            print(output[-6000:], file=sys.stderr)
        return {"closing line": output.splitlines()[-1].strip("= ")}

    bench.measure("tests", run)


# -- attention of decoding steps -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionShape:
    """Rows whose queries share keys and values: heads, queries each, positions that are read and that there are."""

    heads: int
    queries: int
    read: int
    room: int
    width: int = 64  # of a head
    rows_a_prompt: int = 1
    bias_heads: int = 1


ATTENTION_SHAPES = {
    "smollm2-135m": AttentionShape(heads=3, queries=3, read=256, room=556),
    "llama-3-8b": AttentionShape(heads=8, queries=4, read=256, room=556, width=128),
    "flan-t5-large, own tokens": AttentionShape(heads=16, queries=1, read=128, room=304, bias_heads=16),
    "flan-t5-large, prompts": AttentionShape(heads=16, queries=8, read=128, room=200, rows_a_prompt=8),
}


def attentions(bench: Bench) -> None:
    """Ways to compute one layer's attention in a decoding step, as CUDA graphs; microseconds."""
    for name, shape in ATTENTION_SHAPES.items():
        for rows in bench.scale.rows:
            if rows >= shape.rows_a_prompt:
                bench.measure(f"attention/{name}/{rows}", lambda s=shape, r=rows: attention_times(s, r, bench))


@torch.inference_mode()
def attention_times(shape: AttentionShape, rows: int, bench: Bench) -> dict[str, Any]:
    """Microseconds of each way, the median of 20 replays of 20 layers; and how far its result is from fp32's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = bench.options.device
    dtype = weights_dtype(bench)
    n = rows // shape.rows_a_prompt
    n_layers = 20  # so that keys and values come from memory, not from the cache
    scale = shape.width**-0.5
    q = torch.randn(n, shape.heads, shape.queries, shape.width, device=device, dtype=dtype)
    k, v = torch.randn(2, n_layers, n, shape.heads, shape.room, shape.width, device=device, dtype=dtype)
    length_B = torch.randint(shape.read // 2, shape.read, (n,), device=device)
    bias = torch.zeros(n, shape.bias_heads, 1, shape.read, device=device, dtype=dtype)
    bias.masked_fill_(torch.arange(shape.read, device=device) >= length_B[:, None, None, None], -torch.inf)

    def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)

    def products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        weight = torch.matmul(q * scale, k.mT).add_(bias).softmax(-1)
        return torch.matmul(weight, v)

    expected = products(q.float(), k[0, :, :, : shape.read].float(), v[0, :, :, : shape.read].float(), bias.float())
    ways: dict[str, Any] = {"products": (products, None)}
    found: dict[str, Any] = {}
    if torch.device(device).type == "cuda":
        try:
            kernel = decoding_kernel(q.device, dtype, shape.width)
            assert kernel is not None
            ways["ours"] = (lambda q, k, v, bias: kernel(q, k, v, bias, length_B, scale), None)
        except UserWarning as warning:  # that it does not run
            found["ours"] = str(warning)[:80]
        ways |= {
            "efficient": (fused, SDPBackend.EFFICIENT_ATTENTION),
            "cudnn": (fused, SDPBackend.CUDNN_ATTENTION),
        }
    for way, (attend, backend) in ways.items():

        def layers(attend: Any = attend) -> torch.Tensor:
            for layer in range(n_layers):
                y = attend(q, k[layer, :, :, : shape.read], v[layer, :, :, : shape.read], bias)
            return y

        try:
            torch.backends.cuda.enable_cudnn_sdp(way == "cudnn")
            chosen = sdpa_kernel(backend) if backend else nullcontext()
            with chosen:
                run = recorded(layers) if torch.device(device).type == "cuda" else layers
                seconds = seconds_of(run, device, 20)
                y = attend(q, k[0, :, :, : shape.read], v[0, :, :, : shape.read], bias)
            found[way] = round(1e6 * seconds / n_layers, 2)
            found[f"{way}, error"] = float((y.float() - expected).norm() / expected.norm())
        except RuntimeError as error:
            found[way] = str(error).splitlines()[0][:80]
        finally:
            torch.backends.cuda.enable_cudnn_sdp(False)
    bytes_a_position = 2 * shape.heads * shape.width * k.itemsize
    found["bytes"] = n * shape.read * bytes_a_position
    found["ours, bytes"] = int(length_B.sum()) * bytes_a_position  # no position after a row's own
    return found


def recorded(work: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """The work as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


# -- sampling ---------------------------------------------------------------------------------------------------------


def work_for(template: Template, rows: int, bench: Bench) -> Work:
    """Eight samples of each of so many questions that every row is refilled; one question alone for one row."""
    n_samples = min(SAMPLES, rows)
    n_questions = -(-bench.scale.waves * rows // n_samples) if rows > 1 else 2
    work = scripted_work(template, n_questions, bench.options.shared, n_samples=n_samples)
    return work.part(len(work.prompts), bench.scale.max_new_tokens)


def shortened(work: Work) -> Work:
    """Scripts that end where completions are cut, so that they can be compared."""
    assert work.scripts is not None
    return replace(work, scripts=[script[: work.max_new_tokens] for script in work.scripts])


@dataclass
class Subject:
    """A model that is sampled from, opened when it is first needed, and the work for each number of rows."""

    name: str
    bench: Bench
    works: dict[int, Work] = field(default_factory=dict)

    @cached_property
    def opened(self) -> tuple[nn.Module, Template]:
        """The model with its sampling weights, and how it writes."""
        options = self.bench.options
        return open_shape(self.name, weights_dtype(self.bench), options.device, options.shared)

    def work(self, rows: int) -> Work:
        """What so many rows are given to do."""
        if rows not in self.works:
            self.works[rows] = work_for(self.opened[1], rows, self.bench)
        return self.works[rows]


def sampling(bench: Bench) -> None:
    """Tokens a second with the calculator, for every model and number of rows; and the device's part of a step."""
    for name in bench.scale.models:
        subject = Subject(name, bench)
        for rows in bench.scale.rows:
            bench.measure(f"sampling/{name}/{rows}", lambda rows=rows, subject=subject: sampling_at(rows, subject))
            bench.measure(f"step/{name}/{rows}", lambda rows=rows, subject=subject: device_step(rows, subject))
        del subject
        free_memory()


def weights_dtype(bench: Bench) -> torch.dtype:
    """bf16 on a GPU."""
    return torch.bfloat16 if torch.device(bench.options.device).type == "cuda" else torch.float32


def sampling_at(rows: int, subject: Subject) -> dict[str, float]:
    """One number of rows: the whole, with and without the calculator, and the first token."""
    device = subject.bench.options.device
    model, _ = subject.opened
    work = subject.work(rows)
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # opening the model took fp32 weights
    sampled(model, work.part(rows, 4), rows)  # sets libraries up
    wait(device)
    started = time.perf_counter()
    completions = sampled(model, work, rows)
    wait(device)
    seconds = time.perf_counter() - started
    if completions != shortened(work).scripts:
        raise RuntimeError("a completion is not its script")
    result = {"first_seconds": seconds}  # in which steps were recorded
    started = time.perf_counter()
    sampled(model, work, rows)
    wait(device)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    sampled(model, work, rows, has_calculator=False)
    wait(device)
    seconds_without = time.perf_counter() - started
    first = shortened(work.part(rows, 1))
    first_seconds = seconds_of(lambda: sampled(model, first, rows), device, 3)
    n_tokens = sum(map(len, completions))
    return result | {
        "completions": len(completions),
        "tokens": n_tokens,
        "seconds": seconds,
        "tokens_s": n_tokens / seconds,
        "tokens_s_without_calculator": n_tokens / seconds_without,
        "first_token_ms": 1000 * first_seconds,
        "peak_gb": peak_gb(device),
    }


@torch.inference_mode()
def device_step(rows: int, subject: Subject) -> dict[str, float]:
    """The seconds of one decoding step on the device, the bytes that it needs, and those that it reads.

    Rows are as in the midst of a sampling: those of one question continue one prompt, and each has written another part
    of its completion.
    """
    device = subject.bench.options.device
    model: Any = subject.opened[0]
    work = subject.work(rows)
    assert work.scripts is not None
    prompts = work.prompts[: rows : work.n_samples]
    max_prompt = max(map(len, work.prompts))
    max_new = cached_tokens(work.max_new_tokens, overlaps(device))
    steps = None
    if is_recorded(device):
        steps = recorded_steps(model, rows + len(prompts), max_prompt, max_new)  # sampling's, if that was just measured
        cache = steps.cache
        cache.clear()
    else:
        cache = model.new_cache(rows + len(prompts), max_prompt, max_new)

    # 1) Each prompt is prefilled once, for all its rows.
    model.prefill(cache, range(rows, rows + len(prompts)), prompts)
    for row in range(rows):
        cache.copy_rows([rows + row // work.n_samples], [row])
    # 2) The rows stand here and there in their completions.
    own = cache.own if isinstance(model.config, T5Config) else cache
    written = [37 * row % min(len(script), work.max_new_tokens) for row, script in enumerate(work.scripts[:rows])]
    own.set_lengths(range(rows), (own.lengths[:rows] + written).tolist())
    # 3) The same step again and again.
    ids_B = torch.full((rows,), 5, device=device)
    plan = cache.plan(rows)
    if steps is not None:
        plan = steps.padding.pad(plan)
    n_bytes = step_bytes(model, cache, plan, rows)
    if steps is not None:
        steps(ids_B)  # records it, if a step of these sizes has not been recorded yet
        run = steps.recorded[sizes_of(plan)].replay
    else:
        run = partial(model.step, cache, plan, ids_B)
    return {"step_ms": 1000 * seconds_of(run, device, 20)} | n_bytes


def is_recorded(device: str) -> bool:
    """Whether steps are CUDA graphs."""
    return torch.device(device).type == "cuda"


def step_bytes(model: Any, cache: Any, plan: Any, rows: int) -> dict[str, float]:
    """GB that a step must read at least, and those that it reads by its plan: weights, keys and values.

    T5's encoder has done its work, and so have the matrices that make keys and values of prompts. A prompt that several
    rows continue is read once for all of them.
    """
    is_t5 = isinstance(model.config, T5Config)
    stack = model.stacks[1]
    n_weights = n_parameters(stack) + model.config.vocab_size * model.config.d_model
    own = cache.own if is_t5 else cache
    n_layers, _, n_heads, _, d_head = own.keys_LBGSK.shape
    n_rows, n_read, *of_prompts = sizes_of(plan)
    needed = int(own.lengths[:rows].sum()) + rows  # the new token's too
    read = n_rows * n_read
    if is_t5:
        crossing = [layer.cross_attention for layer in stack.layers]
        n_weights -= sum(n_parameters(attention.key) + n_parameters(attention.value) for attention in crossing)
        slots = np.unique(cache.prompt.prompt_slot_of_row_B[:rows])
        needed += int(cache.prompt.store.lengths[slots].sum())
        n_prompts, _, n_read_of_prompts = of_prompts
        read += n_prompts * n_read_of_prompts

    def gigabytes(n_positions: int) -> float:
        n_numbers = n_weights + 2 * n_layers * n_heads * d_head * n_positions
        return next(model.parameters()).itemsize * n_numbers / 1e9

    return {"step_gb": gigabytes(needed), "read_gb": gigabytes(read)}


# -- training ---------------------------------------------------------------------------------------------------------


def training(bench: Bench) -> None:
    """Tokens a second of SFT and DPO with the model's own preset, or micro-batches of other sizes."""
    for of, name, tokens in trained_models(bench):
        bench.measure(f"sft/{of}", lambda name=name, tokens=tokens: sft_of(name, bench, tokens))
        bench.measure(f"dpo/{of}", lambda name=name, tokens=tokens: dpo_of(name, bench, tokens))


def trained_models(bench: Bench) -> Iterator[tuple[str, str, int | None]]:
    """What each measurement of training is called, its model, and the size of its micro-batches."""
    asked_for = bench.options.micro_batch_tokens
    for name in names_of_trained(bench):
        for tokens in (asked_for,) if asked_for else MICRO_BATCH_TOKENS.get(name, (None,)):
            yield f"{name}/{tokens}" if tokens else name, name, tokens


def names_of_trained(bench: Bench) -> list[str]:
    """The models of which 16 bytes a parameter fit on one card."""
    return [name for name in bench.scale.models if name != "llama-3-8b"]


def training_in_rows(bench: Bench) -> None:
    """SFT as without the kernels of packed attention: torch's attention, in padded rows."""
    kernel_for = packed_attention.kernel_for
    packed_attention.kernel_for = lambda device, dtype, width: None  # type: ignore[assignment]
    try:
        for of, name, tokens in trained_models(bench):
            bench.measure(f"rows/{of}", lambda name=name, tokens=tokens: sft_of(name, bench, tokens))
    finally:
        packed_attention.kernel_for = kernel_for


def trained_on(name: str, bench: Bench, micro_batch_tokens: int | None) -> tuple[Model, Any, list[Any], list[Any]]:
    """A model with fp32 weights, its preset, examples and pairs."""
    model, template = open_shape(name, torch.float32, bench.options.device, bench.options.shared)
    preset = preset_of(model.config, "dpo-st")
    if micro_batch_tokens:
        preset = replace(preset, micro_batch_tokens=micro_batch_tokens)
    data = "gsm8k" if (bench.options.shared / "data" / "gsm8k" / "train.jsonl").is_file() else "toy"
    labelled = datasets.load(data, "train", bench.options.shared / "data")[:2000]
    gold = list(gold_sequences(labelled, template, preset).values())
    return model, preset, gold, stand_in_pairs(gold[:500], preset)


def sft_work(name: str, bench: Bench, micro_batch_tokens: int | None) -> tuple[Model, list[Any], SFTSettings]:
    """A model, and the examples and settings of a few optimizer steps of SFT."""
    model, preset, gold, _ = trained_on(name, bench, micro_batch_tokens)
    settings = replace(preset.sft(SEED), epochs=1)
    return model, gold[: (FIRST_STEPS + bench.scale.steps) * settings.examples_per_step], settings


def dpo_work(name: str, bench: Bench, micro_batch_tokens: int | None) -> tuple[Model, list[Any], DPOSettings]:
    """A model, and the pairs and settings of a few optimizer steps of DPO."""
    model, preset, _, pairs = trained_on(name, bench, micro_batch_tokens)
    n_steps = FIRST_STEPS + bench.scale.steps
    settings = replace(preset.dpo(len(pairs), SEED), steps=n_steps)
    return model, pairs[: n_steps * settings.pairs_per_step], settings


def sft_of(name: str, bench: Bench, micro_batch_tokens: int | None) -> dict[str, float]:
    """A few optimizer steps of SFT."""
    model, examples, settings = sft_work(name, bench, micro_batch_tokens)
    with TemporaryDirectory() as scratch:
        log = Path(scratch) / "log.jsonl"
        train_sft(model, examples, settings, log_path=log)
        return speed_of(model, log, bench.options.device)


def dpo_of(name: str, bench: Bench, micro_batch_tokens: int | None) -> dict[str, float]:
    """A few optimizer steps of DPO, and the reference's log-probabilities before."""
    model, pairs, settings = dpo_work(name, bench, micro_batch_tokens)
    device = bench.options.device
    with TemporaryDirectory() as scratch:
        log = Path(scratch) / "log.jsonl"
        reference_log_probabilities(model, pairs[:32], micro_batch_tokens=settings.micro_batch_tokens)
        wait(device)
        started = time.perf_counter()
        reference_P2 = reference_log_probabilities(model, pairs, micro_batch_tokens=settings.micro_batch_tokens)
        wait(device)
        seconds = time.perf_counter() - started
        n_tokens = sum(sequence.n_tokens for pair in pairs for sequence in pair.sequences)
        train_dpo(model, pairs, reference_P2, settings, log_path=log)
        speed = speed_of(model, log, device) | {"reference_tokens_s": n_tokens / seconds}
        if isinstance(model.config, T5Config):
            del speed["flops_a_token"]  # a prompt's tokens count in each sequence, and are encoded once
        return speed


def speed_of(model: Model, log: Path, device: str) -> dict[str, float]:
    """Out of a training's log, without its first steps."""
    steps = list(read_log(log))[FIRST_STEPS:]
    seconds = [step["n_tokens"] / step["tokens_per_second"] for step in steps]
    return {
        "tokens_s": sum(step["n_tokens"] for step in steps) / sum(seconds),
        "step_ms": 1000 * median(seconds),
        "tokens_a_step": median(step["n_tokens"] for step in steps),
        "flops_a_token": 6 * parameters_a_token(model),
        "loss": steps[-1]["loss"],
        "peak_gb": peak_gb(device),
    }


def parameters_a_token(model: Model) -> float:
    """The parameters that a token is multiplied with, on average over source and target tokens.

    Of T5 a source token passes the encoder and a target token the decoder, each about half of the whole; the output
    matrix counts for target tokens. Of GSM8K's tokens about half are targets.
    """
    source, target = (n_parameters(stack) for stack in model.stacks)
    head = model.config.vocab_size * model.config.d_model
    return (source + target + head) / 2


# -- peers ------------------------------------------------------------------------------------------------------------


def peers(bench: Bench) -> None:
    """transformers' generate with a calculator in its loop, at one number of rows, by length of the question."""
    for name in bench.scale.models:
        bench.measure(f"peer/{name}/{PEER_ROWS}", lambda name=name: peer_sampling(name, bench))


def peer_sampling(name: str, bench: Bench) -> dict[str, float]:
    """transformers' tokens a second at the same work, in the same precision."""
    from benchmarks.peers import generate, twin

    device = bench.options.device
    model, template = open_shape(name, weights_dtype(bench), device, bench.options.shared)
    work = work_for(template, PEER_ROWS, bench)
    peer = twin(model)
    generate(peer, work.part(PEER_ROWS, 4), PEER_ROWS)
    wait(device)
    started = time.perf_counter()
    completions = generate(peer, work, PEER_ROWS)
    wait(device)
    seconds = time.perf_counter() - started
    n_tokens = sum(map(len, completions))
    return {"tokens": n_tokens, "seconds": seconds, "tokens_s": n_tokens / seconds}


def trainers(bench: Bench) -> None:
    """transformers' Trainer and TRL's DPOTrainer at our steps, in micro-batches of several sizes, by length.

    The Trainer needs accelerate, TRL more: benchmarks.training says how to install both.
    """
    for name in names_of_trained(bench):
        for size in PEER_MICRO_BATCHES:
            bench.measure(f"trainer-sft/{name}/{size}", lambda name=name, size=size: trainer_sft(name, bench, size))
            bench.measure(f"trainer-dpo/{name}/{size}", lambda name=name, size=size: trainer_dpo(name, bench, size))


def trainer_sft(name: str, bench: Bench, micro_batch: int) -> dict[str, float]:
    """The optimizer steps of `sft_of` by the Trainer."""
    from benchmarks.peers import twin

    model, examples, settings = sft_work(name, bench, None)
    size = dividing(settings.examples_per_step, micro_batch)
    with TemporaryDirectory() as scratch:
        where = Where(Path(scratch), bench.options.device)
        return speed_of_trainer(sft_trainer(twin(model), examples, settings, size, where, **BY_LENGTH))


def trainer_dpo(name: str, bench: Bench, micro_batch: int) -> dict[str, float]:
    """The optimizer steps of `dpo_of` by TRL, which computes the reference before."""
    from benchmarks.peers import twin

    model, pairs, settings = dpo_work(name, bench, None)
    size = dividing(settings.pairs_per_step, micro_batch)
    model.config = replace(model.config, dropout=0.0)  # TRL leaves T5's attention dropout on
    with TemporaryDirectory() as scratch:
        where = Where(Path(scratch), bench.options.device)
        return speed_of_trainer(dpo_trainer(twin(model), pairs, settings, size, where, **TUNED_DPO))


def speed_of_trainer(trainer: Any) -> dict[str, float]:
    """Let it train; tokens a second without its first steps."""
    from transformers import TrainerCallback

    n_tokens: list[int] = []  # of each micro-batch
    ended: list[float] = []  # when each optimizer step had ended
    collate = trainer.data_collator

    def counted(rows: list[dict[str, Any]]) -> Any:
        n_tokens.append(sum(map(tokens_of_row, rows)))
        return collate(rows)

    class Clock(TrainerCallback):
        def on_step_end(self, arguments: Any, *_: object, **__: object) -> None:
            wait(str(arguments.device))
            ended.append(time.perf_counter())

    trainer.add_callback(Clock())
    trainer.get_train_dataloader()  # in DPO the reference's log-probabilities are computed here, once
    trainer.data_collator = counted
    trainer.train()
    per_step = trainer.args.gradient_accumulation_steps
    tokens_a_step = [sum(n_tokens[first : first + per_step]) for first in range(0, len(ended) * per_step, per_step)]
    seconds = ended[-1] - ended[FIRST_STEPS - 1]
    return {
        "tokens_s": sum(tokens_a_step[FIRST_STEPS:]) / seconds,
        "step_ms": 1000 * median(later - earlier for earlier, later in pairwise(ended[FIRST_STEPS - 1 :])),
        "tokens_a_step": median(tokens_a_step[FIRST_STEPS:]),
        "peak_gb": peak_gb(str(trainer.args.device)),
    }


def tokens_of_row(row: dict[str, Any]) -> int:
    """The tokens of a row of `sft_trainer` or `dpo_trainer`."""
    if "length" in row:  # a pair's
        return int(row["length"])
    is_one_row = row["labels"][0] == -100  # prompt and target, of a decoder-only model
    return len(row["input_ids"]) + (0 if is_one_row else len(row["labels"]))


# -- where the time goes ----------------------------------------------------------------------------------------------


def profiles(bench: Bench) -> None:
    """Tables of torch's profiler, of sampling and of SFT; to gpu-profile.txt."""
    path = bench.options.output.with_name("gpu-profile.txt")
    path.write_text("", encoding="utf-8")
    for name in bench.scale.models[:2]:
        bench.measure(f"profile/{name}", lambda name=name: profile_of(name, bench, path))


def profile_of(name: str, bench: Bench, path: Path) -> dict[str, float]:
    """The operations that take most of the time, in decoding steps and in steps of SFT."""
    from torch.profiler import ProfilerActivity, profile

    device = bench.options.device
    activities = [ProfilerActivity.CPU]
    if torch.device(device).type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    model, template = open_shape(name, weights_dtype(bench), device, bench.options.shared)
    rows = bench.scale.rows[-1]
    work = work_for(template, rows, bench)
    work = work.part(rows, 12)
    sampled(model, work, rows)

    def sft_steps() -> None:
        trained, preset, gold, _ = trained_on(name, bench, bench.options.micro_batch_tokens)
        settings = replace(preset.sft(SEED), epochs=1)
        train_sft(trained, gold[: 2 * settings.examples_per_step], settings)

    for title, run in (
        (f"{name}: decoding steps, {rows} rows", lambda: sampled(model, work, rows)),
        (f"{name}: two steps of SFT", sft_steps),
    ):
        with profile(activities=activities) as profiler:
            run()
            wait(device)
        averages = profiler.key_averages()
        with open(path, "a", encoding="utf-8") as stream:
            for key in ("self_device_time_total", "self_cpu_time_total"):
                table = averages.table(sort_by=key, row_limit=22, max_name_column_width=60)
                stream.write(f"\n# {title}, by {key}\n{table}\n")
    return {"rows": rows}


# -- the page ---------------------------------------------------------------------------------------------------------


def page(found: dict[str, Any], before: dict[str, Any] | None = None, findings: str = "") -> str:
    """What has been measured, as Markdown; beside it what an earlier version had, and what was learned."""
    before = before or {}
    lines = ["# One GPU", "", f"`python -m benchmarks.gpu` · {found['machine']['gpu']}, {found['machine']['line']}", ""]
    lines += [*(__doc__ or "").split("\n\n")[2:3], ""]
    lines += [findings.strip(), ""] if findings else []
    bandwidth = found.get("ceilings/bandwidth", {}).get("gb_s")
    peak = found.get("ceilings/product", {}).get("tflop_s")
    if bandwidth and peak:
        lines += [f"A large copy: {bandwidth:,.0f} GB/s. A large bf16 product: {peak:,.0f} TFLOP/s.", ""]
    if "tests" in found:
        lines += [f"`pytest -m gpu`: {found['tests'].get('closing line', found['tests'])}.", ""]
    tables = (
        (
            [
                *("sampling", "rows", "tokens/s", "before", "calculator off", "first token, ms"),
                *("the device's part of a step, ms", "rows / that, tokens/s", "MBU", "as read", "GB"),
                "transformers, tokens/s",
            ],
            sampling_lines(found, before, bandwidth),
        ),
        (
            [
                *("training", "tokens/s", "before", "in padded rows", "step, ms", "tokens a step", "MFU", "GB"),
                *("reference pass, tokens/s", "Trainer or TRL, tokens/s"),
            ],
            training_lines(found, before, peak),
        ),
        (["attention of a step, one layer, µs", "rows", "GB/s, the fastest", *WAYS], attention_lines(found)),
    )
    for heads, rows in tables:
        cells = [*rows]
        if cells:
            lines += [markdown_table(heads, cells), ""]
    lines += recipe(found)
    errors = [f"- {name}: {value['error']}" for name, value in found.items() if "error" in value]
    if errors:
        lines += ["Failed:", "", *errors, ""]
    return "\n".join(lines)


def recipe(found: dict[str, Any]) -> list[str]:
    """The time of the paper's recipe by the fastest of what was measured; nothing where a part is missing."""

    def fastest(part: str) -> str | None:
        names = [name for name in found if name.startswith(f"{part}/{RECIPE_MODEL}/") and "tokens_s" in found[name]]
        return max(names, key=lambda name: found[name]["tokens_s"], default=None)

    names = [name for name in map(fastest, ("sampling", "sft", "dpo")) if name is not None]
    if len(names) < 3:
        return []
    rates = [found[name]["tokens_s"] for name in names]
    stages = recipe_seconds(Rates(*rates, reference=found[names[2]]["reference_tokens_s"]), T5)
    explained = " ".join((recipe_seconds.__doc__ or "").split())
    return [
        f"{explained} These are the times of {RECIPE_MODEL} by {', '.join(names)}; saving, starting and the recording "
        "of steps are left out.",
        "",
        markdown_table(["stage", "minutes"], [[stage, f"{seconds / 60:.1f}"] for stage, seconds in stages.items()]),
        "",
    ]


def sampling_lines(found: dict[str, Any], before: dict[str, Any], bandwidth: float | None) -> Iterator[list[str]]:
    """A line for each model and number of rows."""
    for name, value in found.items():
        if not name.startswith("sampling/") or "error" in value:
            continue
        _, model, rows = name.split("/")
        peer = found.get(f"peer/{model}/{rows}", {}).get("tokens_s")
        step = found.get(f"step/{model}/{rows}", {})
        milliseconds = step.get("step_ms")
        shares = [
            f"{1000 * step[name] / milliseconds / bandwidth:.0%}" if bandwidth and name in step else "–"
            for name in ("step_gb", "read_gb")
        ]
        yield [
            model,
            rows,
            f"{value['tokens_s']:,.0f}",
            rate(before.get(name)),
            f"{value['tokens_s_without_calculator']:,.0f}",
            f"{value['first_token_ms']:,.0f}" if "first_token_ms" in value else "–",
            f"{milliseconds:.2f}" if milliseconds else "–",
            f"{1000 * int(rows) / milliseconds:,.0f}" if milliseconds else "–",
            *shares,
            f"{value['peak_gb']:.1f}",
            f"{peer:,.0f} ({value['tokens_s'] / peer:.1f}×)" if peer else "–",
        ]


def rate(value: dict[str, Any] | None) -> str:
    """Tokens a second, where they are known."""
    return f"{rate_of(value):,.0f}" if rate_of(value) else "–"


def rate_of(value: dict[str, Any] | None) -> float:
    """Tokens a second; 0 where they are not known."""
    return (value or {}).get("tokens_s", 0.0)


def training_lines(found: dict[str, Any], before: dict[str, Any], peak: float | None) -> Iterator[list[str]]:
    """A line for each training."""
    for name, value in found.items():
        if not name.startswith(("sft/", "dpo/")) or "error" in value:
            continue
        kind, model = name.split("/")[:2]
        peer = max((rate_of(found[of]) for of in found if of.startswith(f"trainer-{kind}/{model}/")), default=0.0)
        reference = value.get("reference_tokens_s")
        flops = value.get("flops_a_token")
        yield [
            name.replace("/", ", "),
            f"{value['tokens_s']:,.0f}",
            rate(before.get(name, before.get(f"{kind}/{model}"))),
            rate(found.get(name.replace("sft/", "rows/"))) if name.startswith("sft/") else "–",
            f"{value['step_ms']:.0f}",
            f"{value['tokens_a_step']:,.0f}",
            f"{value['tokens_s'] * flops / peak / 1e12:.0%}" if peak and flops else "–",
            f"{value['peak_gb']:.1f}",
            f"{reference:,.0f}" if reference else "–",
            f"{peer:,.0f} ({value['tokens_s'] / peer:.1f}×)" if peer else "–",
        ]


def attention_lines(found: dict[str, Any]) -> Iterator[list[str]]:
    """A line for each shape and number of rows."""
    for name, value in found.items():
        if not name.startswith("attention/") or "error" in value:
            continue
        _, shape, rows = name.split("/")
        times = {way: value[way] for way in WAYS if isinstance(value.get(way), float)}
        fastest = min(times, key=lambda way: times[way])
        n_bytes = value["ours, bytes" if fastest == "ours" else "bytes"]
        cells = [f"{times[way]:.0f}" if way in times else "–" for way in WAYS]
        yield [shape, rows, f"{n_bytes / times[fastest] / 1000:,.0f}", *cells]


if __name__ == "__main__":
    main()
