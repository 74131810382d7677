"""Chat formats against transformers' `apply_chat_template` on GSM8K; what is recognised; directories."""

import json
import re
import shutil

import pytest
from tokenizer_oracle import llama3_of_transformers

from minidpost.errors import UserError
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.weights import load_template, recorded_template, save_model, tokenizer_files
from minidpost.text.chat import CHATML, NO_THOUGHTS, ChatTemplate, chat_format_of
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
FORMATS = {"smollm2": SMOLLM2, "smollm2-other": QWEN2, "llama3": LLAMA3, "llama3.1": LLAMA31, "qwen3": None}


@pytest.fixture(scope="module", params=FORMATS)
def chat(request, shared, tmp_path_factory):
    """A directory with a tokenizer and a chat template, our template, and transformers' tokenizer with its template."""
    from transformers import AutoTokenizer

    template = FORMATS[request.param]
    name = re.split(r"[-.]", request.param)[0]
    source = shared / "tokenizers" / name
    directory = tmp_path_factory.mktemp(request.param)
    for path in source.iterdir():
        shutil.copy(path, directory)
    if template is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    tokenizer = load_tokenizer(directory)
    ours = ChatTemplate(tokenizer, chat_format_of(directory, tokenizer.special_ids))
    if name == "llama3":
        theirs = llama3_of_transformers(source / "tokenizer.model")
    else:
        theirs = AutoTokenizer.from_pretrained(source)
    if template is not None:
        theirs.chat_template = template
    return directory, ours, theirs


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
        if not re.search(r"<<[^<>=]*=[-.][^<>]*>>", target):
            both = theirs.apply_chat_template([user, {"role": "assistant", "content": target}], **options)
            ids = [*prompt_ids, *ours.target_ids(row["answer"])]
            assert ids == both[: len(ids)]
            assert theirs.decode(both[len(ids) :]) in ("", "\n")  # after the end of the turn


def test_targets_end_the_turn_and_come_back(chat, gsm8k):
    _, ours, theirs = chat
    end = "<|eot_id|>" if "<|eot_id|>" in ours.prompt("") else "<|im_end|>"
    assert ours.eos_id == theirs.convert_tokens_to_ids(end)
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
    assert chat_format_of(shared / "tokenizers" / "qwen3", tokenizer.special_ids).frame == CHATML + NO_THOUGHTS


CHATML_IDS = {"<|im_start|>": 1, "<|im_end|>": 2}


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
        ({"chat_template": "{{'<|im_start|>' + '<|im_end|>'}}"}, CHATML_IDS, None),
    ],
)
def test_the_system_prompt_is_the_templates_own(tmp_path, content, special_ids, system):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    frame = chat_format_of(tmp_path, special_ids).frame
    assert frame.endswith(CHATML)
    assert ("<|im_start|>system\n" in frame) == (system is not None)
    assert system is None or system in frame.split("<|im_end|>")[0]


def test_a_template_in_a_file_of_its_own_goes_first(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": SMOLLM2}))
    (tmp_path / "chat_template.jinja").write_text(QWEN2)
    assert "You are helpful." in chat_format_of(tmp_path, CHATML_IDS).frame


@pytest.mark.parametrize(
    ("content", "special_ids"),
    [
        (None, {"</s>": 2}),
        ({"chat_template": "[INST] {{ message }} [/INST]"}, {"[INST]": 3, "</s>": 2, **CHATML_IDS}),
        ({"chat_template": SMOLLM2}, {"<|im_start|>": 1}),
        ({"chat_template": [{"name": "tools", "template": SMOLLM2}]}, {}),
    ],
)
def test_other_formats_are_refused_with_those_that_work(tmp_path, content, special_ids):
    if content is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"known are ChatML .* and Llama-3's .*'alpaca'") as error:
        chat_format_of(tmp_path, special_ids)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


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
        chat_format_of(tmp_path, CHATML_IDS)


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
