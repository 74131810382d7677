"""The vocabulary in a GGUF file's metadata as tokenizer.json and tokenizer_config.json.

Two kinds are read, as `tokenizer.ggml.model` names them: byte-level BPE (gpt2), whose merges the file lists, and the
vocabularies of SentencePiece's BPE (llama: Llama-2, TinyLlama, Mistral), which have a score for each piece instead. The
content is that of published files, so that ids are those of the original tokenizer.

Departures from llama.cpp: a SentencePiece vocabulary without scores, of which its converter makes equal ones, joins
pieces in the order of their ids, which is how it was trained; of the tokens that end a text whatever the file says,
those alone that the file calls control tokens.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

from minidpost.models.hf_config import read_bool, read_int, read_text
from minidpost.text.tokenizer import LLAMA3_DIGITS, byte_level_step, split_step

# -- the vocabulary ----------------------------------------------------------------------------------------------------

MAX_TOKENS = 2**20  # as hf_config.py has it
BYTE_LEVEL, SENTENCEPIECE = "gpt2", "llama"  # what tokenizer.ggml.model calls the kinds of vocabularies
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = KINDS = range(1, 7)  # of tokens
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # Hugging Face's name: GGUF's
END_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a file and what kind each is of, by id.

    `model` is BYTE_LEVEL or SENTENCEPIECE; `named_ids` has those of ROLES that the file names, `eos_ids` all that end a
    text, the file's own first.
    """

    model: str
    tokens: list[str]
    kinds: list[int]
    named_ids: dict[str, int]
    eos_ids: list[int]


def read_vocabulary(metadata: dict[str, Any]) -> Vocabulary:
    """What the metadata say of tokens; KeyError, ValueError: nothing, another kind of vocabulary, or a broken one."""
    # 1) The tokens.
    model = metadata["tokenizer.ggml.model"]
    if model not in (BYTE_LEVEL, SENTENCEPIECE):
        raise ValueError(
            f"tokenizer.ggml.model {model!r:.80} is not known, only byte-level BPE ({BYTE_LEVEL}) and SentencePiece's "
            f"({SENTENCEPIECE}); take the original model, of safetensors and with its own tokenizer file"
        )
    tokens: list[str] = _array(metadata, "tokenizer.ggml.tokens", str)
    if not 2 <= len(tokens) <= MAX_TOKENS:
        raise ValueError(f"tokenizer.ggml.tokens has {len(tokens):,} items, 2 to {MAX_TOKENS:,} are expected")
    token, count = Counter(tokens).most_common(1)[0]
    if count > 1 or "" in tokens:
        raise ValueError(f"tokenizer.ggml.tokens has {token!r:.80} twice, or an empty token")
    kinds: list[int] = _array(metadata, "tokenizer.ggml.token_type", int, len(tokens))
    unknown_kinds = {*kinds} - {*KINDS}
    if unknown_kinds:
        raise ValueError(f"tokenizer.ggml.token_type has {min(unknown_kinds)}, 1 to {len(KINDS)} are expected")

    # 2) Those that have a role. A SentencePiece vocabulary knows its unknown token by its kind, too.
    last_id = len(tokens) - 1
    named_ids = {
        role: read_int(metadata, f"tokenizer.ggml.{theirs}_token_id", 0, last_id)
        for role, theirs in ROLES.items()
        if f"tokenizer.ggml.{theirs}_token_id" in metadata
    }
    if model == SENTENCEPIECE and UNKNOWN in kinds:
        named_ids.setdefault("unk", kinds.index(UNKNOWN))

    # 3) What ends a text: EOS, where chats have another one the end of a turn, and what llama.cpp knows by name. An
    # instruct model's file may name the end of its turns alone, and yet the model may end a text as its base model did.
    eos_ids = [read_int(metadata, "tokenizer.ggml.eos_token_id", 0, last_id)]
    if "tokenizer.ggml.eot_token_id" in metadata:
        eos_ids.append(read_int(metadata, "tokenizer.ggml.eot_token_id", 0, last_id))
    control_ids = {tokens[token_id]: token_id for token_id, kind in enumerate(kinds) if kind == CONTROL}
    eos_ids += [control_ids[name] for name in END_TOKENS if name in control_ids]
    return Vocabulary(model, tokens, kinds, named_ids, [*dict.fromkeys(eos_ids)])


def _array(metadata: dict[str, Any], key: str, kind: type, n_tokens: int | None = None) -> list[Any]:
    """A list whose items are all of one type, one for each token where it is said how many there are.

    KeyError, ValueError: there is none, or it is none.
    """
    items = metadata[key]
    if not isinstance(items, list) or any(type(item) is not kind for item in items):
        raise ValueError(f"{key} is no list of {kind.__name__}")
    if n_tokens is not None and len(items) != n_tokens:
        raise ValueError(f"{key} has {len(items):,} items for {n_tokens:,} tokens")
    return items


# -- tokenizer.json ----------------------------------------------------------------------------------------------------


def tokenizer_from(metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of tokenizer.json and of tokenizer_config.json.

    KeyError: metadata that is missing. ValueError: a vocabulary that is broken, or whose split into words is not known.
    """
    # 1) The vocabulary, and which of its tokens are no pieces of words.
    vocabulary = read_vocabulary(metadata)
    tokens, kinds, named_ids = vocabulary.tokens, vocabulary.kinds, vocabulary.named_ids
    control_ids = {*named_ids.values(), *vocabulary.eos_ids}
    control_ids |= {token_id for token_id, kind in enumerate(kinds) if kind == CONTROL}
    added_ids = control_ids | {token_id for token_id, kind in enumerate(kinds) if kind == USER_DEFINED}

    # 2) As in published files: added tokens behind the pieces are only listed as added, the others are pieces too, so
    # that every token has its id; unused ids at the end, which fill an embedding up to a round number, are left out.
    n_used = 1 + max(token_id for token_id, kind in enumerate(kinds) if kind != UNUSED or token_id in added_ids)
    n_pieces = 1 + max((token_id for token_id in range(n_used) if token_id not in added_ids), default=-1)
    id_of = {token: token_id for token_id, token in enumerate(tokens[:n_pieces])}
    if vocabulary.model == BYTE_LEVEL:
        steps, adds_bos = _byte_level_steps(metadata, id_of)
    else:
        joined = {token: n for token, n in id_of.items() if kinds[n] == NORMAL and n not in added_ids}
        steps, adds_bos = _sentencepiece_steps(metadata, vocabulary, id_of, joined)

    # 3) The two files.
    adds_bos = read_bool(metadata, "tokenizer.ggml.add_bos_token", adds_bos)
    adds_eos = read_bool(metadata, "tokenizer.ggml.add_eos_token", False)
    if adds_bos and "bos" not in named_ids:
        raise KeyError("tokenizer.ggml.bos_token_id")
    framing = {role: named_ids[role] for role, is_added in (("bos", adds_bos), ("eos", adds_eos)) if is_added}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": tokens[token_id],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": token_id in control_ids,
            }
            for token_id in sorted(added_ids)
        ],
        "normalizer": steps.normalizer,
        "pre_tokenizer": steps.pre_tokenizer,
        "post_processor": _framing_step(tokens, framing) if framing else None,
        "decoder": steps.decoder,
        "model": steps.model,
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        **{f"{role}_token": tokens[token_id] for role, token_id in named_ids.items()},
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        settings["chat_template"] = template
    return tokenizer, settings


def _framing_step(tokens: list[str], framing: dict[str, int]) -> dict[str, Any]:
    """The post-processor that puts `bos` in front of every text and `eos` behind it, those that are there."""
    step = {role: [{"SpecialToken": {"id": tokens[token_id], "type_id": 0}}] for role, token_id in framing.items()}
    first, second = (
        [*step.get("bos", []), {"Sequence": {"id": name, "type_id": 0}}, *step.get("eos", [])] for name in ("A", "B")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *second],
        "special_tokens": {
            tokens[token_id]: {"id": tokens[token_id], "ids": [token_id], "tokens": [tokens[token_id]]}
            for token_id in framing.values()
        },
    }


@dataclass(frozen=True)
class Steps:
    """From a text to ids and back, as tokenizer.json has it."""

    normalizer: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    model: dict[str, Any]
    decoder: dict[str, Any]


def _bpe_model(
    id_of: dict[str, int],
    merges: list[list[str]],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    unk_token: str | None = None,
) -> dict[str, Any]:
    """The model of a tokenizer.json: pieces, and which two join, the first of them first."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": id_of,
        "merges": merges,
    }


# -- byte-level BPE ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreTokenizer:
    """How a byte-level BPE vocabulary splits text into words: what tokenizer.json says about it.

    `ignore_merges`: a word that is a piece is taken whole, whatever the merges are. `adds_bos`: where the metadata do
    not say, whether a text begins with the BOS id.
    """

    steps: list[dict[str, Any]]
    normalizer: dict[str, str] | None = None
    ignore_merges: bool = False
    adds_bos: bool = False


PRE_TOKENIZERS = {  # by tokenizer.ggml.pre; what the published tokenizer.json of these models has
    "smollm": PreTokenizer([{"type": "Digits", "individual_digits": True}, byte_level_step(use_regex=True)]),
    "llama-bpe": PreTokenizer(
        [split_step(LLAMA3_DIGITS), byte_level_step(use_regex=False)], ignore_merges=True, adds_bos=True
    ),
    "qwen2": PreTokenizer([split_step(r"\p{N}"), byte_level_step(use_regex=False)], normalizer={"type": "NFC"}),
}


def _byte_level_steps(metadata: dict[str, Any], id_of: dict[str, int]) -> tuple[Steps, bool]:
    """The steps of a byte-level BPE vocabulary, and whether a text begins with BOS where the metadata do not say."""
    name = read_text(metadata, "tokenizer.ggml.pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"tokenizer.ggml.pre {name!r:.80} is not known; known: {', '.join(PRE_TOKENIZERS)}")
    pre_tokenizer = PRE_TOKENIZERS[name]
    merges = []
    for merge in _array(metadata, "tokenizer.ggml.merges", str):
        parts = merge.split(" ")
        if len(parts) != 2 or not id_of.keys() >= {*parts, "".join(parts)}:
            raise ValueError(f"tokenizer.ggml.merges has {merge!r:.80}, which does not join two tokens to a third")
        merges.append(parts)
    steps = Steps(
        normalizer=pre_tokenizer.normalizer,
        pre_tokenizer={"type": "Sequence", "pretokenizers": pre_tokenizer.steps},
        model=_bpe_model(id_of, merges, ignore_merges=pre_tokenizer.ignore_merges),
        decoder=byte_level_step(use_regex=True),
    )
    return steps, pre_tokenizer.adds_bos


# -- SentencePiece -----------------------------------------------------------------------------------------------------

SPACE = "▁"
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


def _sentencepiece_steps(
    metadata: dict[str, Any], vocabulary: Vocabulary, id_of: dict[str, int], joined: dict[str, int]
) -> tuple[Steps, bool]:
    """The steps of a SentencePiece vocabulary, and whether a text begins with BOS where the metadata do not say.

    `joined` are the pieces that others join to. The whole text is one word, with ▁ for each space and one in front;
    what no piece spells is written in bytes.
    """
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name != "default":
        raise ValueError(f"tokenizer.ggml.pre {name!r:.80} is not known for SentencePiece; known: default")
    scores = _array(metadata, "tokenizer.ggml.scores", float, len(vocabulary.tokens))
    if not all(map(math.isfinite, scores)):
        raise ValueError("tokenizer.ggml.scores holds NaN or infinity; it is broken")
    for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True):
        if kind == BYTE and token not in BYTE_TOKENS:
            raise ValueError(f"tokenizer.ggml.tokens has {token!r:.80} for a byte, {BYTE_TOKENS[65]} would be one")
    unk_id = vocabulary.named_ids.get("unk")
    if unk_id is None and not id_of.keys() >= {*BYTE_TOKENS}:
        raise ValueError("tokenizer.ggml.tokens has neither all 256 bytes nor an unknown token")

    merges = sentencepiece_merges(joined, {token: scores[n] for token, n in joined.items()})
    unk_token = None if unk_id is None else vocabulary.tokens[unk_id]
    in_front: list[dict[str, Any]] = []
    off_again: list[dict[str, Any]] = []
    if read_bool(metadata, "tokenizer.ggml.add_space_prefix", True):
        in_front = [{"type": "Prepend", "prepend": SPACE}]
        off_again = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    to_piece, to_text = (
        {"type": "Replace", "pattern": {"String": before}, "content": after}
        for before, after in ((" ", SPACE), (SPACE, " "))
    )
    from_bytes = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    steps = Steps(
        normalizer={"type": "Sequence", "normalizers": [*in_front, to_piece]},
        pre_tokenizer=None,
        model=_bpe_model(id_of, merges, byte_fallback=True, unk_token=unk_token),
        decoder={"type": "Sequence", "decoders": [to_text, *from_bytes, *off_again]},
    )
    return steps, True


def sentencepiece_merges(id_of: dict[str, int], scores: dict[str, float]) -> list[list[str]]:
    """Every pair of pieces that makes a piece, in the order in which SentencePiece joins them.

    Of all neighbours in a text it joins those whose whole has the highest score, of equal ones the leftmost. Pairs have
    one order here wherever they stand, and of equal ones those with the longest left part go first: so a run of spaces,
    pieces which Llama-2 gives one score, grows from its left end.

    Converters that know no scores write one for all pieces. These are in the order in which they were learned, which is
    that of the scores, but for runs of spaces, which come last.
    """
    if len({*scores.values()}) == 1:
        scores = {piece: -math.inf if not piece.strip(SPACE) else -n for piece, n in id_of.items()}
    pairs = []
    for piece, score in scores.items():
        for n in range(1, len(piece)):
            left, right = piece[:n], piece[n:]
            if left in scores and right in scores:
                pairs.append((-score, -len(left), -len(right), id_of[piece], left, right))
    return [[left, right] for *_, left, right in sorted(pairs)]
