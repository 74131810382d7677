"""The vocabularies against transformers and BPE by ranks; what begins and ends a text; files that are broken."""

import json
import random
import shutil
import unicodedata
from itertools import chain, pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_oracle import llama2_of_transformers, llama3_of_transformers, ranks_of_llama3

from minidpost.errors import UserError
from minidpost.models.weights import tokenizer_files
from minidpost.text.templates import T5Template, template_for
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


@pytest.fixture(scope="module")
def smollm2(shared):
    return load_tokenizer(shared / "tokenizers" / "smollm2")


@pytest.fixture(scope="module")
def qwen3(shared):
    return load_tokenizer(shared / "tokenizers" / "qwen3")


@pytest.fixture(scope="module", params=["t5", "llama2", "llama3", "smollm2", "qwen3"])
def each(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["llama2", "llama3", "smollm2", "qwen3"])
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
    return llama3_of_transformers(shared / "tokenizers" / "llama3" / "tokenizer.model")


def test_special_ids_and_size(t5, llama2, llama3, shared):
    assert (t5.pad_id, t5.eos_id, t5.bos_id, t5.unk_id, t5.vocab_size) == (0, 1, None, 2, 32_000)
    assert (llama2.pad_id, llama2.eos_id, llama2.bos_id, llama2.unk_id, llama2.vocab_size) == (None, 2, 1, 0, 32_000)
    assert (llama3.pad_id, llama3.eos_id, llama3.bos_id, llama3.unk_id) == (None, 128_001, 128_000, None)
    assert llama3.vocab_size == 128_256
    assert (llama3.special_ids["<|eot_id|>"], llama3.special_ids["<|end_header_id|>"]) == (128_009, 128_007)
    assert t5.files == [shared / "tokenizers" / "t5" / "spiece.model"]
    assert llama3.files == [shared / "tokenizers" / "llama3" / "tokenizer.model"]


def test_smollm2_and_qwen3_begin_with_nothing(smollm2, qwen3):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.unk_id, smollm2.vocab_size) == (None, 0, None, 49_152)
    assert (qwen3.bos_id, qwen3.eos_id, qwen3.pad_id, qwen3.vocab_size) == (None, 151_645, 151_643, 151_669)
    assert smollm2.special_ids["<|im_start|>"] == 1 and qwen3.special_ids["<|im_start|>"] == 151_644


def different(tokenizer, texts, expected):
    return [text for text, ids in zip(texts, expected, strict=True) if tokenizer.encode(text) != ids]


@pytest.mark.slow
def test_t5_ids_equal_transformers_on_all_of_gsm8k(t5, shared, gsm8k):
    oracle = transformers_tokenizer(shared / "tokenizers" / "t5" / "spiece.model", t5)
    texts = [T5Template(t5).target(text) if "####" in text else text for text in gsm8k]
    assert different(t5, texts, oracle(texts, add_special_tokens=False)["input_ids"]) == []


def test_llama2_ids_equal_transformers_on_all_of_gsm8k(llama2, llama2_oracle, gsm8k):
    """transformers 5 no longer reads tokenizer.model without protobuf, so its tokenizer is given the pieces.

    Its `legacy` behaviour differs only after special tokens that stand in a text, and there are none.
    """
    expected = llama2_oracle(gsm8k)["input_ids"]
    assert {ids[0] for ids in expected} == {llama2.bos_id} and llama2_oracle.eos_token_id == llama2.eos_id
    assert different(llama2, gsm8k, [ids[1:] for ids in expected]) == []
    assert [text for text, ids in zip(gsm8k, expected, strict=True) if llama2.decode([*ids, 2]) != text] == []


@pytest.mark.slow
def test_llama3_ids_equal_transformers_on_all_of_gsm8k(llama3, transformers_llama3, gsm8k):
    assert transformers_llama3.bos_token_id == llama3.bos_id and transformers_llama3.eos_token_id == llama3.eos_id
    assert len(transformers_llama3) == llama3.vocab_size
    assert different(llama3, gsm8k, transformers_llama3(gsm8k)["input_ids"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "qwen3"])
def test_ids_of_a_tokenizer_json_equal_transformers_on_all_of_gsm8k(name, request, shared, gsm8k):
    from transformers import AutoTokenizer

    ours = request.getfixturevalue(name)
    theirs = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    expected = theirs(gsm8k)["input_ids"]  # with special tokens: it adds none
    assert different(ours, gsm8k, expected) == []
    assert [text for text, ids in zip(gsm8k, expected, strict=True) if ours.decode([*ids, ours.eos_id]) != text] == []


def rank_bpe(word, ranks):
    """The pieces of a word in bytes: of all neighbours that make a piece, the first of lowest rank merge."""
    pieces = [word[i : i + 1] for i in range(len(word))]
    if word in ranks:
        return [ranks[word]]
    while True:
        merged = [ranks.get(left + right, len(ranks)) for left, right in pairwise(pieces)]
        if not merged or min(merged) == len(ranks):
            return [ranks[piece] for piece in pieces]
        i = merged.index(min(merged))
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


@pytest.mark.slow
def test_llama3_ids_equal_bpe_by_ranks_on_all_of_gsm8k(llama3, shared, gsm8k):
    import regex

    pattern = regex.compile(  # as Meta's own code has it
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    ranks = ranks_of_llama3(shared / "tokenizers" / "llama3" / "tokenizer.model")
    words = {word for text in gsm8k for word in pattern.findall(text)}
    ids_of = {word: rank_bpe(word.encode(), ranks) for word in words}
    expected = [[i for word in pattern.findall(text) for i in ids_of[word]] for text in gsm8k]
    assert different(llama3, gsm8k, expected) == []
    assert [text for text in gsm8k if llama3.decode([128_000, *llama3.encode(text), 128_001]) != text] == []


@pytest.mark.slow
def test_llama3_is_read_from_tokenizer_json_too(llama3, transformers_llama3, gsm8k, tmp_path):
    content = json.loads(transformers_llama3.backend_tokenizer.to_str())
    content["post_processor"] = {
        "type": "Sequence",
        "processors": [
            content["post_processor"],
            {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
                "pair": [],
                "special_tokens": {"<|begin_of_text|>": {"id": "<|begin_of_text|>", "ids": [128_000]}},
            },
        ],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = load_tokenizer(tmp_path)
    assert found.files == [tmp_path / "tokenizer.json"]
    assert (found.vocab_size, found.bos_id, found.eos_id) == (llama3.vocab_size, llama3.bos_id, llama3.eos_id)
    assert found.token_texts == llama3.token_texts
    assert different(found, gsm8k, map(llama3.encode, gsm8k)) == []


@pytest.fixture(scope="module")
def llama2_oracle(llama2):
    return llama2_of_transformers(llama2)


def test_llama2_from_tokenizer_json_equals_its_sentencepiece_model(llama2, llama2_oracle, gsm8k, tmp_path):
    """Spaces in front, bytes of unknown characters, what continues a text, names of special tokens."""
    llama2_oracle.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.unk_id, found.vocab_size) == (1, 2, None, 32_000)  # bytes, no unknown
    assert found.token_texts == ["", *llama2.token_texts[1:]]
    texts = [*gsm8k[:4000], *SPECIALS, "a</s> <s>b", "猫🦜 \t½", "two  spaces ", "\n\n", ""]
    for text in texts:
        assert found.encode(text, continued=True) == llama2.encode(text, continued=True)
        assert found.encode(text) == llama2.encode(text)
        assert found.decode([1, *found.encode(text), 2]) == llama2.decode(llama2.encode(text)) == text
    templates = [template_for("llama", found), template_for("llama", llama2)]
    for question, rationale in zip(gsm8k[:2000:2], gsm8k[1:2000:2], strict=True):
        assert templates[0].prompt_ids(question) == templates[1].prompt_ids(question)
        assert templates[0].target_ids(rationale) == templates[1].target_ids(rationale)


@pytest.mark.slow
def test_t5_from_tokenizer_json_equals_its_sentencepiece_model(t5, shared, gsm8k, tmp_path):
    oracle = transformers_tokenizer(shared / "tokenizers" / "t5" / "spiece.model", t5)
    oracle.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.unk_id) == (None, 1, 2)
    assert found.token_texts[: t5.vocab_size] == t5.token_texts
    ours, theirs = T5Template(found), T5Template(t5)
    texts = [*gsm8k[:4000], "a</s> <pad>b", "<extra_id_0> {x}", ""]
    for text in texts:
        assert ours.target_ids(text) == theirs.target_ids(text)
        assert ours.prompt_ids(text) == theirs.prompt_ids(text)
        assert ours.decode(ours.target_ids(text)) == theirs.decode(theirs.target_ids(text))


def test_llama3_may_lie_under_original(llama3, shared, tmp_path):
    (tmp_path / "original").mkdir()
    path = shutil.copy(shared / "tokenizers" / "llama3" / "tokenizer.model", tmp_path / "original")
    found = load_tokenizer(tmp_path)
    assert found.files == [Path(path)]
    assert found.encode("18 clips") == llama3.encode("18 clips")


SPECIALS = ["<s>", "</s>", "<unk>", "<0x0A>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<pad>"]
SPECIALS += ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "<repo_name>"]


@pytest.mark.parametrize("name", SPECIALS)
def test_names_of_special_tokens_are_ordinary_text(llama, name):
    ids = llama.encode(f"a {name}\n{name}")
    assert not {llama.bos_id, llama.eos_id, llama.unk_id, *llama.special_ids.values()} & {*ids}
    assert llama.decode(ids) == f"a {name}\n{name}"


fragments = st.sampled_from([*" \n\t0123456789=<>()-.aeé猫🦜\u0301\x00", "<s>", "<|im_end|>", "Janet", " clips"])


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(st.lists(fragments, max_size=16).map("".join))
def test_llamas_write_every_text_and_continue_every_text(llama, text):
    normal = text if llama.files[0].parent.name != "qwen3" else unicodedata.normalize("NFC", text)  # its own choice
    assert llama.decode(llama.encode(text)) == normal
    assert llama.decode(llama.encode("Janet\n") + llama.encode(text, continued=True)) == "Janet\n" + normal
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


def test_special_ids_have_no_text(llama, smollm2):
    for token_id in llama.special_ids.values():
        assert llama.token_texts[token_id] == "" and llama.decode([token_id]) == ""
    assert smollm2.token_texts[:17] == [""] * 17


def test_half_a_surrogate_pair_is_written_as_a_question_mark(llama3, smollm2):
    assert [tokenizer.decode(tokenizer.encode("a\ud83eb")) for tokenizer in (llama3, smollm2)] == ["a?b"] * 2


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


@pytest.fixture(scope="module")
def small():
    """The content of a small tokenizer.json: byte-level BPE with ChatML's special tokens, as SmolLM2 has them."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    backend.train_from_iterator(["Tom has 3 apples and 4 pears. <<3+4=7>>7\n"] * 9, trainer)
    return json.loads(backend.to_str())


def directory_with(tmp_path, small, said=None, files=None):
    """A directory with a small tokenizer.json, its tokenizer_config.json, and other JSON files by their names."""
    contents = (files or {}) | {"tokenizer": small} | ({} if said is None else {"tokenizer_config": said})
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def beginning_with(name, token_id, small):
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {name: {"id": name, "ids": [token_id], "tokens": [name]}}
    return small | {"post_processor": {"type": "TemplateProcessing", "single": single, "special_tokens": special}}


@pytest.mark.parametrize(
    ("config", "has_processor", "bos_id"),
    [
        (None, False, None),
        (None, True, 1),
        ({"add_bos_token": False, "bos_token": "<|im_start|>"}, True, None),
        ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, True, 0),
        ({"add_bos_token": True, "bos_token": "<|endoftext|>"}, False, 0),
        ({"add_bos_token": True, "bos_token": {"content": "<|im_start|>", "lstrip": False}}, False, 1),
        ({"add_bos_token": True}, True, 1),
        ({"add_bos_token": None, "bos_token": "<|endoftext|>"}, True, 1),  # the post-processor has the word
        ({"bos_token": "<|endoftext|>"}, False, None),
    ],
)
def test_what_begins_a_text_is_what_the_files_say(tmp_path, small, config, has_processor, bos_id):
    content = beginning_with("<|im_start|>", 1, small) if has_processor else small
    found = load_tokenizer(directory_with(tmp_path, content, config))
    assert found.bos_id == bos_id
    prompt_ids = template_for("qwen2", found).prompt_ids("How many?")
    assert prompt_ids[0] == (found.encode("B")[0] if bos_id is None else bos_id)
    assert found.decode(prompt_ids) == template_for("qwen2", found).prompt("How many?")


@pytest.mark.parametrize(
    ("config", "files", "eos_id", "stop_ids"),
    [
        (None, {}, 0, {0}),
        (None, {"config": {"eos_token_id": 2}}, 2, {2}),
        (None, {"config": {"eos_token_id": [2, 0]}}, 2, {0, 2}),
        ({"eos_token": "<|im_end|>"}, {}, 2, {2}),
        ({"eos_token": "<|im_end|>"}, {"config": {"eos_token_id": 0}}, 2, {0, 2}),
        ({"eos_token": "<|im_end|>"}, {"generation_config": {"eos_token_id": [1, 0]}}, 2, {0, 1, 2}),
        ({"eos_token": ""}, {"config": {"eos_token_id": None}, "generation_config": {}}, 0, {0}),
        ({}, {"config": {"eos_token_id": 65}, "generation_config": {"eos_token_id": 10**9}}, 0, {0}),  # no specials
    ],
)
def test_what_ends_a_text_is_what_the_files_say(tmp_path, small, config, files, eos_id, stop_ids):
    found = load_tokenizer(directory_with(tmp_path, small, config, files))
    assert (found.eos_id, found.stop_ids) == (eos_id, stop_ids)
    template = template_for("qwen3", found)
    assert (template.eos_id, template.stop_ids, template.target_ids("7")[-1]) == (eos_id, stop_ids, eos_id)


def test_a_sentencepiece_model_obeys_its_files_too(tmp_path, shared):
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    config = {"add_bos_token": False, "bos_token": "<s>", "eos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    found = load_tokenizer(tmp_path)
    assert (found.bos_id, found.eos_id, found.stop_ids) == (None, 1, {1, 2})
    assert found.decode([1, *found.encode("18 clips"), 2]) == "18 clips"


@pytest.mark.parametrize(
    ("config", "files", "complaint"),
    [
        ({"eos_token": "<nowhere>"}, {}, "tokenizer_config.json: eos_token is '<nowhere>', which the tokenizer"),
        ({"bos_token": 5}, {}, "tokenizer_config.json: bos_token is 5, the name of a token is expected"),
        ({"add_bos_token": "yes"}, {}, "tokenizer_config.json: add_bos_token is 'yes', true or false is expected"),
        ({"legacy": 1}, {}, "tokenizer_config.json: legacy is 1, true or false is expected"),
        ({"add_bos_token": True}, {}, "tokenizer_config.json: add_bos_token is true, but bos_token names none"),
        ([], {}, "tokenizer_config.json: not readable as a JSON object"),
        ({}, {"config": {"eos_token_id": "2"}}, "config.json: eos_token_id is '2', a number or a list"),
        ({}, {"generation_config": {"eos_token_id": [2, True]}}, "generation_config.json: eos_token_id is"),
        ({}, {"generation_config": 3}, "generation_config.json: not readable as a JSON object"),
    ],
)
def test_files_that_say_nonsense_are_named(tmp_path, small, config, files, complaint):
    with pytest.raises(UserError) as error:
        load_tokenizer(directory_with(tmp_path, small, config, files))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def hostile_contents(small):
    """Broken contents of a tokenizer.json, by what is broken: some make the library raise, some panic."""
    model, vocabulary = small["model"], small["model"]["vocab"]
    empty = {"type": "Replace", "pattern": {"Regex": ""}, "content": "b"}
    added = small["added_tokens"]
    return {
        "no object": [],
        "empty": {},
        "no model": {key: value for key, value in small.items() if key != "model"},
        "no added tokens": {key: value for key, value in small.items() if key != "added_tokens"},
        "a model of nothing": small | {"model": None},
        "a model of a kind that there is not": small | {"model": model | {"type": "Markov"}},
        "a vocabulary that is a text": small | {"model": model | {"vocab": "abc"}},
        "an empty vocabulary": small | {"model": model | {"vocab": {}, "merges": []}},
        "a negative id": small | {"model": model | {"vocab": vocabulary | {"x": -1}}},
        "an id of 2^31": small | {"model": model | {"vocab": vocabulary | {"zz": 2**31}}},
        "an id of 2^70": small | {"model": model | {"vocab": vocabulary | {"zz": 2**70}}},
        "an id that is a text": small | {"model": model | {"vocab": vocabulary | {"zz": "5"}}},
        "a merge of what is no piece": small | {"model": model | {"merges": [["q", "zzz"]]}},
        "a merge of one": small | {"model": model | {"merges": ["ab"]}},
        "a special token of another's id": small | {"added_tokens": [added[0] | {"id": 77}]},
        "a special token without a name": small | {"added_tokens": [{"id": 0}]},
        "a special token of a huge id": small | {"added_tokens": [{"id": 2**40, "content": "<x>"}]},
        "a post-processor of an id that there is not": beginning_with("<x>", 9_999, small),
        "a post-processor of nothing": small | {"post_processor": {"type": "TemplateProcessing", "single": []}},
        "an expression that is none": small | {"normalizer": empty | {"pattern": {"Regex": "("}}},
        "an empty expression, at which the library panics": small | {"normalizer": empty},
        "a decoder of a kind that there is not": small | {"decoder": {"type": "Enigma"}},
        "a map of characters that is none": small
        | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "////"}},
        "nothing can be written": small
        | {"model": {"type": "Unigram", "vocab": [["b", 0.0]], "unk_id": None, "byte_fallback": False}},
    }


def assert_refused(tmp_path, capfd):
    with pytest.raises(UserError, match=r"tokenizer\.json: not") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")  # nothing of a panic's own message either


def test_a_broken_tokenizer_json_is_one_line(tmp_path, small, capfd):
    path = tmp_path / "tokenizer.json"
    for content in hostile_contents(small).values():
        path.write_text(json.dumps(content))
        assert_refused(tmp_path, capfd)
    for text in ("", "{", json.dumps(small)[:2000], "[" * 100_000, '{"a": "\\ud800"}', "\0" * 99):
        path.write_text(text)
        assert_refused(tmp_path, capfd)
    path.write_text(json.dumps(small))
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode("Tom has 3")) == "Tom has 3"


def places(value, place=()):
    """The places of a JSON value's parts, as keys and indices from the outside in."""
    yield place
    if isinstance(value, dict | list):
        keys = [*value][:30] if isinstance(value, dict) else range(min(len(value), 10))
        for key in keys:
            yield from places(value[key], (*place, key))


JUNK = [None, True, -1, 0, 2**31, 2**64, 1e308, "", "a", "\0", [], {}, [1], [["a", 1]], "x" * 1000]
JUNK += [{"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False}]
JUNK += [{"type": "Replace", "pattern": {"Regex": ""}, "content": "b"}, {"type": "Strip", "content": "a", "start": 99}]


def test_a_tokenizer_json_with_anything_anywhere_is_read_or_refused(tmp_path, small, capfd):
    chance = random.Random(0)
    n_refused = 0
    for _ in range(250):
        content = json.loads(json.dumps(small))
        *outer, last = chance.choice([place for place in places(content) if place])
        owner = content
        for key in outer:
            owner = owner[key]
        owner[last] = chance.choice(JUNK)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        try:
            found = load_tokenizer(tmp_path)
        except UserError as error:
            assert "\n" not in str(error)
            n_refused += 1
        else:
            assert found.decode(found.encode("Tom has 3\n")) is not None
    assert 50 < n_refused < 240
    assert capfd.readouterr() == ("", "")


def test_dropout_truncation_and_padding_of_a_tokenizer_json_are_not_obeyed(tmp_path, small):
    cut = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    pad = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    changed = small | {"truncation": cut, "padding": {"pad_to_multiple_of": None, **pad}}
    changed["model"] = small["model"] | {"dropout": 0.9}
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for directory, content in ((theirs, small), (ours, changed)):
        directory.mkdir()
        (directory / "tokenizer.json").write_text(json.dumps(content))
    text = "Tom has 3 apples and 4 pears."
    assert load_tokenizer(ours).encode(text) == load_tokenizer(theirs).encode(text)


@pytest.mark.parametrize("text", ["▁", "<pad>", "<unk>"])
def test_a_piece_that_is_no_utf8_is_noticed_at_once(tmp_path, text):
    content = (ROOT / "weights" / "tiny-t5" / "spiece.model").read_bytes()
    assert text.encode() in content
    (tmp_path / "spiece.model").write_bytes(content.replace(text.encode(), b"\xff" * len(text.encode()), 1))
    with pytest.raises(UserError, match=r"spiece\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_directory_without_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer here, spiece\.model, tokenizer\.model or tokenizer\.json is"):
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


def test_added_tokens_of_tokenizer_json_count_beside_a_sentencepiece_model(llama2, llama2_oracle, shared, tmp_path):
    """ChatML fine-tunes of Llama-2 and Mistral have both files, and the marks in the JSON alone."""
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    llama2_oracle.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).files == [tmp_path / "tokenizer.model"]
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] += [
        content["added_tokens"][0] | {"id": 32_000 + i, "content": name}
        for i, name in enumerate(["<|im_end|>", "<|im_start|>"])
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    found = load_tokenizer(tmp_path)
    assert (found.files, found.eos_id, found.vocab_size) == ([tmp_path / "tokenizer.json"], 32_000, 32_002)
    assert found.encode("two apples") == llama2.encode("two apples")
    # A broken JSON is no reason to refuse what the model alone can read.
    (tmp_path / "tokenizer_config.json").unlink()
    for broken in ("{", "[]", '{"added_tokens": [5]}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        assert load_tokenizer(tmp_path).files == [tmp_path / "tokenizer.model"]


MARKS = {"<pad>": 32_001, "<|im_end|>": 32_000}


@pytest.mark.parametrize(
    ("files", "stop_ids"),
    [
        ({"added_tokens": MARKS, "tokenizer_config": {"eos_token": "<|im_end|>"}}, {32_000}),
        ({"added_tokens": MARKS, "config": {"eos_token_id": 32_000}}, {2, 32_000}),
        (
            {
                "tokenizer_config": {
                    "eos_token": "<|im_end|>",
                    "added_tokens_decoder": {
                        "2": {"content": "</s>", "special": True},
                        "32000": {"content": "<|im_end|>", "special": False},
                        "32001": {"content": "<pad>"},
                        "32099": {"content": "<extra_id_0>"},
                    },
                },
                "added_tokens": {"not": 40_000},
            },
            {32_000},
        ),
    ],
)
def test_tokens_that_are_added_beside_a_sentencepiece_model(llama2, shared, tmp_path, files, stop_ids):
    """Old checkpoints have no tokenizer.json."""
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    found = load_tokenizer(tmp_path)
    assert found.special_ids == llama2.special_ids | MARKS
    assert (found.stop_ids, found.vocab_size) == (stop_ids, 32_002)
    assert found.token_texts == [*llama2.token_texts, "", ""]
    for text in ("two apples", "Say <|im_end|>, <pad>!"):
        ids = found.encode(text)
        assert ids == llama2.encode(text) and found.decode([*ids, 32_000, 32_001, 32_002]) == text
    assert {path.stem for path in tokenizer_files(tmp_path)} >= {"tokenizer"} | files.keys() - {"config"}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("added_tokens", [], "added_tokens.json: not readable as a JSON object"),
        ("added_tokens", {"<pad>": None}, "added_tokens.json: {NAME: ID, ...} is expected"),
        ("added_tokens", {"<pad>": -1}, "added_tokens.json: {NAME: ID, ...} is expected"),
        ("added_tokens", {"<pad>": 2**40}, "added_tokens.json: {NAME: ID, ...} is expected"),
        ("tokenizer_config", {"added_tokens_decoder": []}, "tokenizer_config.json: added_tokens_decoder is expected"),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {}}}, "tokenizer_config.json: added_tokens_decoder is"),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": 5}}}, "added_tokens_decoder is expected"),
        ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "x"}}}, "added_tokens_decoder is expected"),
    ],
)
def test_a_broken_list_of_added_tokens_is_named(shared, tmp_path, name, content, complaint):
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load_tokenizer(tmp_path)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_how_texts_after_marks_begin_is_told_by_tokenizer_json_before_legacy(llama2_oracle, shared, tmp_path):
    shutil.copy(shared / "tokenizers" / "llama2" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": true}')
    for content, begins_anew in ((llama2_oracle.backend_tokenizer.to_str(), False), ("{", True), ("{}", True)):
        (tmp_path / "tokenizer.json").write_text(content)
        found = load_tokenizer(tmp_path)
        assert found.files == [tmp_path / "tokenizer.model"]
        assert found.begins_anew_after_marks == begins_anew


def test_what_no_piece_can_write_is_shown_as_such(llama2_oracle, tmp_path):
    content = json.loads(llama2_oracle.backend_tokenizer.to_str())
    content["model"]["unk_token"] = "<unk>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    found = load_tokenizer(tmp_path)
    ids = found.encode("two apples")
    assert (found.unk_id, found.token_texts[0]) == (0, "\ufffd")
    assert found.decode([*ids, found.unk_id, *found.encode("!", continued=True)]) == "two apples\ufffd!"


@pytest.mark.parametrize("name", ["<|im_end|>", "<|endoftext|>"])
def test_an_end_that_also_stands_for_the_unknown_has_no_text(tmp_path, small, name):
    changed = small | {"model": small["model"] | {"unk_token": name}}
    end_id = {"<|endoftext|>": 0, "<|im_end|>": 2}[name]
    found = load_tokenizer(directory_with(tmp_path, changed, None, {"config": {"eos_token_id": end_id}}))
    assert (found.eos_id, found.stop_ids, found.unk_id) == (end_id, {end_id}, None)
    template = template_for("llama", found)
    assert template.decode(template.target_ids("It is 2.\n#### 2")) == "It is 2.\n#### 2"
    assert found.token_texts[end_id] == "" and end_id not in found.encode(f"Say {name}!")
