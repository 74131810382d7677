"""The T5 vocabulary against transformers, and what happens to files and ids that are not as they should be."""

import json
from itertools import chain
from pathlib import Path

import pytest

from minidpost.files import UserError
from minidpost.formats import T5Format
from minidpost.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def t5(shared):
    return load_tokenizer(shared / "tokenizers" / "t5")


def test_special_ids_and_size(t5, shared):
    assert (t5.pad_id, t5.eos_id, t5.bos_id, t5.unk_id, t5.vocab_size) == (0, 1, None, 2, 32000)
    assert t5.files == [shared / "tokenizers" / "t5" / "spiece.model"]


def test_ids_equal_those_of_transformers_on_all_of_gsm8k(t5, shared):
    oracle = transformers_tokenizer(shared / "tokenizers" / "t5" / "spiece.model", t5)
    t5_format = T5Format(t5)
    lines = chain.from_iterable((shared / "data" / "gsm8k" / f"{split}.jsonl").open() for split in ("train", "test"))
    rows = [json.loads(line) for line in lines]
    texts = [row["question"] for row in rows] + [t5_format.target(row["answer"]) for row in rows]
    assert len(texts) == 2 * 8792
    expected = oracle(texts, add_special_tokens=False)["input_ids"]
    assert [text for text, ids in zip(texts, expected, strict=True) if t5.encode(text) != ids] == []


def test_decode_skips_special_and_unknown_ids_and_never_raises(t5):
    ids = t5.encode("18 clips")
    assert t5.decode([0, *ids, 1, 0, 0]) == "18 clips"
    assert t5.decode([*ids, 32000, 32127, 10**9, -100]) == "18 clips"
    assert t5.decode([]) == ""
    assert t5.decode(t5.encode("a { b")) != "a { b"


def test_token_texts_say_what_each_id_adds(t5):
    assert len(t5.token_texts) == t5.vocab_size
    assert [t5.token_texts[i] for i in (0, 1, 2)] == ["", "", "\ufffd"]
    text = "[ 48 / 2 = 24] 24 clips. #### 72"
    assert "".join(t5.token_texts[i] for i in t5.encode(text)) == " " + text


def test_byte_pieces_are_their_ascii_character_or_the_replacement_character(shared):
    llama = load_tokenizer(shared / "tokenizers" / "llama2")
    assert (llama.pad_id, llama.eos_id, llama.bos_id, llama.unk_id) == (None, 2, 1, 0)
    newline, *euro = llama.encode("\n")[-1:] + llama.encode("⁁")[-3:]
    assert llama.token_texts[newline] == "\n"
    assert [llama.token_texts[i] for i in euro] == ["\ufffd"] * 3
    assert llama.decode(euro) == "⁁"
    assert llama.decode(euro[:1]) == "\ufffd"


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_a_broken_file_is_named(tmp_path, content):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match=r"spiece\.model: not a SentencePiece model") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["▁", "<pad>", "<unk>"])
def test_a_piece_that_is_no_utf8_is_noticed_at_once(tmp_path, text):
    content = (ROOT / "weights" / "tiny-t5" / "spiece.model").read_bytes()
    assert text.encode() in content
    (tmp_path / "spiece.model").write_bytes(content.replace(text.encode(), b"\xff" * len(text.encode()), 1))
    with pytest.raises(UserError, match=r"spiece\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_truncated_file_is_named(tmp_path, shared):
    content = (shared / "tokenizers" / "t5" / "spiece.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer here, spiece\.model or tokenizer\.model is needed"):
        load_tokenizer(tmp_path)


def transformers_tokenizer(path: Path, tokenizer):
    """transformers' T5Tokenizer, built from the pieces because its own reader of `spiece.model` wants protobuf."""
    from transformers import T5Tokenizer

    model = tokenizer._model
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(tokenizer.vocab_size)]
    normalizer_spec = protobuf_field(path.read_bytes(), 3)
    charsmap = protobuf_field(normalizer_spec, 2)
    return T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=charsmap)


def protobuf_field(message: bytes, number: int) -> bytes:
    """The first length-delimited field of this number in a protobuf message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        key = varint()
        if key & 7 == 2:
            length = varint()
            if key >> 3 == number:
                return message[position : position + length]
            position += length
        elif key & 7 == 0:
            varint()
        else:
            position += 4 if key & 7 == 5 else 8
    raise AssertionError(f"no field {number}")
