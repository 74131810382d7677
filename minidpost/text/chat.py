"""A checkpoint's own chat format: the question as the user's turn, the rationale as the assistant's.

A chat template is a program in Jinja's language, in tokenizer_config.json's `chat_template` or in the file
chat_template.jinja. It is run once, in Jinja's sandbox and in a process whose time and memory are bounded, with
placeholders for the two texts, which gives the frame of all prompts; SmolLM2's is

    <|im_start|>system
    You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
    <|im_start|>user
    {question}<|im_end|>
    <|im_start|>assistant

A target is the canonical rationale and what ends the assistant's turn, there <|im_end|>. A directory that has no
template is told from its special tokens: ChatML's or Llama-3's.

Departures from transformers' `apply_chat_template`: the marks of the frame are special ids, but their names in a
question are ordinary text; the question is tidied, as in the Alpaca-style prompt; Qwen3's assistant begins with its
empty block of thoughts, as in that template's own training text (`enable_thinking=False`); templates that state the
day (Llama-3.1 and later) have the one that they fall back to, not today's, so that the same question has the same
prompt every day; what a template puts between prompt and answer (Llama-2's space) is left out. Whether a text after a
mark of a Llama's begins with a space is tokenizer.json's word where there is one, as in transformers 4; transformers 5
goes by `legacy` in tokenizer_config.json even where the two disagree.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minidpost.errors import UserError
from minidpost.storage import read_json
from minidpost.text.templates import LlamaTemplate, Tokenizer, tidy
from minidpost.text.tokenizer import read_special_tokens

CHAT_FILES = ("tokenizer_config.json", "chat_template.jinja")  # of which the latter has the word where both are there
MAX_TEMPLATE_BYTES = 2**20
JINJA = Path(__file__).with_name("jinja.py")  # which is run, not imported
# What templates may take; those that we know need a hundredth of each.
MAX_SECONDS = 10
MAX_MEMORY_BYTES = 2**30
MAX_CHARACTERS = 2**20
QUESTION, ANSWER = "{question}", "{answer}"


@dataclass(frozen=True)
class ChatFormat:
    """The frame around a question, with `{question}` in its place, and the special token that ends a turn.

    `end_of_turn` is None where a turn ends in the tokenizer's own EOS.
    """

    frame: str
    end_of_turn: str | None


# What directories have that have lost their template.
CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
CHATML = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
# SmolLM2's vocabulary alone has these, and its template this system prompt.
SMOLLM2_MARKS = ("<repo_name>", "<jupyter_start>", "<empty_output>")
SMOLLM2_SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
LLAMA3_MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA3 = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)


class ChatTemplate(LlamaTemplate):
    """A question in the checkpoint's chat format, the canonical rationale as the answer, the end of the turn as EOS."""

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat):
        """Bind a format to a vocabulary; UserError if it is none of Llama's kind."""
        end = chat_format.end_of_turn
        super().__init__(tokenizer, None if end is None else tokenizer.special_ids[end])
        self._frame = chat_format.frame
        # The marks, and the texts between them, which may be empty.
        self._parts = _split_at(tokenizer.special_ids, chat_format.frame)

    def prompt(self, question: str) -> str:
        """The question in its frame, up to where the assistant begins."""
        return self._frame.replace(QUESTION, tidy(question))

    def prompt_ids(self, question: str) -> list[int]:
        """The ids in front of a completion: those of the marks, and of the text between them."""
        special_ids = self._tokenizer.special_ids
        ids: list[int] = []
        for part in self._parts:
            if part in special_ids:
                ids.append(special_ids[part])
            elif part:
                text = part.replace(QUESTION, tidy(question))
                # After a mark some vocabularies begin a text with a space, as at the very beginning.
                is_continued = bool(ids) and not self._tokenizer.begins_anew_after_marks
                ids += self._tokenizer.encode(text, continued=is_continued)
        return ids


def chat_format_of(directory: str | Path, tokenizer: Tokenizer) -> ChatFormat:
    """The chat format of a checkpoint with this tokenizer; UserError if it has none, or a broken one.

    Without a template the special tokens alone say which.
    """
    directory = Path(directory)
    path, source = _template_source(directory)
    if source is not None:
        return _format_of_template(path, source, tokenizer)
    special_ids = tokenizer.special_ids
    if special_ids.keys() >= {*CHATML_MARKS}:
        system = SMOLLM2_SYSTEM if special_ids.keys() >= {*SMOLLM2_MARKS} else ""
        return ChatFormat(system + CHATML, "<|im_end|>")
    if special_ids.keys() >= {*LLAMA3_MARKS}:
        return ChatFormat(LLAMA3, "<|eot_id|>")
    raise UserError(
        f"{directory}: no chat_template in {' or '.join(CHAT_FILES)}, and no special tokens of a known format "
        "(ChatML's <|im_start|>, Llama-3's <|start_header_id|>); the template 'alpaca' needs no chat format"
    )


def _format_of_template(path: Path, source: str, tokenizer: Tokenizer) -> ChatFormat:
    """Run a template: for a question alone, and with an answer to it, which shows what ends a turn."""
    # Templates name these two by their role; other tokens they spell out.
    said = read_special_tokens(path.parent)
    name_of: dict[int | None, str] = {token_id: name for name, token_id in tokenizer.special_ids.items()}
    names = {
        "bos_token": said.bos or name_of.get(tokenizer.bos_id, ""),
        "eos_token": said.eos or name_of.get(tokenizer.eos_id, ""),
    }
    user = {"role": "user", "content": QUESTION}
    assistant = {"role": "assistant", "content": ANSWER}
    frame, both = _rendered(
        path,
        source,
        names | {"messages": [user], "add_generation_prompt": True},
        names | {"messages": [user, assistant], "add_generation_prompt": False},
    )
    n_shown = frame.count(QUESTION)
    if n_shown != 1:
        raise UserError(f"{path}: not usable as a chat template: it shows the user's message {n_shown} times, not once")
    marks_after_answer = _split_at(tokenizer.special_ids, both.partition(ANSWER)[2])[1::2]
    return ChatFormat(frame, next(iter(marks_after_answer), None))


def _split_at(special_ids: Mapping[str, int], text: str) -> list[str]:
    """Texts and special tokens in turn: text, token, text …; of two tokens at one place the longer one counts."""
    names = sorted(filter(None, special_ids), key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]


def _rendered(path: Path, source: str, *calls: dict[str, Any]) -> list[str]:
    """What a template makes of each set of variables; UserError whatever goes wrong in it, or where it has no end."""
    unused = {"tools": None, "documents": None, "enable_thinking": False}
    asked = {
        "source": source,
        "calls": [variables | unused for variables in calls],
        "seconds": MAX_SECONDS,
        "n_bytes": MAX_MEMORY_BYTES,
        "n_characters": MAX_CHARACTERS,
    }
    # -P: no module beside jinja.py is to be taken for one of Python's.
    command = [sys.executable, "-P", str(JINJA)]
    process = subprocess.run(command, input=json.dumps(asked).encode(), capture_output=True, check=False)
    if process.returncode > 0:  # not the template's fault: a library is missing
        raise RuntimeError(f"{JINJA}: {process.stderr.decode(errors='replace')}")
    # A signal ends what takes too long.
    answer: dict[str, Any] = {"fault": None} if process.returncode < 0 else json.loads(process.stdout)
    if "texts" in answer:
        texts: list[str] = answer["texts"]
        return texts
    too_much = f"it takes more than {MAX_SECONDS} seconds of computing or {MAX_MEMORY_BYTES / 2**30:g} GiB of memory"
    reason = answer["fault"] or too_much
    raise UserError(f"{path}: not usable as a chat template: {' '.join(reason.split()):.200}")


def _template_source(directory: Path) -> tuple[Path, str | None]:
    """The source of a checkpoint's chat template, None if it has none; UserError where a file is broken."""
    config_path, template_path = (directory / name for name in CHAT_FILES)
    path = template_path if template_path.is_file() else config_path
    try:
        if path == template_path:
            with path.open("rb") as stream:
                content = stream.read(MAX_TEMPLATE_BYTES + 1)
            if len(content) > MAX_TEMPLATE_BYTES:
                raise ValueError
            return path, content.decode("utf-8")
        config: Any = read_json(path) if path.is_file() else {}
        found = config.get("chat_template")
        if isinstance(found, list):  # several, each with a name
            found = {template["name"]: template["template"] for template in found}.get("default")
        if found is not None and not isinstance(found, str):
            raise ValueError
        return path, found
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise UserError(f"{path}: not readable as a chat template") from None
