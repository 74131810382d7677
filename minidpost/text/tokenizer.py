"""Text to token ids and back: SentencePiece models and every tokenizer.json.

The `sentencepiece` library reads spiece.model (T5) and tokenizer.model (Llama-1 and -2, Mistral), the `tokenizers`
library reads tokenizer.json (Llama-3, Qwen, SmolLM2 and others) and what is made of Llama-3's tokenizer.model, which
lists byte-level pieces by rank. The ids equal those of Hugging Face's tokenizers without special tokens.

What begins and ends a text is the checkpoint's own choice, not the family's: tokenizer_config.json has the word, else
the tokenizer's post-processor (BOS) and config.json (EOS).

Departures: the name of a special token in a text (`</s>`, `<|im_end|>`, `<think>`) is ordinary text, never the special
id, for all tokens that a tokenizer.json lists as added; ids that stand for no text (specials, and those beyond the
vocabulary, which a model can emit: T5 pads its 32,000 pieces to 32,128 rows) decode to nothing; a tokenizer.json that
cuts or pads texts, or drops merges at random, does so no longer.

Both kinds have `vocab_size`; `bos_id`, what stands in front of every text, None where nothing does; `eos_id`, what ends
a text that is trained on, None where nothing does; `stop_ids`, any of which ends a completion; `pad_id` and `unk_id`,
None where the vocabulary has none; `special_ids`, the ids of special tokens by their names; `begins_anew_after_marks`,
whether a text after one of them gets the space in front that the vocabulary puts before a text; `n_embeddings_needed`,
how many rows a model's embedding must have; `token_texts`, what each id adds to a text; and `files`, what a model
directory must contain for `load_tokenizer`.
"""

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from minidpost.errors import UserError
from minidpost.storage import read_json, write_json

FILE_NAMES = ("spiece.model", "tokenizer.model", "original/tokenizer.model", "tokenizer.json")
ADDED_TOKENS = "added_tokens.json"  # beside a tokenizer.model
MAX_IDS = 2**20  # in a vocabulary

# Llama-3: how many pieces of words there are, and how many special ids after them.
N_PIECES = 128_000
N_SPECIALS = 256
SPECIAL_NAMES = {  # those that have a use, by their place after the pieces
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}
# The end of a text where no file of the checkpoint names it: Llama-1 and -2, Llama-3, SmolLM2 and Qwen.
COMMON_EOS = ("</s>", "<|end_of_text|>", "<|endoftext|>")

_RANKED_PIECE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\s")
_VARINT = re.compile(rb"[\x80-\xff]*[\x00-\x7f]")
_PROBES = ("a", "", " ", "\n", "\n24>>", "24>>", "Tom’s 3 + 4\n\n= 7. é猫🦜 ½\x00\u0301<s>#### \t\r\n")


@dataclass(frozen=True)
class SpecialTokens:
    """What the files beside a tokenizer say of its special tokens; None where they are silent."""

    path: Path  # of tokenizer_config.json
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    adds_bos: bool | None = None
    is_legacy: bool = False  # of Llama's SentencePiece models: a space is put before every text after a special token
    end_ids: tuple[int, ...] = ()  # `eos_token_id` of config.json and of generation_config.json


@dataclass(frozen=True)
class AddedToken:
    """A token that a file beside a SentencePiece model lists: one of its pieces, or one with an id after them."""

    name: str
    token_id: int
    is_special: bool


class SentencePieceTokenizer:
    """A SentencePiece vocabulary."""

    def __init__(
        self,
        path: Path,
        said: SpecialTokens | None = None,
        *,
        added: Sequence[AddedToken] = (),
        begins_anew_after_marks: bool = False,
    ):
        """Read a SentencePiece model file; UserError if it is not one, or if `said` does not fit it.

        It says neither which tokens were `added`, nor whether it `begins_anew_after_marks`. All that have ids after its
        pieces are special ids, and so are the special ones among its user-defined pieces.
        """
        model = sentencepiece.SentencePieceProcessor()
        try:
            content = path.read_bytes()
            for token in added:
                if token.is_special:
                    content = _with_control_piece(content, token.name)
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
        self._n_pieces = len(ids)
        after_pieces = {token.name: token.token_id for token in added if token.token_id >= self._n_pieces}
        self.vocab_size = max([*ids, *after_pieces.values()]) + 1
        self.special_ids: dict[str, int] = after_pieces | {model.id_to_piece(i): i for i in ids if model.is_control(i)}
        self.begins_anew_after_marks = begins_anew_after_marks
        self.unk_id = _id_or_none(model.unk_id())
        self.pad_id = _id_or_none(model.pad_id())
        own_bos_id = _id_or_none(model.bos_id())
        self.bos_id, self.eos_id, self.stop_ids = _begin_and_end(
            self.special_ids, said, own_bos_id=own_bos_id, own_eos_id=_id_or_none(model.eos_id())
        )
        self.n_embeddings_needed = _n_embeddings_needed(ids, self.bos_id, self.stop_ids)
        self._silent_ids = {self.pad_id, self.eos_id, own_bos_id, *self.stop_ids}
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
        """The text of `ids`; pad, EOS, BOS and added ids and ids outside the vocabulary contribute nothing."""
        shown = [int(i) for i in ids if 0 <= i < self._n_pieces and i not in self._silent_ids]
        text: str = self._model.decode(shown)
        return text

    def _token_text(self, token_id: int) -> str:
        """One id's text: '▁' is a space, bytes beyond ASCII and the unknown id are U+FFFD; nothing for special ids."""
        if token_id >= self._n_pieces:
            return ""
        piece: str = self._model.id_to_piece(token_id)
        if self._model.is_control(token_id):
            return ""
        if self._model.is_unknown(token_id):
            return "\ufffd"
        if self._model.is_byte(token_id):
            byte = int(piece[1:-1], 16)  # <0x41>
            return chr(byte) if byte < 128 else "\ufffd"
        return piece.replace("▁", " ")


def _with_control_piece(content: bytes, name: str) -> bytes:
    """A SentencePiece model in which the user-defined piece of this name, if any, is a control piece: no text has it.

    A piece lies there as its name (field 1), its score (field 2, four bytes) and its type (field 3): 4 is user-defined,
    3 is control.
    """
    spelt = name.encode("utf-8", "replace")
    if len(spelt) > 127:  # a length of more than a byte
        return content
    before_score = b"\x0a" + bytes([len(spelt)]) + spelt + b"\x15"
    position = content.find(before_score)
    type_position = position + len(before_score) + 4
    if position < 0 or content[type_position : type_position + 2] != b"\x18\x04":
        return content
    return content[:type_position] + b"\x18\x03" + content[type_position + 2 :]


def _id_or_none(token_id: int) -> int | None:
    """SentencePiece has −1 for a special token that a vocabulary lacks."""
    return token_id if token_id >= 0 else None


class FastTokenizer:
    """A vocabulary that the `tokenizers` library computes: the content of a tokenizer.json."""

    def __init__(self, path: Path, content: Any, said: SpecialTokens):
        """Take what was read from `path`; UserError if it is no tokenizer, or if `said` does not fit it.

        The library is not told of added tokens, so that their names in a text are ordinary text to it.
        """
        with _one_line_for_any_fault(path):
            self.special_ids = {str(token["content"]): int(token["id"]) for token in content["added_tokens"]}
            model = _without_names(content["model"], self.special_ids)
            unpadded: dict[str, Any] = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(content | unpadded | {"model": model}))
            pieces = self._backend.get_vocab(with_added_tokens=False)
            ids = {*pieces.values(), *self.special_ids.values()}
            self.vocab_size = max(ids) + 1
            if min(ids) < 0 or self.vocab_size > MAX_IDS:
                raise ValueError
            own_bos_id = _first_of_template(content.get("post_processor"))
            if own_bos_id is not None and own_bos_id not in ids:
                raise ValueError
            unknown_id = _unknown_id(model)
        named = [self.special_ids[name] for name in COMMON_EOS if name in self.special_ids]
        ends = [end_id for end_id in said.end_ids if end_id in self.special_ids.values()]
        self.bos_id, self.eos_id, self.stop_ids = _begin_and_end(
            self.special_ids, said, own_bos_id=own_bos_id, own_eos_id=next(iter([*ends, *named]), None)
        )
        self.n_embeddings_needed = _n_embeddings_needed(pieces.values(), self.bos_id, self.stop_ids)
        # What begins or ends a text stands for no text, though some vocabularies name it for what they cannot write.
        self.unk_id = None if unknown_id in {self.bos_id, self.eos_id, *self.stop_ids} else unknown_id
        with _one_line_for_any_fault(path):
            self._unknown_text = next((_hidden(name) for name, i in self.special_ids.items() if i == self.unk_id), None)
            self.files = [path]
            self._unspeakable = frozenset(self.special_ids.values()) - {self.unk_id}
            self.begins_anew_after_marks = _puts_spaces_everywhere(content)
            self._lead = ""
            # Whatever a text can do to the library should happen here, not while sampling.
            for text in _PROBES:
                self.decode(self.encode(text))
            self.token_texts = self._read_token_texts()
            # Where a text's first piece differs from the same piece after other text, a line break goes in front.
            line_break_ids = self.encode("\n")
            if self.encode("\n24>>") != [*line_break_ids, *self.encode("24>>")]:
                self._lead = "\n"
            self._n_lead_ids = len(line_break_ids) if self._lead else 0
        self.pad_id = self.special_ids.get(said.pad) if said.pad else None

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """The ids of `text`, no special ids added.

        `continued`: as they are after other text, that is, without the space that some vocabularies put in front (only
        for those that keep newlines, as Llama's do).
        """
        lead = self._lead if continued else ""
        text = (lead + text).encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair is no text
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not self._unspeakable.isdisjoint(ids):
            ids = [token_id for token_id in ids if token_id not in self._unspeakable]
        return ids[self._n_lead_ids :] if lead else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, U+FFFD for bytes that are no character; ids that stand for no text contribute nothing."""
        special_ids = self._unspeakable
        shown = [int(i) for i in ids if 0 <= i < self.vocab_size and i not in special_ids]
        text = self._backend.decode(shown, skip_special_tokens=False)
        return text if self._unknown_text is None else text.replace(self._unknown_text, "\ufffd")

    def _read_token_texts(self) -> list[str]:
        """Each id's text: what it adds to that of an `a` in front of it."""
        first_id = self.encode("a")[-1]
        n_first = len(self.decode([first_id]))
        texts = []
        for token_id in range(self.vocab_size):
            text = self._backend.decode([first_id, token_id], skip_special_tokens=False)
            texts.append("" if token_id in self._unspeakable else text[n_first:])
        if self.unk_id is not None:
            texts[self.unk_id] = "\ufffd"
        return texts


@contextmanager
def _one_line_for_any_fault(path: Path) -> Iterator[None]:
    """UserError for whatever goes wrong inside the block, while a tokenizer.json is taken apart.

    A Rust library can panic on hostile input: that raises a BaseException of no public name, after a message on the
    file descriptor of standard error, which therefore points nowhere meanwhile.
    """
    try:
        standard_error = os.dup(2)
    except OSError:  # closed
        standard_error = None
    else:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        raise UserError(f"{path}: not a tokenizer that the `tokenizers` library can read, or a broken file") from None
    finally:
        if standard_error is not None:
            os.dup2(standard_error, 2)
            os.close(standard_error)


def _without_names(model: Any, special_ids: Mapping[str, int]) -> Any:
    """The `model` of a tokenizer.json in which no text can become a special token's id; no merges dropped at random.

    The pieces that are named as special tokens get names that no text has, and merges that make them go.
    """
    model = model | {"dropout": None} if "dropout" in model else dict(model)
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram's: pairs of piece and score, where an id is a place
        id_of = {piece: token_id for token_id, (piece, _) in enumerate(vocabulary)}
    else:
        id_of = vocabulary
    piece_of = {token_id: piece for piece, token_id in id_of.items()}
    for name, token_id in special_ids.items():
        if id_of.get(name, token_id) != token_id or piece_of.get(token_id, name) != name:
            raise ValueError  # one name with two ids, or one id with two names
    names = special_ids.keys() & id_of.keys()
    if not names:
        return model
    if isinstance(vocabulary, list):
        model["vocab"] = [[_hidden(piece) if piece in names else piece, score] for piece, score in vocabulary]
        return model
    model["vocab"] = {_hidden(piece) if piece in names else piece: i for piece, i in vocabulary.items()}
    if model.get("unk_token") in names:
        model["unk_token"] = _hidden(model["unk_token"])
    if "merges" in model:
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in merges if names.isdisjoint([*pair, "".join(pair)])]
    return model


def _hidden(name: str) -> str:
    """A piece's name that no text has: U+FFFF is no character."""
    return f"\uffff{name}\uffff"


def _unknown_id(model: Any) -> int | None:
    """The id of what the vocabulary cannot write, if it has one."""
    if isinstance(model["vocab"], list):
        unknown_id: int | None = model.get("unk_id")
        return unknown_id
    token_id: int | None = model["vocab"].get(model.get("unk_token"))
    return token_id


def _puts_spaces_everywhere(content: Any) -> bool:
    """Whether a tokenizer.json has a space put before every text between special tokens, not the first one alone."""
    steps = [content.get("normalizer"), content.get("pre_tokenizer")]
    for step in steps:
        if step is None:
            continue
        steps += step.get("normalizers", []) + step.get("pretokenizers", [])  # of a Sequence
        if step["type"] == "Prepend":
            return True
        # Metaspace's and ByteLevel's; older files of Metaspace have no scheme.
        if step.get("prepend_scheme", "always") == "always" and step.get("add_prefix_space", "prepend_scheme" in step):
            return True
    return False


def _first_of_template(post_processor: Any) -> int | None:
    """The id that a tokenizer.json's post-processor puts in front of a text, if any."""
    if post_processor is None:
        return None
    if post_processor["type"] == "Sequence":
        found = [_first_of_template(processor) for processor in post_processor["processors"]]
        return next((token_id for token_id in found if token_id is not None), None)
    if post_processor["type"] != "TemplateProcessing" or "SpecialToken" not in post_processor["single"][0]:
        return None
    name = post_processor["single"][0]["SpecialToken"]["id"]
    return int(post_processor["special_tokens"][name]["ids"][0])


def _begin_and_end(
    special_ids: Mapping[str, int], said: SpecialTokens | None, *, own_bos_id: int | None, own_eos_id: int | None
) -> tuple[int | None, int | None, frozenset[int]]:
    """What begins a text, what ends one, and all ids of which any ends a completion.

    What a checkpoint's files say goes before the tokenizer's own ids. UserError: they name a token that it lacks.
    """
    if said is None:
        return own_bos_id, own_eos_id, frozenset([] if own_eos_id is None else [own_eos_id])
    for key, name in (("bos_token", said.bos), ("eos_token", said.eos)):
        if name is not None and name not in special_ids:
            raise UserError(f"{said.path}: {key} is {name!r:.60}, which the tokenizer beside it does not have")
    bos_id = own_bos_id
    if said.adds_bos is False:
        bos_id = None
    elif said.adds_bos and said.bos is not None:
        bos_id = special_ids[said.bos]
    elif said.adds_bos and own_bos_id is None:
        raise UserError(f"{said.path}: add_bos_token is true, but bos_token names none")
    eos_id = own_eos_id if said.eos is None else special_ids[said.eos]
    speechless = {*special_ids.values()}  # an id that stands for text ends nothing, whatever config.json has
    stop_ids = {end_id for end_id in (eos_id, *said.end_ids) if end_id in speechless}
    return bos_id, eos_id, frozenset(stop_ids)


def _n_embeddings_needed(piece_ids: Iterable[int], bos_id: int | None, stop_ids: Iterable[int]) -> int:
    """How many rows a model's embedding must have: for all pieces, and for what begins or ends a text.

    Added tokens after these, such as the pad token that some checkpoints have without a row for it, occur in no text.
    The marks of a chat format are those of a template.
    """
    begin = [] if bos_id is None else [bos_id]
    return max([*piece_ids, *begin, *stop_ids], default=-1) + 1


def load_tokenizer(directory: str | Path) -> SentencePieceTokenizer | FastTokenizer:
    """The tokenizer in a model directory; UserError if there is none or its file is broken.

    Of several files the first of FILE_NAMES counts, unless a tokenizer.json has tokens that a SentencePiece model
    lacks: fine-tunes of Llama-2 and Mistral add ChatML's marks to it alone.
    """
    directory = Path(directory)
    path = next((directory / name for name in FILE_NAMES if (directory / name).is_file()), None)
    if path is None:
        raise UserError(f"{directory}: no tokenizer here, spiece.model, tokenizer.model or tokenizer.json is needed")
    said = read_special_tokens(directory)
    fast_path = directory / "tokenizer.json"
    if path == fast_path:
        return FastTokenizer(path, _read_object(path), said)
    with path.open("rb") as stream:
        if _RANKED_PIECE.match(stream.readline()):
            return _from_ranked_pieces(path, said)
    in_json = _added_in_tokenizer_json(fast_path)
    n_pieces = SentencePieceTokenizer(path).vocab_size
    if any(token.token_id >= n_pieces for token in in_json):
        return FastTokenizer(fast_path, _read_object(fast_path), said)
    return SentencePieceTokenizer(
        path,
        said,
        added=[*_added_beside(directory), *in_json],
        begins_anew_after_marks=_begins_anew_after_marks(fast_path, said),
    )


def _begins_anew_after_marks(fast_path: Path, said: SpecialTokens) -> bool:
    """Whether the spaces that a SentencePiece model puts before a text stand after special tokens too.

    The steps of a tokenizer.json beside it say so. Where there is none, or a broken one, it is `legacy` in
    tokenizer_config.json, false where absent, as in transformers 5.
    """
    try:
        content = _read_object(fast_path)
        return _puts_spaces_everywhere(content) if content else said.is_legacy
    except (UserError, LookupError, TypeError, AttributeError):
        return said.is_legacy


def _added_in_tokenizer_json(path: Path) -> list[AddedToken]:
    """The tokens that a tokenizer.json lists as added, but T5's `<extra_id_0>` and so on; none where it is broken."""
    try:
        return _without_extra_ids(
            AddedToken(str(token["content"]), int(token["id"]), bool(token.get("special")))
            for token in _read_object(path)["added_tokens"]
        )
    except (UserError, LookupError, TypeError, ValueError, AttributeError):
        return []


def _added_beside(directory: Path) -> list[AddedToken]:
    """The tokens that tokenizer_config.json lists as added, or else added_tokens.json, which old checkpoints have.

    As above without T5's. UserError where a list is broken: a chat format needs all of its marks.
    """
    path = directory / "tokenizer_config.json"
    listed = _read_object(path).get("added_tokens_decoder")
    expected = 'added_tokens_decoder is expected to be {"ID": {"content": NAME, "special": true or false}, ...}'
    try:
        if listed is not None:
            tokens = [
                AddedToken(token["content"], int(token_id), token.get("special") is True)
                for token_id, token in listed.items()
            ]
        else:
            path = directory / ADDED_TOKENS
            expected = "{NAME: ID, ...} is expected"
            tokens = [AddedToken(name, int(token_id), True) for name, token_id in _read_object(path).items()]
        if not all(isinstance(token.name, str) and 0 <= token.token_id < MAX_IDS for token in tokens):
            raise ValueError
    except (LookupError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: {expected}") from None
    return _without_extra_ids(tokens)


def _without_extra_ids(tokens: Iterable[AddedToken]) -> list[AddedToken]:
    """All but T5's `<extra_id_0>` and so on, which no text of ours has."""
    return [token for token in tokens if not token.name.startswith("<extra_id_")]


def add_end_id(directory: Path, eos_id: int) -> None:
    """Name an end id of a decoder-only model in config.json and generation_config.json, those that are there.

    transformers' `generate` ends at the ids that stand there alone (in the latter, where it is there). What a model was
    trained to end in may be another: the end of a turn, or the token that tokenizer_config.json names. The ids that are
    there stay in front, as the first is the tokenizer's own where nothing else names one.
    """
    for path in (directory / "config.json", directory / "generation_config.json"):
        if not path.is_file():
            continue
        content = _read_object(path)
        given = content.get("eos_token_id")
        listed = given if isinstance(given, list) else [given] if given is not None else []
        if eos_id not in listed:
            write_json(path, content | {"eos_token_id": [*listed, eos_id] if listed else eos_id})


def read_special_tokens(directory: str | Path) -> SpecialTokens:
    """What tokenizer_config.json, config.json and generation_config.json of a directory say, those that are there."""
    directory = Path(directory)
    path = directory / "tokenizer_config.json"
    content = _read_object(path)
    for key in ("add_bos_token", "legacy"):
        found = content.get(key)
        if found is not None and not isinstance(found, bool):
            raise UserError(f"{path}: {key} is {found!r:.40}, true or false is expected")
    end_ids: list[int] = []
    for file in (directory / "config.json", directory / "generation_config.json"):
        found = _read_object(file).get("eos_token_id")
        listed = found if isinstance(found, list) else [found] if found is not None else []
        for token_id in listed:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                raise UserError(f"{file}: eos_token_id is {found!r:.60}, a number or a list of numbers is expected")
        end_ids += listed
    bos, eos, pad = (_token_name(content, key, path) for key in ("bos_token", "eos_token", "pad_token"))
    adds_bos, is_legacy = content.get("add_bos_token"), bool(content.get("legacy"))
    return SpecialTokens(path, bos, eos, pad, adds_bos, is_legacy, tuple(end_ids))


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file; UserError where it is broken."""
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not readable as a JSON object")
    return content


def _token_name(content: dict[str, Any], key: str, path: Path) -> str | None:
    """The name of a special token in tokenizer_config.json, which has it as a text or in an object; None for none."""
    found = content.get(key)
    name = found.get("content") if isinstance(found, dict) else found
    if name is not None and not isinstance(name, str):
        raise UserError(f"{path}: {key} is {found!r:.60}, the name of a token is expected")
    return name or None  # some old files have an empty one


def _from_ranked_pieces(path: Path, said: SpecialTokens) -> FastTokenizer:
    """Llama-3's tokenizer.model: a line for each piece, base64 and id, where an earlier piece merges first.

    In tokenizer.json's terms that is byte-level BPE: the merges of a piece are all pairs of pieces that make it, and a
    word that is a piece is not split at all. Of the special ids a file says nothing.
    """
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        pieces = {base64.b64decode(piece, validate=True): int(token_id) for piece, token_id in lines}
        if sorted(pieces.values()) != [*range(N_PIECES)] or not all(bytes([byte]) in pieces for byte in range(256)):
            raise ValueError
    except ValueError:
        raise UserError(f"{path}: not Llama-3's {N_PIECES:,} lines of base64 and number, or a broken file") from None
    alphabet = _byte_alphabet()
    spelt = {piece: "".join(alphabet[byte] for byte in piece) for piece in pieces}
    merges: list[list[str]] = []
    for piece in sorted(pieces, key=pieces.__getitem__):
        pairs = []
        for n in range(1, len(piece)):
            if piece[:n] in pieces and piece[n:] in pieces:
                pairs.append((piece[:n], piece[n:]))
        if len(pairs) > 1:
            pairs.sort(key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
        merges += [[spelt[left], spelt[right]] for left, right in pairs]
    added_tokens = []
    for place in range(N_SPECIALS):
        name = SPECIAL_NAMES.get(place, f"<|special_token_{place}|>")
        added_tokens.append({"content": name, "id": N_PIECES + place})
    bos = {"id": SPECIAL_NAMES[0], "ids": [N_PIECES], "tokens": [SPECIAL_NAMES[0]]}
    content = {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split_step(LLAMA3_DIGITS), byte_level_step(use_regex=False)],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {spelt[piece]: token_id for piece, token_id in pieces.items()},
            "merges": merges,
            "ignore_merges": True,
        },
        "added_tokens": added_tokens,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": SPECIAL_NAMES[0], "type_id": 0}}],
            "special_tokens": {SPECIAL_NAMES[0]: bos},
        },
    }
    return FastTokenizer(path, content, said)


LLAMA3_DIGITS = r"\p{N}{1,3}"  # how many digits make a word


def split_step(digits: str) -> dict[str, Any]:
    """The step of a tokenizer.json that splits a text into words as Llama-3 and Qwen do; they differ in `digits`."""
    pattern = (
        rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level_step(use_regex: bool) -> dict[str, Any]:
    """The step that spells bytes in GPT-2's alphabet, after GPT-2's own split into words where `use_regex`."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _byte_alphabet() -> list[str]:
    """GPT-2's character for each byte: printable ones of Latin-1 are themselves, the others U+0100 and up, in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(0x100 + others.index(byte)) for byte in range(256)]


def _last_field(message: bytes) -> int:
    """The number of a protobuf message's last field, where all its fields are length-delimited."""
    field = 0
    position = 0
    while length := _VARINT.match(message, position + 1):
        field = message[position] >> 3
        n_bytes = sum((byte & 127) << 7 * i for i, byte in enumerate(length[0]))
        position = length.end() + n_bytes
    return field
