"""The vocabularies against transformers and tiktoken; files and ids that are not as they should be."""

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpost.errors import UserError
from minidpost.text.templates import T5Template
from minidpost.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def t5(shared):
    return load_tokenizer(shared / "tokenizers" / "t5")


@pytest.fixture(scope="module")
def llama2(shared):
    return load_tokenizer(shared / "tokenizers" / "llama2")


@pytest.fixture(scope="module")
def llama3(shared):
    return load_tokenizer(shared / "tokenizers" / "llama3")


@pytest.fixture(scope="module", params=["t5", "llama2", "llama3"])
def each(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["llama2", "llama3"])
def llama(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def gsm8k(shared):
    """Every question and rationale of train and test."""
    lines = chain.from_iterable((shared / "data" / "gsm8k" / f"{split}.jsonl").open() for split in ("train", "test"))
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 8792
    return [text for row in rows for text in (row["question"], row["answer"])]


@pytest.fixture(scope="module")
def transformers_llama3(shared):
    """transformers' reader of Llama-3's tokenizer.model, with its 256 special tokens."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    path = str(shared / "tokenizers" / "llama3" / "tokenizer.model")
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(254))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", "")  # tiktoken would keep a copy of the file by its path
        backend = TikTokenConverter(path, extra_special_tokens=names).converted()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=names[0], eos_token=names[1])


def test_special_ids_and_size(t5, llama2, llama3, shared):
    assert (t5.pad_id, t5.eos_id, t5.bos_id, t5.unk_id, t5.vocab_size) == (0, 1, None, 2, 32_000)
    assert (llama2.pad_id, llama2.eos_id, llama2.bos_id, llama2.unk_id, llama2.vocab_size) == (None, 2, 1, 0, 32_000)
    assert (llama3.pad_id, llama3.eos_id, llama3.bos_id, llama3.unk_id) == (None, 128_001, 128_000, None)
    assert llama3.vocab_size == 128_256
    assert t5.files == [shared / "tokenizers" / "t5" / "spiece.model"]
    assert llama3.files == [shared / "tokenizers" / "llama3" / "tokenizer.model"]


def different(tokenizer, texts, expected):
    return [text for text, ids in zip(texts, expected, strict=True) if tokenizer.encode(text) != ids]


def test_t5_ids_equal_transformers_on_all_of_gsm8k(t5, shared, gsm8k):
    oracle = transformers_tokenizer(shared / "tokenizers" / "t5" / "spiece.model", t5)
    texts = [T5Template(t5).target(text) if "####" in text else text for text in gsm8k]
    assert different(t5, texts, oracle(texts, add_special_tokens=False)["input_ids"]) == []


def test_llama2_ids_equal_transformers_on_all_of_gsm8k(llama2, gsm8k):
    """transformers 5 no longer reads tokenizer.model without protobuf, so its tokenizer is given the pieces.

    Its `legacy` behaviour differs only after special tokens that stand in a text, and there are none.
    """
    from transformers import LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    pieces = {llama2._model.id_to_piece(i): i for i in range(llama2.vocab_size)}
    scores = {piece: llama2._model.get_score(i) for piece, i in pieces.items()}
    oracle = LlamaTokenizer(vocab=pieces, merges=generate_merges(pieces, scores), add_bos_token=True)
    expected = oracle(gsm8k)["input_ids"]
    assert {ids[0] for ids in expected} == {llama2.bos_id} and oracle.eos_token_id == llama2.eos_id
    assert different(llama2, gsm8k, [ids[1:] for ids in expected]) == []
    assert [text for text, ids in zip(gsm8k, expected, strict=True) if llama2.decode([*ids, 2]) != text] == []


def test_llama3_ids_equal_transformers_on_all_of_gsm8k(llama3, transformers_llama3, gsm8k):
    assert transformers_llama3.bos_token_id == llama3.bos_id and transformers_llama3.eos_token_id == llama3.eos_id
    assert len(transformers_llama3) == llama3.vocab_size
    assert different(llama3, gsm8k, transformers_llama3(gsm8k)["input_ids"]) == []


def test_llama3_ids_equal_tiktoken_on_all_of_gsm8k(llama3, shared, gsm8k, monkeypatch):
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    ranks = load_tiktoken_bpe(str(shared / "tokenizers" / "llama3" / "tokenizer.model"))
    pattern = (  # as Meta's own code has it
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    specials = {"<|begin_of_text|>": len(ranks), "<|end_of_text|>": len(ranks) + 1}
    oracle = tiktoken.Encoding("oracle", pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials)
    assert different(llama3, gsm8k, oracle.encode_batch(gsm8k, num_threads=1)) == []
    assert [text for text in gsm8k if llama3.decode([128_000, *llama3.encode(text), 128_001]) != text] == []


def test_llama3_is_read_from_tokenizer_json_too(llama3, transformers_llama3, gsm8k, tmp_path):
    transformers_llama3.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert found.files == [tmp_path / "tokenizer.json"]
    assert (found.vocab_size, found.bos_id, found.eos_id) == (llama3.vocab_size, llama3.bos_id, llama3.eos_id)
    assert found.token_texts == llama3.token_texts
    assert different(found, gsm8k, map(llama3.encode, gsm8k)) == []


def test_llama3_may_lie_under_original(llama3, shared, tmp_path):
    (tmp_path / "original").mkdir()
    path = shutil.copy(shared / "tokenizers" / "llama3" / "tokenizer.model", tmp_path / "original")
    found = load_tokenizer(tmp_path)
    assert found.files == [Path(path)]
    assert found.encode("18 clips") == llama3.encode("18 clips")


SPECIALS = ["<s>", "</s>", "<unk>", "<0x0A>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<pad>"]


@pytest.mark.parametrize("name", SPECIALS)
def test_names_of_special_tokens_are_ordinary_text(llama, name):
    ids = llama.encode(f"a {name}\n{name}")
    assert not {llama.bos_id, llama.eos_id, llama.unk_id} & {*ids} and max(ids) < 128_000
    assert llama.decode(ids) == f"a {name}\n{name}"


fragments = st.sampled_from([*" \n\t0123456789=<>()-.aeé猫🦜\u0301\x00", "<s>", "Janet", " clips"])


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(st.lists(fragments, max_size=16).map("".join))
def test_llamas_write_every_text_and_continue_every_text(llama, text):
    assert llama.decode(llama.encode(text)) == text
    assert llama.decode(llama.encode("Janet\n") + llama.encode(text, continued=True)) == "Janet\n" + text
    if text.isascii():
        assert "".join(llama.token_texts[i] for i in llama.encode(text, continued=True)) == text


def test_continued_ids_are_those_after_a_line_break(llama, gsm8k):
    for text in gsm8k[:1000]:
        first_line, *_ = text.split("\n")
        whole = llama.encode(f"Janet’s\n{first_line}")
        assert whole == llama.encode("Janet’s\n") + llama.encode(first_line, continued=True)


def test_only_sentencepiece_puts_a_space_in_front(llama2, llama3):
    assert llama2.token_texts[llama2.encode("24>>")[0]] == " "
    assert [llama2.token_texts[i] for i in llama2.encode("24>>", continued=True)] == ["2", "4", ">>"]
    assert [llama2.token_texts[i] for i in llama2.encode(" 24", continued=True)] == [" ", "2", "4"]
    assert [llama3.token_texts[i] for i in llama3.encode("24>>", continued=True)] == ["24", ">>"]
    assert llama3.encode("24>>") == llama3.encode("24>>", continued=True)


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


def test_decode_never_raises(each):
    ids = each.encode("18 clips")
    assert each.decode([each.eos_id, *ids, each.vocab_size - 1 + 128, 10**12, -1]) == "18 clips"
    assert each.decode(range(-5, 1000)) != ""
    assert len(each.token_texts) == each.vocab_size


def test_byte_pieces_are_ascii_or_the_replacement_character(llama2):
    newline, *character = llama2.encode("\n")[-1:] + llama2.encode("⁁")[-3:]
    assert llama2.token_texts[newline] == "\n"
    assert [llama2.token_texts[i] for i in character] == ["\ufffd"] * 3
    assert llama2.decode(character) == "⁁"
    assert llama2.decode(character[:1]) == "\ufffd"


def test_parts_of_characters_are_the_replacement_character(llama3):
    ids = llama3.encode("🦜")
    assert len(ids) > 1
    assert {character for i in ids for character in llama3.token_texts[i]} == {"\ufffd"}
    assert llama3.decode(ids) == "🦜"
    assert llama3.decode(ids[:1]) == "\ufffd"
    assert llama3.token_texts[128_000:] == [""] * 256


@pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model"])
@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_a_broken_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not a SentencePiece model") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("t5", [300_000, 554_093]),  # the latter after a whole part: only the rules for spaces are missing
        ("llama2", [300_000, 499_703]),
        ("llama3", [300_000, -5, -14]),  # the last after a whole line
    ],
)
def test_a_truncated_file_is_named(tmp_path, shared, name, ends):
    file = "spiece.model" if name == "t5" else "tokenizer.model"
    content = (shared / "tokenizers" / name / file).read_bytes()
    for end in ends:
        (tmp_path / file).write_bytes(content[:end])
        with pytest.raises(UserError, match=rf"{file}: not .* broken"):
            load_tokenizer(tmp_path)


def test_a_line_of_llama3_that_is_none_is_refused(tmp_path, llama3):
    first, second, rest = llama3.files[0].read_bytes().split(b"\n", 2)
    assert (first, second) == (b"IQ== 0", b"Ig== 1")
    for broken in (b"Ig== 2", b"I?== 1", b"Ig== 1 1", b"", b"Ig== one", b"IQ== 1", b"IiI= 1"):
        (tmp_path / "tokenizer.model").write_bytes(b"\n".join([first, broken, rest]))
        with pytest.raises(UserError, match=r"tokenizer\.model: not .*broken"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_json_of_another_kind_is_refused(tmp_path, transformers_llama3):
    path = tmp_path / "tokenizer.json"
    whole = transformers_llama3.backend_tokenizer.to_str()
    model = json.loads(whole)
    split = model["pre_tokenizer"]["pretokenizers"][0]
    others = [
        whole[: len(whole) // 2],
        "[]",
        "{}",
        '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}',
        json.dumps(model | {"normalizer": {"type": "NFC"}}),
        json.dumps(model | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split | {"invert": True}] * 2}}),
        json.dumps(model | {"added_tokens": model["added_tokens"][:1]}),
        json.dumps(model | {"added_tokens": model["added_tokens"][1:]}),
        json.dumps(model | {"model": model["model"] | {"ignore_merges": False}}),
        json.dumps(model | {"model": model["model"] | {"merges": model["model"]["merges"][::-1]}}),
        json.dumps(model | {"model": model["model"] | {"vocab": model["model"]["vocab"] | {"!!?!": 128_000}}}),
    ]
    for content in others:
        path.write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json: not Llama-3's byte-level BPE.*is needed") as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)
    path.write_text(whole)
    assert load_tokenizer(tmp_path).vocab_size == 128_256


@pytest.mark.parametrize("text", ["▁", "<pad>", "<unk>"])
def test_a_piece_that_is_no_utf8_is_noticed_at_once(tmp_path, text):
    content = (ROOT / "weights" / "tiny-t5" / "spiece.model").read_bytes()
    assert text.encode() in content
    (tmp_path / "spiece.model").write_bytes(content.replace(text.encode(), b"\xff" * len(text.encode()), 1))
    with pytest.raises(UserError, match=r"spiece\.model: not a SentencePiece model"):
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


def protobuf_field(message: bytes, field_number: int) -> bytes:
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
            if key >> 3 == field_number:
                return message[position : position + length]
            position += length
        elif key & 7 == 0:
            varint()
        else:
            position += 4 if key & 7 == 5 else 8
    raise AssertionError(f"no field {field_number}")
