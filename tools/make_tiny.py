"""Make weights/tiny-t5 and weights/tiny-llama: base models that have seen simple problems, but not the task.

From the generator of minidpost/data/toy.py under another seed they learn to answer problems of one or two steps with
bare equations, and to write the outline of a longer chain: what is computed in which order, with blanks for every
number that is not in the question. They have not seen: an annotation, a rationale's sentences, `####`, the results of
a chain of more than two steps. The vocabularies are SentencePiece unigram models with byte fallback, so that any text
goes in; every number up to 999 is a piece, as the common ones are in T5's and Llama-3's. Llama's fixed prompt is two
pieces.
"""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import sentencepiece
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost.cli import Parser, run_command  # noqa: E402
from minidpost.data import toy  # noqa: E402
from minidpost.data.example import Example  # noqa: E402
from minidpost.errors import UserError  # noqa: E402
from minidpost.models.llama import Llama, LlamaConfig  # noqa: E402
from minidpost.models.t5 import T5, T5Config  # noqa: E402
from minidpost.models.weights import save_model  # noqa: E402
from minidpost.text.templates import LLAMA_PROMPT, template_for  # noqa: E402
from minidpost.text.tokenizer import load_tokenizer  # noqa: E402
from minidpost.training.batching import TokenizedExample  # noqa: E402
from minidpost.training.optim import Schedule  # noqa: E402
from minidpost.training.sft import SFTSettings, train_sft  # noqa: E402

SEED = 7  # of the pre-training problems and weights; toy.WORLD_SEED makes the task's
PEOPLE = {*toy.NAMES, *toy.UNSEEN_NAMES}
THINGS = {*toy.THINGS, *toy.UNSEEN_THINGS}
WORDS = """
how many much each every other more less than first second last week month year hour minute day morning night money
dollars cents price cost costs pay paid buys sells sold bought total all together altogether left remaining half third
quarter twice times as percent number people children friends students school class house store car miles feet inches
pounds water food cake bread milk work works worked hours make makes made take takes took give gives gave need needs
want wants use uses used is are was were be been has have had does do did will would can could if then so because and or
but of to in on at for from with by the a an this that these those there here it its he she they his her their what when
where which who since while after before during between only also still into over under out up down off
""".split()


def solved(problem: Example) -> tuple[str, str]:
    """A problem and its bare equations: `Mia, pens: 6*8=48, 48*3=144. Answer 144`."""
    steps = re.findall(r"<<(.*?)>>", problem.rationale)
    return f"Solve: {problem.question}", f"{about(problem)}: {', '.join(steps)}. Answer {problem.answer}"


def outlined(problem: Example) -> tuple[str, str]:
    """A chain of steps and its outline: what is computed in which order, `_` for all that is not in the question."""
    results: set[str] = set()
    steps = []
    for expression, result in re.findall(r"<<([^=]*)=(\d+)>>", problem.rationale):
        steps.append(re.sub(r"\d+", lambda match: "_" if match[0] in results else match[0], expression))
        results.add(result)
    return f"Outline: {problem.question}", f"{about(problem)}: {', '.join(steps)}"


def about(problem: Example) -> str:
    """The first person and the first things that a problem names."""
    words = re.findall(r"\w+", problem.question)
    return ", ".join(next(word for word in words if word in known) for known in (PEOPLE, THINGS))


def pretraining_texts(n: int) -> list[tuple[str, str]]:
    """Source and target texts: problems of at most two steps with their equations, and chains with outlines."""
    random = Random(SEED)
    texts: list[tuple[str, str]] = []
    while len(texts) < n:
        split = random.choice(("train", "train", "words"))
        if len(texts) % 2:
            problem = toy.problem(random, split, (0, 1))
            if problem is not None and 1 <= problem.rationale.count("<<") <= 2:
                texts.append(solved(problem))
        else:
            problem = toy.problem(random, split, toy.EVENTS_A_PROBLEM)
            if problem is not None:
                texts.append(outlined(problem))
    random.shuffle(texts)
    return texts


def sample_texts(written: Callable[[str], str]) -> list[str]:
    """Questions and rationales of the toy world, and frequent words, to make a vocabulary from."""
    random = Random(SEED)
    splits = ("train", "words", "distractors")
    tried = [toy.problem(random, random.choice(splits), (1, 2, 3)) for _ in range(4000)]
    problems = [problem for problem in tried if problem is not None]
    texts = [text for problem in problems for text in (problem.question, written(problem.rationale))]
    return texts + [" ".join(random.sample(WORDS, 12)) for _ in range(2000)] + ["Solve: Outline: Answer"] * 500


def t5_vocabulary(vocab_size: int) -> bytes:
    """T5's: a number is a piece with its space, as it stands in `[ 48 / 2 = 24] 24`."""

    def bracketed(rationale: str) -> str:
        return re.sub(r"([-+*/=])", r" \1 ", rationale.replace("<<", " [ ").replace(">>", "] "))

    symbols = [f"▁{number}" for number in range(1000)] + [*"0123456789"] + [f"▁{symbol}" for symbol in "[=+-*/$"]
    return vocabulary(sample_texts(bracketed), symbols, vocab_size, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)


def llama_vocabulary(vocab_size: int) -> bytes:
    """Llama's: a number is a piece without a space, as it stands in `<<48/2=24>>24`; the prompt's words are two."""
    before, after = LLAMA_PROMPT.replace(" ", "▁").split("{question}")
    symbols = [before, after, "<<", ">>", "####", "\n", *"+-*/=$%", *(str(number) for number in range(1000))]
    return vocabulary(
        sample_texts(str), symbols, vocab_size, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, remove_extra_whitespaces=False
    )


def vocabulary(texts: list[str], symbols: list[str], vocab_size: int, **options: int) -> bytes:
    """A SentencePiece unigram model in which every symbol, and every word of the texts that is worth it, is a piece."""
    # A word that is always followed by a space would not become a piece of its own: show each before several marks.
    words = sorted({word.strip(".,?$%'") for text in texts for word in text.split()})
    texts = [*texts, *(f"{word}. {word}, {word}? {word}' {word}" for word in words if not word.isdigit())]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(chr(i) for i in range(33, 127) if chr(i) not in symbols),
        user_defined_symbols=symbols,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def t5_config(vocab_size: int) -> T5Config:
    """0.8 million parameters."""
    return T5Config(vocab_size, 96, 24, 192, 4, 3, 3, tied=True, scaled=True, dropout=0.0)


def llama_config(vocab_size: int) -> LlamaConfig:
    """0.7 million parameters."""
    return LlamaConfig(
        vocab_size,
        d_model=96,
        d_ff=256,
        n_layers=5,
        n_heads=4,
        n_kv_heads=2,
        d_head=24,
        max_positions=2048,
        tied=True,
        bos_id=1,
        eos_id=2,
    )


FAMILIES = {
    "t5": ("spiece.model", t5_vocabulary, t5_config, T5),
    "llama": ("tokenizer.model", llama_vocabulary, llama_config, Llama),
}


def main() -> None:
    """Make the vocabulary, pre-train the model, write the directory."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument(
        "--output", type=Path, help="the directory to make; must not exist yet (default: weights/tiny-FAMILY)"
    )
    parser.add_argument("--examples", type=int, default=120000, help="problems to pre-train on")
    parser.add_argument("--vocab-size", type=int, default=2000)
    options = parser.parse_args()

    file_name, make_vocabulary, make_config, model_type = FAMILIES[options.family]
    directory = options.output or ROOT / "weights" / f"tiny-{options.family}"
    if directory.exists():
        raise UserError(f"{directory}: exists already; give --output a new name")
    directory.mkdir(parents=True)
    (directory / file_name).write_bytes(make_vocabulary(options.vocab_size))
    tokenizer = load_tokenizer(directory)
    template = template_for(options.family, tokenizer)
    torch.manual_seed(SEED)
    model = model_type(make_config(tokenizer.vocab_size)).initialise()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    texts = pretraining_texts(options.examples)
    sequences = [
        TokenizedExample(tuple(template.prompt_ids(source)), tuple(template.target_ids(target)))
        for source, target in texts
    ]
    settings = SFTSettings(1, 32, Schedule(2e-3, warmup=0.05), micro_batch_tokens=2048, seed=SEED)
    train_sft(model, sequences, settings, stage="pre-training")
    save_model(model, directory, tokenizer.files)


if __name__ == "__main__":
    run_command(main)
