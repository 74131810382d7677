"""Llama-3's tokenizer.model as transformers reads it, without the library that it asks for the ranks."""

import base64
import sys
from pathlib import Path
from types import ModuleType

import pytest


def ranks_of_llama3(path: str | Path) -> dict[bytes, int]:
    """The pieces of Llama-3's tokenizer.model and their ranks."""
    lines = [line.split() for line in Path(path).read_bytes().splitlines()]
    return {base64.b64decode(piece): int(rank) for piece, rank in lines}


def llama3_of_transformers(path: Path):
    """transformers' reader of the file, with Llama-3's 256 special tokens, whose names are not in it."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(4))]
    names += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
    names += [f"<|reserved_special_token_{i}|>" for i in range(5, 251)]
    with pytest.MonkeyPatch.context() as patch:
        load = ModuleType("tiktoken.load")
        load.load_tiktoken_bpe = ranks_of_llama3
        patch.setitem(sys.modules, "tiktoken", ModuleType("tiktoken"))
        patch.setitem(sys.modules, "tiktoken.load", load)
        backend = TikTokenConverter(str(path), extra_special_tokens=names).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])
