"""Peak memory of one SFT step with Llama-3's vocabulary: logits in chunks against logits at once.

A small Llama (the vocabulary is what matters here) with 128,256 pieces takes 4 examples of 256 prompt and 384 target
tokens. Each variant runs in a process of its own: the model is built, takes a first step (so that the optimizer's
moments exist), and then the peak of the second step is measured over what the process holds at rest.
"""

import argparse
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import status_bytes  # noqa: E402
from minidpost.models.layers import token_log_probabilities  # noqa: E402
from minidpost.models.llama import Llama, LlamaConfig  # noqa: E402
from minidpost.storage import markdown_table  # noqa: E402
from minidpost.training.batching import Batch, TokenizedExample, collate  # noqa: E402
from minidpost.training.losses import LOGITS_AT_ONCE, log_probabilities, sft_loss  # noqa: E402
from minidpost.training.optim import Schedule, adamw, apply_step, enable_activation_checkpointing  # noqa: E402

VOCAB_SIZE = 128_256
N_EXAMPLES = 4
PROMPT_LENGTH = 256
TARGET_LENGTH = 384


def all_positions(model: Llama, batch: Batch) -> Tensor:
    """What a plain implementation does: logits of every position, then the log-probabilities of the labels."""
    logits_NV = model(*batch.inputs).flatten(0, 1)
    label_N = batch.label_BT.flatten()
    return token_log_probabilities(logits_NV, label_N.clamp(min=0)) * (label_N >= 0)


def target_positions(model: Llama, batch: Batch) -> Tensor:
    """Logits where there is a label, all in one chunk."""
    return log_probabilities(model, batch, logits_at_once=10**15)


VARIANTS: dict[str, Callable[[Llama, Batch], Tensor]] = {
    "logits of all positions at once": all_positions,
    "logits of target positions at once": target_positions,
    f"in chunks of {LOGITS_AT_ONCE:,} numbers (ours)": log_probabilities,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "memory.md")
    parser.add_argument(
        "--way", type=int, choices=range(len(VARIANTS)), help="measure this variant alone and print bytes"
    )
    options = parser.parse_args()
    if options.way is not None:
        print(measure(list(VARIANTS.values())[options.way], options.width, options.layers))
        return
    rows = []
    for index, variant in enumerate(VARIANTS):
        command = [sys.executable, __file__, "--way", str(index), "--width", str(options.width)]
        command += ["--layers", str(options.layers)]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append([variant, f"{peak / 10**9:.2f} GB"])
    command = "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32"
    text = [f"# {__doc__.splitlines()[0].rstrip('.')}", "", f"`{command}` · {machine}", ""]
    text += [*__doc__.split("\n\n", 1)[1].strip().split("\n"), ""]
    text += [f"Width {options.width}, {options.layers} layers, activation checkpointing on.", ""]
    text += [markdown_table(["variant", "peak of the step over rest"], rows), ""]
    options.output.write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


def measure(variant: Callable[[Llama, Batch], Tensor], width: int, n_layers: int) -> int:
    """Bytes by which the second step's peak exceeds the memory held before it (Linux)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        VOCAB_SIZE, width, 3 * width, n_layers, n_heads=4, n_kv_heads=2, d_head=width // 4, bos_id=1, eos_id=2
    )
    model = Llama(config).initialise().train()
    enable_activation_checkpointing(model)
    optimizer = adamw(model, Schedule(1e-4))
    ids = torch.randint(VOCAB_SIZE, (N_EXAMPLES, PROMPT_LENGTH + TARGET_LENGTH)).tolist()
    examples = [TokenizedExample(tuple(row[:PROMPT_LENGTH]), tuple(row[PROMPT_LENGTH:])) for row in ids]
    batch = collate(config, examples, "cpu")
    small_batch = collate(config, [TokenizedExample((1, 2), (3, 4))], "cpu")

    def step(batch: Batch) -> None:
        sft_loss(variant(model, batch), len(batch.position_N)).backward()
        apply_step(model, optimizer, Schedule(1e-4), step=0, n_steps=10)

    step(small_batch)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    rest = status_bytes("VmRSS")
    step(batch)
    return status_bytes("VmHWM") - rest


if __name__ == "__main__":
    main()
