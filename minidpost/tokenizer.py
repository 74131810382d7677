"""Text to token ids and back: SentencePiece, as T5 uses it.

The ids equal those of Hugging Face's T5 tokenizer without special tokens. Departure: ids beyond the vocabulary, which
the model can emit (T5 pads its 32,000 pieces to 32,128 embedding rows), decode to nothing instead of failing.
"""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from minidpost.files import UserError

FILE_NAMES = ("spiece.model", "tokenizer.model")


class SentencePieceTokenizer:
    """A SentencePiece vocabulary.

    `vocab_size` counts its pieces; `pad_id`, `eos_id`, `bos_id` and `unk_id` are None where it has none; `token_texts`
    holds what each id adds to a text; `files` are what a checkpoint must contain for `load_tokenizer`.
    """

    def __init__(self, path: Path):
        """Read a SentencePiece model file; UserError if it is not one."""
        model = sentencepiece.SentencePieceProcessor()
        try:
            model.LoadFromSerializedProto(path.read_bytes())
            ids = [*range(model.get_piece_size())]  # pieces that are no UTF-8 fail here, not while sampling
            model.id_to_piece(ids), model.decode(ids)
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"{path}: not a SentencePiece model, or a broken one") from None
        self._model = model
        self.files = [path]
        self.vocab_size = model.get_piece_size()
        special_ids = (model.pad_id(), model.eos_id(), model.bos_id(), model.unk_id())
        self.pad_id, self.eos_id, self.bos_id, self.unk_id = (i if i >= 0 else None for i in special_ids)
        self.token_texts = [self._token_text(token_id) for token_id in range(self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, no special ids added."""
        return self._model.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; pad, end and begin ids and ids outside the vocabulary contribute nothing."""
        skipped = (self.pad_id, self.eos_id, self.bos_id)
        return self._model.decode([int(i) for i in ids if 0 <= i < self.vocab_size and i not in skipped])

    def _token_text(self, token_id: int) -> str:
        """One id's text: '▁' is a space, control ids are empty, bytes beyond ASCII and the unknown id are U+FFFD."""
        piece = self._model.id_to_piece(token_id)
        if self._model.is_control(token_id):
            return ""
        if self._model.is_unknown(token_id):
            return "\ufffd"
        if self._model.is_byte(token_id):
            byte = int(piece[1:-1], 16)  # <0x41>
            return chr(byte) if byte < 128 else "\ufffd"
        return piece.replace("▁", " ")


def load_tokenizer(directory: str | Path) -> SentencePieceTokenizer:
    """The tokenizer in a checkpoint directory; UserError if there is none or its file is broken."""
    for name in FILE_NAMES:
        path = Path(directory) / name
        if path.is_file():
            return SentencePieceTokenizer(path)
    raise UserError(f"{directory}: no tokenizer here, {' or '.join(FILE_NAMES)} is needed")
