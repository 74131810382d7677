"""Print the README's table of what a run needs for each model: memory on a GPU and disk, with and without LoRA.

python tools/memory_table.py                                       # the models of ../shared/configs
python tools/memory_table.py ../shared/configs/llama-7b mine/      # of these config.json or directories

By the estimates that train.py makes before it begins (selftraining/estimates.py), for DPO-ST at the defaults of each
model's preset, in bf16 on a GPU. Nothing is allocated, so that any machine will do.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost.cli import Parser  # noqa: E402
from minidpost.errors import UserError  # noqa: E402
from minidpost.models.hf_config import read_config  # noqa: E402
from minidpost.models.weights import empty_model  # noqa: E402
from minidpost.selftraining.estimates import GB, disk_bytes, sampling_bytes, training_bytes  # noqa: E402
from minidpost.selftraining.presets import Preset, for_lora, n_parameters, preset_of  # noqa: E402
from minidpost.storage import markdown_table  # noqa: E402

CONFIGS = ROOT.parent / "shared" / "configs"
METHOD = "dpo-st"
HEADS = ["model", "parameters", "training", "with LoRA", "sampling", "disk", "disk with LoRA"]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and print the table; the exit status, 2 after a line that says what was wrong."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "configs", metavar="CONFIG", type=Path, nargs="*", help="a config.json or its directory (default: all known)"
    )
    parser.add_argument("--lora-rank", type=int, default=16, help="of the columns with LoRA (default: %(default)s)")
    try:
        options = parser.parse_args(arguments)
        if options.lora_rank < 1:
            raise UserError(f"--lora-rank {options.lora_rank}: at least 1 is expected")
        paths = options.configs or sorted(CONFIGS.glob("*/config.json"))
        if not paths:
            raise UserError(f"{CONFIGS}: no configs here; name some")
        rows = sorted(row_of(path, options.lora_rank) for path in paths)
    except (UserError, OSError) as error:
        print(f"memory_table.py: {error}", file=sys.stderr)
        return 2
    print(markdown_table(HEADS, [cells for _, _, cells in rows]))
    return 0


def row_of(path: Path, lora_rank: int) -> tuple[bool, int, list[str]]:
    """A model's row, after what rows are sorted by: decoder-only models last, then by size."""
    config = read_config(path)
    model = empty_model(config)
    preset = preset_of(config, METHOD)
    with_lora = replace(for_lora(preset), lora_rank=lora_rank)

    def training(preset: Preset) -> str:
        return gigabytes(training_bytes(model, preset, torch.bfloat16, "cuda"))

    def disk(preset: Preset) -> str:
        return gigabytes(disk_bytes(model, preset, METHOD))

    size = n_parameters(model)
    name = path.parent.name if path.is_file() else path.resolve().name
    cells = [
        name + (" *" if preset.activation_checkpointing else ""),
        f"{size / 1e9:.1f} B" if size >= 1e9 else f"{size / 1e6:.0f} M",
        training(preset),
        training(with_lora),
        gigabytes(sampling_bytes(model, preset, torch.bfloat16, "cuda")),
        disk(preset),
        disk(with_lora),
    ]
    return not config.is_encoder_decoder, size, cells


def gigabytes(n_bytes: int) -> str:
    """A size in whole GB, at least 1."""
    return f"{max(1, round(n_bytes / GB)):,} GB"


if __name__ == "__main__":
    sys.exit(main())
