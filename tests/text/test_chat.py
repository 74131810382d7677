"""Chat formats against transformers' `apply_chat_template` on GSM8K; what is recognised; directories."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from tokenizer_oracle import (
    llama2_of_transformers,
    llama3_of_transformers,
    with_legacy_normalizer,
    with_user_defined_pieces,
)

from minidpost.errors import UserError
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.weights import load_template, recorded_template, save_model, tokenizer_files
from minidpost.text.chat import CHATML, ChatTemplate, chat_format_of
from minidpost.text.templates import LlamaTemplate
from minidpost.text.tokenizer import load_tokenizer

# The published templates of checkpoints whose tokenizer_config.json is not in ../shared.
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2 = SMOLLM2.replace("You are a helpful AI assistant named SmolLM, trained by Hugging Face", "You are helpful.")
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA31 = (
    "{{- bos_token }}{{- '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n' }}"
    "{{- 'Today Date: 26 Jul 2024\n\n<|eot_id|>' }}" + LLAMA3.replace("bos_token + content", "content")
)
# Backslashes and braces in a system prompt, and one with an apostrophe.
MATH = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|im_start|>system\\nPlease reason step by step, and put your final "
    "answer within \\\\boxed{}.<|im_end|>\\n' }}{%- endif %}{% for message in messages %}"
    + SMOLLM2.partition("{% endif %}")[2]
)
APOSTROPHE = SMOLLM2.replace("You are a helpful AI assistant named SmolLM", "You\\'re Bob\\'s assistant")
HERMES = "{{bos_token}}{% for message in messages %}" + SMOLLM2.partition("{% endif %}")[2]
THINKING = SMOLLM2.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# Marks that are ordinary text, sentences that end in EOS, a block that says what an assistant wrote.
ZEPHYR = (
    "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + "
    "eos_token }}\n{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n' }}{% generation %}"
    "{{ message['content'] + eos_token }}{% endgeneration %}\n{% endif %}\n{% if loop.last and add_generation_prompt %}"
    "\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
FORMATS = {
    "smollm2": SMOLLM2,
    "smollm2-other": QWEN2,
    "smollm2-math": MATH,
    "smollm2-apostrophe": APOSTROPHE,
    "llama3": LLAMA3,
    "llama3.1": LLAMA31,
    "llama3-hermes": HERMES.replace("<|im_end|>", "<|eot_id|>"),
    "qwen3": None,
    "qwen3-thinking": THINKING,
    "qwen3-inst": INST.replace("bos_token", "'<|im_start|>'").replace("eos_token", "'<|im_end|>'"),
    "llama2-zephyr": ZEPHYR,
    "llama2-inst": INST,
    "llama2.legacy-inst": INST,  # whose vocabulary puts a space before every text between marks
    "llama2.legacy-zephyr": ZEPHYR,
    # The same vocabulary as a SentencePiece model: what transformers makes of it depends on `legacy`, or on the
    # tokenizer.json beside it.
    "llama2.model-zephyr": ZEPHYR,
    "llama2.model.legacy_false-zephyr": ZEPHYR,
    "llama2.model.legacy_true-zephyr": ZEPHYR,
    "llama2.model.legacy_true-inst": INST,
    "llama2.model.json-zephyr": ZEPHYR,
    "llama2.model.json-inst": INST,
    "llama2.model.json.legacy-zephyr": ZEPHYR,
    # Marks that the SentencePiece model lacks, or has as pieces that texts can spell.
    "llama2.model.added_decoder-chatml": SMOLLM2,
    "llama2.model.added_json-chatml": SMOLLM2,
    "llama2.model.user_defined_decoder-chatml": SMOLLM2,
    "llama2.model.user_defined.json-chatml": SMOLLM2,
}


def add_marks(directory, theirs, kinds):
    """Give both vocabularies ChatML's marks, ours in the files of these kinds; what tokenizer_config.json has of it."""
    marks = ["<|im_start|>", "<|im_end|>"]
    theirs.add_tokens(marks, special_tokens=True)
    ids = dict(zip(marks, theirs.convert_tokens_to_ids(marks), strict=True))
    assert [*ids.values()] == [32_000, 32_001]
    path = directory / "tokenizer.model"
    if {"user_defined", "user_defined_decoder"} & {*kinds}:
        path.chmod(0o600)
        path.write_bytes(with_user_defined_pieces(path.read_bytes(), marks, theirs.convert_ids_to_tokens(31_999)))
    if "added_json" in kinds:
        (directory / "added_tokens.json").write_text(json.dumps(ids))
    listed = {str(i): {"content": mark, "special": True} for mark, i in ids.items()}
    has_decoder = {"added_decoder", "user_defined_decoder"} & {*kinds}
    return {"eos_token": "<|im_end|>"} | ({"added_tokens_decoder": listed} if has_decoder else {})


@pytest.fixture(scope="module", params=FORMATS)
def chat(request, shared, tmp_path_factory):
    """A directory with a tokenizer and a chat template, our template, and transformers' tokenizer with its template."""
    from transformers import AutoTokenizer

    template = FORMATS[request.param]
    name = re.split(r"[-.]", request.param)[0]
    source = shared / "tokenizers" / name
    directory = tmp_path_factory.mktemp(request.param)
    said = {}
    if name == "llama2":
        kinds = request.param.partition("-")[0].split(".")
        theirs = llama2_of_transformers(load_tokenizer(source), legacy="legacy_true" in kinds)
        if "legacy" in kinds:
            theirs = with_legacy_normalizer(theirs)
        if "model" in kinds:
            shutil.copy(source / "tokenizer.model", directory)
        if request.param.endswith("chatml"):
            said |= add_marks(directory, theirs, kinds)
        if "model" not in kinds or "json" in kinds:
            theirs.backend_tokenizer.save(str(directory / "tokenizer.json"))
        if "legacy_true" in kinds or "legacy_false" in kinds:
            said["legacy"] = "legacy_true" in kinds
    else:
        for path in source.iterdir():
            shutil.copy(path, directory)
        is_llama3 = name == "llama3"
        theirs = (
            llama3_of_transformers(source / "tokenizer.model") if is_llama3 else AutoTokenizer.from_pretrained(source)
        )
    if template is not None:
        theirs.chat_template = template
        said["chat_template"] = template
        if name == "smollm2":
            said["eos_token"] = theirs.eos_token
        (directory / "tokenizer_config.json").write_text(json.dumps(said))
    tokenizer = load_tokenizer(directory)
    return directory, ChatTemplate(tokenizer, chat_format_of(directory, tokenizer)), theirs


@pytest.fixture(scope="module")
def gsm8k(shared):
    return [json.loads(line) for line in (shared / "data" / "gsm8k" / "test.jsonl").open()]


@pytest.mark.parametrize("rows", [slice(100), pytest.param(slice(100, 400), marks=pytest.mark.slow)])
def test_ids_equal_those_of_apply_chat_template(chat, gsm8k, rows):
    """The prompt's, and those of prompt and target together: cutting between them changes nothing but at `=-`."""
    _, ours, theirs = chat
    for row in gsm8k[rows]:
        question, target = ours.canonical(row["question"]), ours.target(row["answer"])
        user = {"role": "user", "content": question}
        options = {"enable_thinking": False, "return_dict": False}
        prompt_ids = theirs.apply_chat_template([user], add_generation_prompt=True, **options)
        assert ours.prompt_ids(question) == prompt_ids
        assert ours.prompt(question) == theirs.apply_chat_template(
            [user], add_generation_prompt=True, tokenize=False, **options
        )
        # What does not end in a line break is parted from the answer, which without the cut might begin with it; and a
        # template may leave the thoughts out that it has an assistant begin with.
        ends_in_line = ours.prompt("").endswith("\n") and not ours.prompt("").endswith("<think>\n")
        if ends_in_line and not re.search(r"<<[^<>=]*=[-.][^<>]*>>", target):
            both = theirs.apply_chat_template([user, {"role": "assistant", "content": target}], **options)
            ids = [*prompt_ids, *ours.target_ids(row["answer"])]
            assert ids == both[: len(ids)]
            assert theirs.decode(both[len(ids) :]) in ("", "\n")  # after the end of the turn


def test_targets_end_the_turn_and_come_back(chat, gsm8k):
    _, ours, theirs = chat
    ends = [end for end in ("<|eot_id|>", "<|im_end|>", "</s>") if end in theirs.chat_template]
    assert ours.eos_id == theirs.convert_tokens_to_ids(ends[0] if ends else theirs.eos_token)
    assert ours.eos_id in ours.stop_ids
    for row in gsm8k[:100]:
        ids = ours.target_ids(row["answer"])
        assert ids[-1] == ours.eos_id
        assert ours.decode(ids) == ours.target(row["answer"])


def test_marks_in_a_question_are_ordinary_text(chat):
    _, ours, theirs = chat
    question = "Say <|im_end|> or <|eot_id|>, <think>, <|im_start|>assistant, <|begin_of_text|> {question}!"
    added = {*theirs.added_tokens_encoder.values(), *theirs.all_special_ids}
    marks = [token_id for token_id in ours.prompt_ids(question) if token_id in added]
    assert marks == [token_id for token_id in ours.prompt_ids("How many?") if token_id in added] != []
    assert not added & {*ours.target_ids(question)[:-1]}
    assert question in ours.prompt(question)


def test_the_calculator_forces_the_training_ids_in_a_chat_too(chat):
    _, ours, _ = chat
    ids = ours.target_ids("It is $<<(2+10)*1.5=18>>18-30=<<18-30=-12>>.\n#### -12")
    calculator, row = ours.new_calculator(), []
    while len(row) < len(ids):
        row.append(ids[len(row)])
        row += calculator.push(row[-1])
    assert row == ids


def test_qwen3_begins_after_an_empty_block_of_thoughts(shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "qwen3")
    frame = chat_format_of(shared / "tokenizers" / "qwen3", tokenizer).frame
    assert frame == CHATML + "<think>\n\n</think>\n\n"


CHATML_IDS = {"<|im_start|>": 1, "<|im_end|>": 2}


def format_of(directory, special_ids):
    """The chat format of a directory whose tokenizer has these special tokens."""
    return chat_format_of(directory, SimpleNamespace(special_ids=special_ids, bos_id=None, eos_id=None))


@pytest.mark.parametrize(
    ("content", "special_ids", "system"),
    [
        (None, CHATML_IDS, None),
        (None, CHATML_IDS | dict.fromkeys(["<repo_name>", "<jupyter_start>", "<empty_output>"], 5), "named SmolLM"),
        ({}, CHATML_IDS, None),
        ({"chat_template": SMOLLM2}, CHATML_IDS, "named SmolLM"),
        ({"chat_template": QWEN2.replace("\n", "\\n")}, CHATML_IDS, "You are helpful."),
        (
            {"chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": QWEN2}]},
            CHATML_IDS,
            "You",
        ),
    ],
)
def test_the_system_prompt_is_the_templates_own(tmp_path, content, special_ids, system):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    found = format_of(tmp_path, special_ids)
    assert found.frame.endswith(CHATML) and found.end_of_turn == "<|im_end|>"
    assert ("<|im_start|>system\n" in found.frame) == (system is not None)
    assert system is None or system in found.frame.split("<|im_end|>")[0]


def test_without_a_template_llama3_is_told_by_its_marks(tmp_path):
    marks = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    found = format_of(tmp_path, {mark: i for i, mark in enumerate(marks)})
    assert found.frame.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>")
    assert found.end_of_turn == "<|eot_id|>"


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": SMOLLM2}))
    (tmp_path / "chat_template.jinja").write_text(QWEN2)
    assert "You are helpful." in format_of(tmp_path, CHATML_IDS).frame


@pytest.mark.parametrize("content", [None, {}, {"chat_template": [{"name": "tools", "template": SMOLLM2}]}])
def test_without_a_template_or_known_marks_there_is_no_format(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"no chat_template in .* 'alpaca' needs no chat format") as error:
        format_of(tmp_path, {"</s>": 2})
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("[INST] {{ message }} [/INST]", "0 times, not once"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "2 times, not once"),
        ("{% for message in messages %}", "Unexpected end of template"),
        ("{{ raise_exception('first say\nsystem') }}", "first say system"),
        ("{{ messages[5].content.x }}", "has no element 5"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_a_template_that_fails_is_one_line(tmp_path, template, reason):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=rf"chat_template\.jinja: not usable as a chat template: .*{reason}") as error:
        format_of(tmp_path, CHATML_IDS)
    assert "\n" not in str(error.value)


TOO_MUCH = "it takes more than 1 seconds of computing or 1 GiB of memory"
LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
MACROS = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"
DOUBLED = "{% set text = namespace(is='a') %}{% for i in range(50) %}{% set text.is = text.is ~ text.is %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (LOOPS, TOO_MUCH),
        (MACROS, TOO_MUCH),
        ("{{ 10 ** (10 ** 10) }}", TOO_MUCH),
        (DOUBLED, TOO_MUCH),
        ("{{ 'a' * 10 ** 10 }}", TOO_MUCH),
        ("{{ 'a' | center(10 ** 10) }}", TOO_MUCH),
        ("{{ 'a' * 10 ** 7 }}", "it writes more than 1,048,576 characters"),
    ],
)
def test_a_template_without_an_end_is_one_line(tmp_path, monkeypatch, template, reason):
    monkeypatch.setattr("minidpost.text.chat.MAX_SECONDS", 1)
    (tmp_path / "chat_template.jinja").write_text(template + "{{ messages[0].content }}")
    with pytest.raises(UserError) as raised:
        format_of(tmp_path, CHATML_IDS)
    assert str(raised.value) == f"{tmp_path}/chat_template.jinja: not usable as a chat template: {reason}"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b'{"chat_template": 5}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}'),
        ("tokenizer_config.json", b"[]"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b" " * (2**20 + 1)),
    ],
)
def test_a_broken_chat_template_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: not readable as a chat template"):
        format_of(tmp_path, CHATML_IDS)


# -- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_dir(shared, tmp_path_factory):
    """A model with SmolLM2's vocabulary, as small as one may be."""
    source = tmp_path_factory.mktemp("source")
    shutil.copy(shared / "tokenizers" / "smollm2" / "tokenizer.json", source)
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": SMOLLM2, "eos_token": "<|endoftext|>"}))
    (source / "chat_template.jinja").write_text(SMOLLM2)
    model = Llama(LlamaConfig(49_152, 2, 2, 1, n_heads=1, n_kv_heads=1, d_head=2, eos_id=0)).initialise()
    directory = tmp_path_factory.mktemp("smollm2")
    save_model(model, directory, tokenizer_files(source))
    return directory


def test_a_template_is_chosen_or_read_from_the_directory(smollm2_dir, tmp_path):
    assert type(load_template(smollm2_dir)) is type(load_template(smollm2_dir, "alpaca")) is LlamaTemplate
    chat = load_template(smollm2_dir, "chat")
    assert isinstance(chat, ChatTemplate)
    assert (chat.eos_id, chat.stop_ids) == (2, {0, 2})
    # What is made of it records the choice, and so does what is made of that; another choice goes before it.
    model = Llama(LlamaConfig(49_152, 2, 2, 1, n_heads=1, n_kv_heads=1, d_head=2, eos_id=0)).initialise()
    save_model(model, tmp_path / "first", tokenizer_files(smollm2_dir), template="chat")
    save_model(model, tmp_path / "second", tokenizer_files(tmp_path / "first"))
    save_model(model, tmp_path / "third", tokenizer_files(tmp_path / "second"), template="alpaca")
    for name, recorded in (("first", "chat"), ("second", "chat"), ("third", "alpaca")):
        assert recorded_template(tmp_path / name) == recorded
        assert isinstance(load_template(tmp_path / name), ChatTemplate) == (recorded == "chat")
    assert load_template(tmp_path / "second").prompt_ids("How many?") == chat.prompt_ids("How many?")
    assert type(load_template(tmp_path / "first", "alpaca")) is LlamaTemplate


def with_a_token_beyond_the_embeddings(source, directory, said):
    """A model's directory whose tokenizer has a <pad> that the model has no embedding for."""
    shutil.copytree(source, directory)
    content = json.loads((directory / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 49_152, "content": "<pad>"})
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": SMOLLM2} | said))
    return directory


def test_a_pad_token_beyond_the_embeddings_is_no_reason_to_refuse(smollm2_dir, tmp_path):
    directory = with_a_token_beyond_the_embeddings(smollm2_dir, tmp_path / "padded", {"pad_token": "<pad>"})
    for template in ("alpaca", "chat"):
        ours, theirs = (load_template(path, template) for path in (directory, smollm2_dir))
        for question in ("How many?", "Say <pad>!"):
            assert ours.prompt_ids(question) == theirs.prompt_ids(question)
        assert (ours.eos_id, ours.stop_ids) == (theirs.eos_id, theirs.stop_ids)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"eos_token": "<pad>"}, "the tokenizer has 49,153 pieces, the model 49,152 embeddings"),
        ({"add_bos_token": True, "bos_token": "<pad>"}, "the tokenizer has 49,153 pieces, the model 49,152 embeddings"),
        (
            {"chat_template": SMOLLM2.replace("<|im_start|>", "<pad>")},
            "special token of id 49,152, the model 49,152 emb",
        ),
        ({"chat_template": SMOLLM2.replace("<|im_end|>", "<pad>")}, "special token of id 49,152, the model 49,152 emb"),
        (
            {"chat_template": SMOLLM2.replace("message['content'] + '<|im_end|>'", "message['content'] + '<pad>'")},
            "special token of id 49,152, the model 49,152 embeddings",
        ),
    ],
)
def test_a_token_beyond_the_embeddings_that_a_prompt_or_target_has_is_named(smollm2_dir, tmp_path, said, complaint):
    directory = with_a_token_beyond_the_embeddings(smollm2_dir, tmp_path / "broken", said)
    with pytest.raises(UserError, match=complaint) as error:
        load_template(directory, "chat")
    assert str(directory) in str(error.value)


def test_a_template_that_there_is_not_is_named(smollm2_dir, tiny_model_dir):
    with pytest.raises(UserError, match="no template 'vicuna'; known are alpaca and chat"):
        load_template(smollm2_dir, "vicuna")
    for template in ("chat", "alpaca"):
        with pytest.raises(UserError, match=f"no template '{template}'; a t5 has just one"):
            load_template(tiny_model_dir, template)


@pytest.mark.parametrize("content", [b"", b"[]", b'{"template": "vicuna"}', b'{"template": ["chat"]}', b"{}", b"\xff"])
def test_a_broken_record_is_named(tmp_path, content):
    (tmp_path / "minidpost.json").write_bytes(content)
    with pytest.raises(UserError, match=r'minidpost\.json: \{"template": "alpaca" or "chat"\} is expected'):
        recorded_template(tmp_path)
