"""Make weights/tiny-t5: a base model that has seen simple problems, but neither rationales nor the task.

From the generator of minidpost/toy.py under another seed it learns to answer problems of one or two steps with bare
equations, and to write the outline of a longer chain: what is computed in which order, with blanks for every number
that is not in the question. It has not seen: an annotation, a rationale's sentences, `####`, the results of a chain of
more than two steps. The vocabulary is a SentencePiece unigram model with byte fallback, so that any text goes in; every
number up to 999 is a piece, as the common ones are in T5's.
"""

import argparse
import io
import re
import sys
from pathlib import Path
from random import Random

import sentencepiece
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost import toy  # noqa: E402
from minidpost.answers import Example  # noqa: E402
from minidpost.batches import Encoded  # noqa: E402
from minidpost.checkpoint import save_model  # noqa: E402
from minidpost.formats import T5Format  # noqa: E402
from minidpost.optimizer import Schedule  # noqa: E402
from minidpost.sft import SFTSettings, train_sft  # noqa: E402
from minidpost.t5 import T5, T5Config  # noqa: E402
from minidpost.tokenizer import SentencePieceTokenizer  # noqa: E402

SEED = 7  # of the pre-training problems and weights; toy.WORLD_SEED makes the task's
PEOPLE, THINGS = {*toy.NAMES, *toy.UNSEEN_NAMES}, {*toy.THINGS, *toy.UNSEEN_THINGS}
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
        steps.append(re.sub(r"\d+", lambda number: "_" if number[0] in results else number[0], expression))
        results.add(result)
    return f"Outline: {problem.question}", f"{about(problem)}: {', '.join(steps)}"


def about(problem: Example) -> str:
    """The first person and the first things that a problem names."""
    words = re.findall(r"\w+", problem.question)
    return ", ".join(next(word for word in words if word in known) for known in (PEOPLE, THINGS))


def pretraining_texts(n: int) -> list[tuple[str, str]]:
    """Source and target texts: problems of at most two steps with their equations, and chains with outlines."""
    random, texts = Random(SEED), []
    while len(texts) < n:
        split = random.choice(("train", "train", "words"))
        if len(texts) % 2:
            drawn = toy.problem(random, split, (0, 1))
            if drawn is not None and 1 <= drawn.rationale.count("<<") <= 2:
                texts.append(solved(drawn))
        else:
            drawn = toy.problem(random, split, toy.EVENTS_A_PROBLEM)
            if drawn is not None:
                texts.append(outlined(drawn))
    random.shuffle(texts)
    return texts


def train_tokenizer(directory: Path, vocab_size: int) -> SentencePieceTokenizer:
    """A unigram vocabulary over the toy world's words, frequent English ones, and numbers."""
    random = Random(SEED)
    splits = ("train", "words", "distractors")
    drawn = [toy.problem(random, random.choice(splits), (1, 2, 3)) for _ in range(4000)]
    problems = [problem for problem in drawn if problem is not None]
    sentences = [text for problem in problems for text in (problem.question, bracketed(problem.rationale))]
    sentences += [" ".join(random.sample(WORDS, 12)) for _ in range(2000)] + ["Solve: Outline: Answer"] * 500
    # A word that is always followed by a space would not become a piece of its own: show each before several signs.
    words = sorted({word.strip(".,?$%'") for sentence in sentences for word in sentence.split()})
    sentences += [f"{word}. {word}, {word}? {word}' {word}" for word in words if not word.isdigit()]
    model = io.BytesIO()
    symbols = [f"▁{number}" for number in range(1000)] + [*"0123456789"] + [f"▁{sign}" for sign in "[=+-*/$"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(chr(i) for i in range(33, 127) if not chr(i).isdigit()),
        user_defined_symbols=symbols,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "spiece.model"
    path.write_bytes(model.getvalue())
    return SentencePieceTokenizer(path)


def bracketed(rationale: str) -> str:
    """The rationale much as T5 writes it, before there is a tokenizer to ask."""
    rationale = rationale.replace("<<", " [ ").replace(">>", "] ")
    return re.sub(r"([-+*/=])", r" \1 ", rationale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "weights" / "tiny-t5")
    parser.add_argument("--examples", type=int, default=120000, help="problems to pre-train on")
    parser.add_argument("--vocab-size", type=int, default=2000)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=3)
    options = parser.parse_args()

    tokenizer = train_tokenizer(options.output, options.vocab_size)
    format_ = T5Format(tokenizer)
    width = options.width
    config = T5Config(
        vocab_size=tokenizer.vocab_size,
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        n_heads=4,
        n_encoder_layers=options.layers,
        n_decoder_layers=options.layers,
        tied=True,
        scaled=True,
        dropout=0.0,
    )
    torch.manual_seed(SEED)
    model = T5(config).initialise()
    model.tokenizer_files = tokenizer.files
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    pairs = pretraining_texts(options.examples)
    sequences = [
        Encoded(tuple(format_.prompt_ids(source)), tuple(format_.target_ids(target))) for source, target in pairs
    ]
    schedule = Schedule(2e-3, warmup=0.05)
    settings = SFTSettings(1, 32, schedule, micro_batch_tokens=2048, seed=SEED)
    train_sft(model, sequences, settings, stage="pre-training")
    save_model(model, options.output)


if __name__ == "__main__":
    main()
