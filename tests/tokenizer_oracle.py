"""Tokenizers of transformers for the files in ../shared: Llama-2's and Llama-3's tokenizer.model."""

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


def llama2_of_transformers(llama2, legacy=False):
    """transformers' Llama tokenizer, given the pieces of a SentencePiece model that we have read.

    `legacy` as in tokenizer_config.json; transformers' own default is false.
    """
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = {llama2._model.id_to_piece(i): i for i in range(llama2.vocab_size)}
    scores = {piece: llama2._model.get_score(i) for piece, i in pieces.items()}
    return LlamaTokenizer(vocab=pieces, merges=generate_merges(pieces, scores), add_bos_token=True, legacy=legacy)


def with_user_defined_pieces(content: bytes, names: list[str], last_piece: str) -> bytes:
    """A SentencePiece model with user-defined pieces after its last one, as Yi has its chat marks."""
    last = last_piece.encode()
    head = b"\x0a" + bytes([len(last)]) + last + b"\x15"
    end = content.index(head) + len(head) + 4  # the score; a piece of the usual type says nothing more
    pieces = b""
    for name in names:
        piece = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x15" + bytes(4) + b"\x18\x04"
        pieces += b"\x0a" + bytes([len(piece)]) + piece
    return content[:end] + pieces + content[end:]


def with_legacy_normalizer(tokenizer):
    """The same tokenizer as older files have it: a space before every text between special tokens."""
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast

    backend = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
