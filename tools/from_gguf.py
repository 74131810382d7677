"""Convert a GGUF file, which llama.cpp runs, to a Hugging Face directory that every command here takes.

python tools/from_gguf.py SmolLM2-135M-Instruct.Q4_1.gguf
python sample.py --checkpoint weights/SmolLM2-135M-Instruct.Q4_1 …

The commands do the same by themselves where they are given the path of a .gguf file. Needs `pip install gguf`.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost.cli import Parser, run_command  # noqa: E402
from minidpost.errors import UserError  # noqa: E402
from minidpost.models.gguf import convert_gguf  # noqa: E402
from minidpost.models.hub import WEIGHTS_DIR, gguf_directory  # noqa: E402
from minidpost.precision import DTYPES  # noqa: E402
from minidpost.storage import sha256_of  # noqa: E402


def main() -> None:
    """Parse the command line and convert; UserError where the file, or the directory, is not what it should be."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE", type=Path, help="the .gguf file")
    parser.add_argument(
        "directory",
        metavar="DIRECTORY",
        type=Path,
        nargs="?",
        help="the directory to make; must not exist yet (default: weights/ and FILE's name, where --model FILE looks)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="of the weights written; bf16 halves the directory and rounds what FILE says (default: %(default)s)",
    )
    options = parser.parse_args()
    if not options.file.is_file():
        raise UserError(f"{options.file}: no such file")
    sha256 = sha256_of(options.file)
    directory = options.directory or gguf_directory(options.file, sha256, WEIGHTS_DIR)[0]
    convert_gguf(options.file, directory, sha256=sha256, dtype=DTYPES[options.dtype])
    print(directory)


if __name__ == "__main__":
    run_command(main)
