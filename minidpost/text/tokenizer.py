"""Text to token ids and back: SentencePiece, as T5 and Llama-1 and -2 use it, and tiktoken, as Llama-3 does.

The ids equal those of Hugging Face's tokenizers without special tokens. Departures: the name of a special token in a
text (`</s>`, `<|end_of_text|>`) is ordinary text, never the special id; ids that stand for no text (specials, and those
beyond the vocabulary, which a model can emit: T5 pads its 32,000 pieces to 32,128 rows) decode to nothing.

Both kinds have `vocab_size`; `pad_id`, `eos_id`, `bos_id` and `unk_id`, None where the vocabulary has none;
`token_texts`, what each id adds to a text; and `files`, what a model directory must contain for `load_tokenizer`.
"""

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import tiktoken

from minidpost.errors import UserError
from minidpost.storage import read_json

FILE_NAMES = ("spiece.model", "tokenizer.model", "original/tokenizer.model", "tokenizer.json")

# Llama-3: how a text is split into words, how many pieces of words there are, and how many special ids after them.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
N_PIECES = 128_000
N_SPECIALS = 256

_RANKED_PIECE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s")
_VARINT = re.compile(rb"[\x80-\xff]*[\x00-\x7f]")


class SentencePieceTokenizer:
    """A SentencePiece vocabulary."""

    def __init__(self, path: Path):
        """Read a SentencePiece model file; UserError if it is not one."""
        model = sentencepiece.SentencePieceProcessor()
        try:
            content = path.read_bytes()
            model.LoadFromSerializedProto(content)
            if _last_field(content) < 3:  # the normalizer, without which the default one would be taken
                raise RuntimeError
            ids = [*range(model.get_piece_size())]
            model.id_to_piece(ids)  # pieces that are no UTF-8 fail here, not while sampling
            model.decode(ids)
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{path}: not a SentencePiece model, or a broken one") from None
        self._model = model
        self._n_line_break_ids = len(model.encode("\n"))
        self.files = [path]
        self.vocab_size = model.get_piece_size()
        self.pad_id = _id_or_none(model.pad_id())
        self.eos_id = _id_or_none(model.eos_id())
        self.bos_id = _id_or_none(model.bos_id())
        self.unk_id = _id_or_none(model.unk_id())
        self.token_texts = [self._token_text(token_id) for token_id in range(self.vocab_size)]

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """The ids of `text`, no special ids added.

        `continued`: as they are after other text, that is, without the space that SentencePiece puts in front (only for
        vocabularies that keep newlines, as Llama's do).
        """
        if continued:  # no piece reaches across a newline, so the ids after one are those of the text alone
            ids: list[int] = self._model.encode("\n" + text)
            return ids[self._n_line_break_ids :]
        ids = self._model.encode(text)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; pad, EOS and BOS ids and ids outside the vocabulary contribute nothing."""
        skipped = (self.pad_id, self.eos_id, self.bos_id)
        text: str = self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in skipped])
        return text

    def _token_text(self, token_id: int) -> str:
        """One id's text: '▁' is a space, control ids are empty, bytes beyond ASCII and the unknown id are U+FFFD."""
        piece: str = self._model.id_to_piece(token_id)
        if self._model.is_control(token_id):
            return ""
        if self._model.is_unknown(token_id):
            return "\ufffd"
        if self._model.is_byte(token_id):
            byte = int(piece[1:-1], 16)  # <0x41>
            return chr(byte) if byte < 128 else "\ufffd"
        return piece.replace("▁", " ")


def _id_or_none(token_id: int) -> int | None:
    """SentencePiece has −1 for a special token that a vocabulary lacks."""
    return token_id if token_id >= 0 else None


class TiktokenTokenizer:
    """Llama-3's vocabulary: byte-level pieces, of which an earlier one merges first, and special ids without text."""

    pad_id: int | None = None
    unk_id: int | None = None

    def __init__(self, path: Path, pieces: dict[bytes, int], n_specials: int, bos_id: int, eos_id: int):
        """Take what was read from `path`; ValueError if ids are missing, or bytes that some text would need."""
        if sorted(pieces.values()) != [*range(len(pieces))] or not all(bytes([b]) in pieces for b in range(256)):
            raise ValueError
        self._encoding = tiktoken.Encoding("Llama-3", pat_str=SPLIT_PATTERN, mergeable_ranks=pieces, special_tokens={})
        self._pieces = {token_id: piece for piece, token_id in pieces.items()}
        self.files = [path]
        self.vocab_size = len(pieces) + n_specials
        self.bos_id: int | None = bos_id
        self.eos_id: int | None = eos_id
        self.token_texts = [self.decode([token_id]) for token_id in range(self.vocab_size)]

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """The ids of `text`, no special ids added; they are the same where it continues another text."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, U+FFFD for bytes that are no character; ids that stand for no text contribute nothing."""
        return b"".join(self._pieces.get(int(i), b"") for i in ids).decode("utf-8", "replace")


def load_tokenizer(directory: str | Path) -> SentencePieceTokenizer | TiktokenTokenizer:
    """The tokenizer in a model directory; UserError if there is none or its file is broken."""
    for name in FILE_NAMES:
        path = Path(directory) / name
        if path.is_file():
            if path.suffix == ".json":
                return _from_tokenizer_json(path)
            with path.open("rb") as stream:
                is_tiktoken = _RANKED_PIECE.match(stream.readline())
            return _from_tiktoken_file(path) if is_tiktoken else SentencePieceTokenizer(path)
    raise UserError(
        f"{directory}: no tokenizer here, spiece.model or tokenizer.model is needed (Llama-3: or tokenizer.json)"
    )


def _from_tiktoken_file(path: Path) -> TiktokenTokenizer:
    """Llama-3's tokenizer.model: a line for each piece, base64 and id. Of the special ids the first two have a use."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        pieces = {base64.b64decode(piece, validate=True): int(token_id) for piece, token_id in lines}
        if len(pieces) != N_PIECES:
            raise ValueError
        return TiktokenTokenizer(path, pieces, N_SPECIALS, bos_id=N_PIECES, eos_id=N_PIECES + 1)
    except ValueError:
        raise UserError(f"{path}: not Llama-3's {N_PIECES:,} lines of base64 and number, or a broken file") from None


def _from_tokenizer_json(path: Path) -> TiktokenTokenizer:
    """Llama-3's tokenizer.json: the pieces are spelt in GPT-2's alphabet of bytes, the special ids have names."""
    try:
        content: Any = read_json(path)
        vocabulary = content["model"]["vocab"]
        # 1) It must be the byte-level BPE that tiktoken computes: this split into words, merges by id, no normalizer.
        split, spelling = content["pre_tokenizer"]["pretokenizers"]
        merged = [vocabulary["".join(merge).replace(" ", "")] for merge in content["model"]["merges"]]
        specials = {token["content"]: token["id"] for token in content["added_tokens"]}
        n_pieces = len(vocabulary)
        if (
            content["normalizer"] is not None
            or content["model"]["ignore_merges"] is not True
            or split["pattern"] != {"Regex": SPLIT_PATTERN}
            or split["behavior"] != "Isolated"
            or split["invert"] is not False
            or spelling["add_prefix_space"]
            or spelling["use_regex"]
            or merged != sorted(merged)  # tiktoken merges by id
            or sorted(specials.values()) != [*range(n_pieces, n_pieces + len(specials))]
        ):
            raise ValueError
        # 2) Spelt in bytes, its pieces are those of tokenizer.model.
        byte_of = _byte_alphabet()
        pieces = {bytes(byte_of[character] for character in piece): token_id for piece, token_id in vocabulary.items()}
        bos_id = specials["<|begin_of_text|>"]
        eos_id = specials["<|end_of_text|>"]
        return TiktokenTokenizer(path, pieces, len(specials), bos_id, eos_id)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"{path}: not Llama-3's byte-level BPE, or broken; spiece.model or tokenizer.model is needed"
        ) from None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones of Latin-1 are themselves, the others U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for n, byte in enumerate(others):
        alphabet[chr(0x100 + n)] = byte
    return alphabet


def _last_field(message: bytes) -> int:
    """The number of a protobuf message's last field, where all its fields are length-delimited."""
    field = 0
    position = 0
    while length := _VARINT.match(message, position + 1):
        field = message[position] >> 3
        n_bytes = sum((byte & 127) << 7 * i for i, byte in enumerate(length[0]))
        position = length.end() + n_bytes
    return field
