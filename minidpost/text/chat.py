"""A checkpoint's own chat format: the question as the user's turn, the rationale as the assistant's.

The formats are written here by hand and recognised by what tokenizer_config.json's `chat_template` (or the file
chat_template.jinja) holds and by the special tokens of the vocabulary; no template is run. Known are ChatML, as SmolLM2
and Qwen use it, with the default system prompt that stands in the checkpoint's template, and Llama-3's headers:

    <|im_start|>system
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    How many clips did Natalia sell?<|im_end|>
    <|im_start|>assistant
    48/2 = <<48/2=24>>24 clips …<|im_end|>

    <|begin_of_text|><|start_header_id|>user<|end_header_id|>

    How many clips did Natalia sell?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

    48/2 = <<48/2=24>>24 clips …<|eot_id|>

Departures from transformers' `apply_chat_template`: the marks of the frame are special ids, but their names in a
question are ordinary text; the question is tidied, as in the Alpaca-style prompt; Qwen3's assistant begins with its
empty block of thoughts, as in that template's own training text (`enable_thinking=False`); Llama-3.1 and later
state the day that their template falls back to, not today's: the same question has the same prompt every day.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidpost.errors import UserError
from minidpost.storage import read_json
from minidpost.text.templates import LlamaTemplate, Tokenizer, tidy

CHAT_FILES = ("tokenizer_config.json", "chat_template.jinja")  # of which the latter has the word where both are there


@dataclass(frozen=True)
class ChatFormat:
    """The frame around a question, with `{question}` in its place, the marks in it, and what ends a turn."""

    frame: str
    marks: tuple[str, ...]  # special tokens
    end_of_turn: str  # one of them


MAX_TEMPLATE_BYTES = 2**20

CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
THOUGHT_MARKS = ("<think>", "</think>")
NO_THOUGHTS = "<think>\n\n</think>\n\n"
# SmolLM2's vocabulary alone has these; its template's system prompt, for directories that have lost the template.
SMOLLM2_MARKS = ("<repo_name>", "<jupyter_start>", "<empty_output>")
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

LLAMA3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3 = (
    "<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA3_DATES = (
    "<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
)

# `'<|im_start|>system\nYou are …<|im_end|>\n'` in a template's source, where line breaks are still spelt \n.
_SYSTEM_PROMPT = re.compile(r"<\|im_start\|>system(?:\\n|\n)([^<>{}'\"\\]+)<\|im_end\|>")


class ChatTemplate(LlamaTemplate):
    """A question in the checkpoint's chat format, the canonical rationale as the answer, the end of the turn as EOS."""

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat):
        """Bind a format to a vocabulary; UserError if it lacks the format's marks, or is none of Llama's kind."""
        missing = [mark for mark in chat_format.marks if mark not in tokenizer.special_ids]
        if missing:
            raise UserError(f"{tokenizer.files[0]}: the chat format needs the special token {missing[0]}")
        super().__init__(tokenizer, tokenizer.special_ids[chat_format.end_of_turn])
        self._frame = chat_format.frame
        self._mark_ids = {mark: tokenizer.special_ids[mark] for mark in chat_format.marks}
        self._parts = re.split(f"({'|'.join(map(re.escape, chat_format.marks))})", chat_format.frame)

    def prompt(self, question: str) -> str:
        """The question in its frame, up to where the assistant begins."""
        return self._frame.replace("{question}", tidy(question))

    def prompt_ids(self, question: str) -> list[int]:
        """The ids in front of a completion: those of the marks, and of the text between them."""
        ids: list[int] = []
        for part in self._parts:
            if part in self._mark_ids:
                ids.append(self._mark_ids[part])
            else:
                ids += self._tokenizer.encode(part.replace("{question}", tidy(question)), continued=True)
        return ids


def chat_format_of(directory: str | Path, special_ids: Mapping[str, int]) -> ChatFormat:
    """The chat format of a checkpoint with these special tokens; UserError if it is none that is known.

    Without a template the special tokens alone say which.
    """
    source = _template_source(Path(directory))
    if _are_all_in(CHATML_MARKS, special_ids, source):
        return _chatml(source, special_ids)
    if _are_all_in(LLAMA3_MARKS[1:], special_ids, source):
        has_dates = source is not None and "Cutting Knowledge Date" in source
        frame = LLAMA3_MARKS[0] + (LLAMA3_DATES if has_dates else "") + LLAMA3
        return ChatFormat(frame, LLAMA3_MARKS, "<|eot_id|>")
    raise UserError(
        f"{directory}: its chat format is none that is known; known are ChatML (<|im_start|>, as SmolLM2 and Qwen have "
        "it) and Llama-3's (<|start_header_id|>); the template 'alpaca' needs no chat format"
    )


def _are_all_in(marks: tuple[str, ...], special_ids: Mapping[str, int], source: str | None) -> bool:
    """Whether all marks are special tokens, and in the template's source if there is one."""
    return all(mark in special_ids and (source is None or mark in source) for mark in marks)


def _chatml(source: str | None, special_ids: Mapping[str, int]) -> ChatFormat:
    """ChatML with the system prompt and the block of thoughts that a template's source has."""
    if source is not None:
        found = _SYSTEM_PROMPT.search(source)
        system = found[1] if found else None
    else:
        system = SMOLLM2_SYSTEM if _are_all_in(SMOLLM2_MARKS, special_ids, None) else None
    frame = CHATML if system is None else f"<|im_start|>system\n{system}<|im_end|>\n{CHATML}"
    marks: tuple[str, ...] = CHATML_MARKS
    if source is not None and repr(NO_THOUGHTS)[1:-1] in source and _are_all_in(THOUGHT_MARKS, special_ids, source):
        frame += NO_THOUGHTS
        marks += THOUGHT_MARKS
    return ChatFormat(frame, marks, "<|im_end|>")


def _template_source(directory: Path) -> str | None:
    """The source of a checkpoint's chat template, None if it has none; UserError where a file is broken."""
    config_path, template_path = (directory / name for name in CHAT_FILES)
    try:
        if template_path.is_file():
            with template_path.open("rb") as stream:
                content = stream.read(MAX_TEMPLATE_BYTES + 1)
            if len(content) > MAX_TEMPLATE_BYTES:
                raise ValueError
            return content.decode("utf-8")
        config: Any = read_json(config_path) if config_path.is_file() else {}
        found = config.get("chat_template")
        if isinstance(found, list):  # several, each with a name
            found = {template["name"]: template["template"] for template in found}.get("default")
        if found is not None and not isinstance(found, str):
            raise ValueError
        return found
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        broken = template_path if template_path.is_file() else config_path
        raise UserError(f"{broken}: not readable as a chat template") from None
