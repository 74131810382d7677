"""Make a Hugging Face directory of random weights: a model of true shape for trials where the real one is not at hand.

python tools/random_model.py --config ../shared/configs/flan-t5-small --tokenizer ../shared/tokenizers/t5 --output DIR
"""

import sys
from dataclasses import fields, replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost.cli import Parser  # noqa: E402
from minidpost.errors import UserError  # noqa: E402
from minidpost.models.hf_config import mapping_for, read_config  # noqa: E402
from minidpost.models.weights import save_model  # noqa: E402
from minidpost.storage import staged_directory  # noqa: E402
from minidpost.text.tokenizer import load_tokenizer  # noqa: E402

MAX_LAYERS = 1000


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and make the directory; the exit status, 2 after a line that says what was wrong."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a config.json, or the directory that holds it")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the directory of its vocabulary; copied along")
    parser.add_argument("--output", type=Path, required=True, help="the directory to make; must not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default %(default)s)")
    parser.add_argument("--layers", type=int, help="layers of each stack (default: config.json's)")
    try:
        options = parser.parse_args(arguments)
        n_parameters = make(options.config, options.tokenizer, options.output, options.seed, options.layers)
    except (UserError, OSError) as error:
        print(f"random_model.py: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: {n_parameters:,} random parameters")
    return 0


def make(config_path: Path, tokenizer_dir: Path, output: Path, seed: int, n_layers: int | None) -> int:
    """Write the directory; its number of parameters. UserError: existing output, bad config, tokenizer or depth."""
    if output.exists():
        raise UserError(f"{output}: exists already; give --output a new name")
    if n_layers is not None and not 1 <= n_layers <= MAX_LAYERS:
        raise UserError(f"--layers {n_layers}: a number from 1 to {MAX_LAYERS} is expected")
    config, tokenizer = read_config(config_path), load_tokenizer(tokenizer_dir)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{config_path}: vocab_size {config.vocab_size} is too small for the {tokenizer.vocab_size} pieces of "
            f"{tokenizer_dir}"
        )
    if n_layers is not None:
        depths = [field.name for field in fields(config) if field.name.endswith("_layers")]
        config = replace(config, **dict.fromkeys(depths, n_layers))
    torch.manual_seed(seed)
    model = mapping_for(config).model(config).initialise()
    with staged_directory(output) as unfinished:
        save_model(model, unfinished, tokenizer.files)
    return sum(weight.numel() for weight in model.parameters())


if __name__ == "__main__":
    sys.exit(main())
