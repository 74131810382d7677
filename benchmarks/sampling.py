"""Sampling with the calculator: ours against transformers' `generate` with a logits processor that does the same job.

Same weights, same questions, greedy, calculator on; 64 slots here, batches of 64 there, once of the questions as they
come and once sorted by length, which is kind to it. The processor is a reasonable one: it keeps an automaton a row
(ours), looks at the last token only and touches only the rows that are being forced. The completions of both sides are
compared before anything is timed.
"""

import argparse
import os
import platform
import sys
import time
from collections import deque
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost import datasets  # noqa: E402
from minidpost.commands import open_model  # noqa: E402
from minidpost.formats import Format  # noqa: E402
from minidpost.report import markdown  # noqa: E402
from minidpost.sampler import Request, Sampling, sample  # noqa: E402

transformers.logging.set_verbosity_error()


class CalculatorProcessor(transformers.LogitsProcessor):
    """Forces the calculator's results in a batch: state kept a row, one transfer of the last tokens a step."""

    def __init__(self, text_format: Format, n_rows: int):
        self.automata = [text_format.calculator() for _ in range(n_rows)]
        self.pending: list[deque[int]] = [deque() for _ in range(n_rows)]
        self.started = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.started:
            for row, token_id in enumerate(input_ids[:, -1].tolist()):
                self.pending[row].extend(self.automata[row].push(token_id))
        self.started = True
        for row, ids in enumerate(self.pending):
            if ids:
                forced = ids.popleft()
                scores[row] = -torch.inf
                scores[row, forced] = 0.0
        return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", help="a fine-tuned model (default: the newest under runs/)")
    parser.add_argument("--questions", type=int, default=512)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=5, help="timed rounds; the medians count")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sampling.md")
    options = parser.parse_args()

    directory, model, text_format = open_model(options.checkpoint, "cpu")
    peer = transformers.T5ForConditionalGeneration.from_pretrained(directory).eval()
    examples = [*datasets.load("toy", "test"), *datasets.load("toy", "longer")][: options.questions]
    prompts = [tuple(text_format.prompt_ids(example.question)) for example in examples]

    def ours() -> list[list[int]]:
        settings = Sampling(max_new_tokens=options.max_new_tokens, slots=options.rows)
        requests = [Request(prompt, str(number)) for number, prompt in enumerate(prompts)]
        done = dict(sample(model, requests, settings, text_format.end_id, text_format.calculator))
        return [done[number].token_ids for number in range(len(prompts))]

    def theirs(is_sorted: bool) -> list[list[int]]:
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]) if is_sorted else number)
        return generate_with_transformers(peer, text_format, prompts, order, options.rows, options.max_new_tokens)

    a, b = ours(), theirs(True)
    same = sum(x == y for x, y in zip(a, b, strict=True))
    n_tokens = sum(map(len, a))
    ways = {"ours": ours, "transformers, as they come": partial(theirs, False)}
    ways["transformers, sorted by length"] = partial(theirs, True)
    rounds = [{name: timed(way) for name, way in ways.items()} for _ in range(options.pairs)]
    rows = []
    for name in ways:
        seconds = median(times[name] for times in rounds)
        ratio = median(times[name] / times["ours"] for times in rounds)
        rows.append([name, f"{seconds:.2f}", f"{n_tokens / seconds:,.0f}", f"{ratio:.1f}×"])
    command = "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    text = "\n".join(
        [
            "# Sampling with the calculator against transformers",
            "",
            f"`{command}` · {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__} "
            f"({torch.get_num_threads()} threads), transformers {transformers.__version__}, fp32",
            "",
            f"{len(prompts)} questions, {n_tokens:,} tokens, {options.rows} rows, greedy, calculator on; "
            f"{same} of {len(prompts)} completions identical, token for token. "
            f"Medians of {options.pairs} interleaved rounds.",
            "",
            *__doc__.split("\n\n", 1)[1].strip().split("\n"),
            "",
            markdown(["", "seconds", "tokens/s", "time of ours"], rows),
            "",
            "Rounds, in seconds: " + ", ".join(" / ".join(f"{s:.2f}" for s in times.values()) for times in rounds),
            "",
        ]
    )
    options.output.write_text(text, encoding="utf-8")
    print(text)


def generate_with_transformers(peer, text_format, prompts, order, n_rows, max_new_tokens) -> list[list[int]]:
    """Greedy completions of all prompts, in batches of the given order."""
    completions: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), n_rows):
        numbers = order[start : start + n_rows]
        longest = max(len(prompts[number]) for number in numbers)
        ids = torch.tensor([[*prompts[n], *[0] * (longest - len(prompts[n]))] for n in numbers])
        mask = torch.tensor([[1] * len(prompts[n]) + [0] * (longest - len(prompts[n])) for n in numbers])
        processor = transformers.LogitsProcessorList([CalculatorProcessor(text_format, len(numbers))])
        with torch.inference_mode():
            output = peer.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                logits_processor=processor,
                eos_token_id=text_format.end_id,
                pad_token_id=0,
                decoder_start_token_id=0,
            )
        for number, row in zip(numbers, output[:, 1:].tolist(), strict=True):
            end = row.index(text_format.end_id) + 1 if text_format.end_id in row else len(row)
            completions[number] = row[:end]
    return completions


def timed(work) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
