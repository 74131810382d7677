"""The toy world: grade-school word problems with annotated rationales, generated from a seed.

A problem is a chain. Someone starts with a number of things, a few events change it, and a question is asked of the
end. Each link is written in one of several ways and adds one or two steps to the rationale, in GSM8K's own form (`Mia
then has <<24+15=39>>39 apples.` … `#### 39`). There is a small labelled set, a larger set of which only question and
answer are known, and, as in the paper, test sets out of domain: longer chains, unseen names, things and verbs, and
numbers that do not matter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random

from minidpost.data.example import Example

WORLD_SEED = 2024
SIZES = {"train": 400, "unlabelled": 1600, "dev": 200, "test": 500, "longer": 150, "words": 150, "distractors": 150}
SPLITS = tuple(SIZES)
TEST_SPLITS = ("test", "longer", "words", "distractors")
EVENTS_A_PROBLEM = (1, 1, 2)  # numbers of events to choose from: two thirds of the problems have one
LONGER_EVENTS = (3, 4)
MAX_AMOUNT = 999  # of anything at any time

NAMES = "Mia Tom Ana Ben Eva Sam Zoe Max Lily Jack Nora Paul Rosa Adam Ella Hugo".split()
GIRLS = set("Mia Ana Eva Zoe Lily Nora Rosa Ella Ines Ruth Olga".split())
THINGS = "apples pens books shells cards coins marbles stickers eggs cookies flowers stamps".split()
BOXES = "boxes bags packs crates".split()
UNSEEN_NAMES = "Ines Omar Ruth Karl Olga Finn".split()
UNSEEN_THINGS = "lemons buttons candles pebbles ribbons tickets".split()
UNSEEN_BOXES = "baskets jars trays".split()


@dataclass
class Story:
    """A problem as it grows: whose things they are, how many there are now, and what has been said and computed."""

    random: Random
    name: str
    friend: str
    thing: str
    box: str
    unseen: bool
    amount: int = 0

    def __post_init__(self) -> None:
        self.sentences: list[str] = []
        self.steps: list[str] = []
        self.she = "she" if self.name in GIRLS else "he"

    def say(self, *wordings: str, unseen: tuple[str, ...] = (), **numbers: int) -> None:
        """Add a sentence to the question in one of these wordings, or in one that training never shows."""
        wording = self.random.choice(unseen if self.unseen and unseen else wordings)
        self.sentences.append(wording.format(**vars(self), **numbers))

    def compute(self, sentence: str, expression: str, result: int) -> int:
        """Add a step to the rationale; the sentence has `{}` where the annotated result goes. Returns the result."""
        text = sentence.format(f"<<{expression}={result}>>{result}", **vars(self))
        self.steps.append(text)
        return result

    def now_has(self, expression: str, amount: int) -> None:
        """The step that most events end in."""
        self.amount = self.compute("{name} then has {} {thing}.", expression, amount)


# How a story starts: each sets the amount.


def start_count(story: Story) -> None:
    """A plain number of things."""
    story.amount = story.random.randint(12, 99)
    story.say(
        "{name} has {n} {thing}.",
        "{name} owns {n} {thing}.",
        "There are {n} {thing} in {name}'s room.",
        n=story.amount,
    )


def start_boxes(story: Story) -> None:
    """So many boxes with so many things in each."""
    boxes = story.random.randint(3, 12)
    each = story.random.randint(4, 25)
    story.say(
        "{name} has {b} {box} with {c} {thing} in each.",
        "{name} fills {b} {box} with {c} {thing} each.",
        "{name} owns {b} {box}. Every one holds {c} {thing}.",
        b=boxes,
        c=each,
    )
    story.amount = story.compute("{name} starts with {} {thing}.", f"{boxes}*{each}", boxes * each)


def start_kinds(story: Story) -> None:
    """Things of two kinds, added up."""
    first = story.random.randint(8, 80)
    second = story.random.randint(8, 80)
    story.say(
        "{name} has {a} red {thing} and {b} blue {thing}.",
        "{name} owns {a} old {thing} and {b} new {thing}.",
        "In {name}'s room are {a} big {thing} and {b} small {thing}.",
        a=first,
        b=second,
    )
    story.amount = story.compute("{name} starts with {} {thing}.", f"{first}+{second}", first + second)


def start_days(story: Story) -> None:
    """So many things a day for some days."""
    each = story.random.randint(4, 30)
    days = story.random.randint(3, 14)
    story.say(
        "{name} collects {c} {thing} a day for {d} days.",
        "For {d} days {name} gets {c} {thing} every day.",
        "{name} makes {c} {thing} on each of {d} days.",
        c=each,
        d=days,
    )
    story.amount = story.compute("{name} starts with {} {thing}.", f"{each}*{days}", each * days)


# What happens next: each changes the amount and returns True, or returns False where it does not fit.


def gain(story: Story) -> bool:
    """Some more things."""
    more = story.random.randint(5, 95)
    story.say(
        "{she} buys {n} more.",
        "{she} finds another {n}.",
        "{friend} gives {name} {n} more.",
        "Then {she} gets {n} from {friend}.",
        unseen=("{she} is handed {n} more by {friend}.", "{she} picks up another {n}."),
        n=more,
    )
    story.now_has(f"{story.amount}+{more}", story.amount + more)
    return True


def loss(story: Story) -> bool:
    """Some fewer things; not of few."""
    if story.amount < 12:
        return False
    fewer = story.random.randint(3, min(95, story.amount - 4))
    story.say(
        "{she} loses {n} of them.",
        "{she} gives {n} to {friend}.",
        "{friend} takes {n} of them.",
        "Then {n} of them break.",
        unseen=("{she} throws away {n} of them.", "{she} hands {n} to {friend}."),
        n=fewer,
    )
    story.now_has(f"{story.amount}-{fewer}", story.amount - fewer)
    return True


def gain_boxes(story: Story) -> bool:
    """Some more boxes of things."""
    boxes = story.random.randint(2, 9)
    each = story.random.randint(4, 20)
    story.say(
        "{she} buys {b} {box} with {c} in each.",
        "{friend} brings {b} {box} of {c} {thing}.",
        "{she} gets {b} more {box}, each with {c} {thing}.",
        b=boxes,
        c=each,
    )
    added = story.compute("The {box} hold {} {thing}.", f"{boxes}*{each}", boxes * each)
    story.now_has(f"{story.amount}+{added}", story.amount + added)
    return True


def multiply(story: Story) -> bool:
    """Twice or three times as many."""
    word, times = story.random.choice([("doubles", 2), ("triples", 3)])
    story.say(
        f"Then {{she}} {word} the number of {{thing}}.",
        f"{{she}} works hard and {word} what {{she}} has.",
        f"A month later {{she}} has {'twice' if times == 2 else 'three times'} as many.",
    )
    story.now_has(f"{story.amount}*{times}", story.amount * times)
    return True


def part_away(story: Story) -> bool:
    """Half, a third or a quarter less; only where that is a whole number."""
    parts = [(word, n) for word, n in (("half", 2), ("a third", 3), ("a quarter", 4)) if story.amount % n == 0]
    if not parts or story.amount < 8:
        return False
    word, n = story.random.choice(parts)
    story.say(
        f"{{she}} gives {word} of them to {{friend}}.",
        f"{{friend}} takes {word} of the {{thing}}.",
        f"Then {word} of them get lost.",
        unseen=(f"{{she}} hands {word} of them to {{friend}}.",),
    )
    gone = story.compute("That is {} {thing} less.", f"{story.amount}/{n}", story.amount // n)
    story.now_has(f"{story.amount}-{gone}", story.amount - gone)
    return True


def percent_away(story: Story) -> bool:
    """Some percent less; only where that is a whole number."""
    percentages = [p for p in (10, 20, 25, 30, 40, 60, 75) if story.amount * p % 100 == 0]
    if not percentages or story.amount < 8:
        return False
    percent = story.random.choice(percentages)
    story.say(
        "{she} sells {p}% of them.",
        "Then {p}% of the {thing} get lost.",
        "{friend} gets {p}% of them.",
        p=percent,
    )
    gone = story.compute("That is {} {thing} less.", f"{story.amount}*{percent}/100", story.amount * percent // 100)
    story.now_has(f"{story.amount}-{gone}", story.amount - gone)
    return True


# What is asked of the end: each returns the answer, or None where it does not fit.


def ask_count(story: Story) -> int:
    """How many there are."""
    story.say(
        "How many {thing} does {name} have now?",
        "How many {thing} are there in the end?",
        "How many {thing} does {name} have left?",
    )
    return story.amount


def ask_money(story: Story) -> int:
    """What all of them are worth."""
    price = story.random.randint(2, 12)
    story.say(
        "{she} sells them for {p} dollars each. How many dollars does {name} get?",
        "Each of them is worth {p} dollars. How much are they worth together?",
        "One of them costs {p} dollars. How much do all of them cost?",
        p=price,
    )
    return story.compute("All of them are worth {} dollars.", f"{story.amount}*{price}", story.amount * price)


def ask_share(story: Story) -> int | None:
    """How many each gets of equal parts; only where they divide evenly."""
    fits = [n for n in range(3, 13) if story.amount % n == 0 and story.amount > 2 * n]
    if not fits:
        return None
    people = story.random.choice(fits)
    story.say(
        "{she} shares them equally among {n} friends. How many does each friend get?",
        "{n} children share them equally. How many does each child get?",
        "{she} puts them into {n} equal rows. How many are in a row?",
        n=people,
    )
    return story.compute("Each gets {} {thing}.", f"{story.amount}/{people}", story.amount // people)


def ask_together_times(story: Story) -> int:
    """How many with a friend who has some times as many."""
    word, times = story.random.choice([("twice", 2), ("three times", 3), ("four times", 4)])
    story.say(
        f"{{friend}} has {word} as many. How many do they have together?",
        f"{{friend}} owns {word} as many {{thing}} as {{name}}. How many {{thing}} do both have in all?",
    )
    other = story.compute("{friend} has {} {thing}.", f"{story.amount}*{times}", story.amount * times)
    return story.compute("Together they have {} {thing}.", f"{story.amount}+{other}", story.amount + other)


def ask_together_more(story: Story) -> int:
    """How many with a friend who has some more."""
    more = story.random.randint(3, 60)
    story.say(
        "{friend} has {n} more than {name}. How many do they have together?",
        "{friend} owns {n} more {thing} than {name}. How many {thing} do both have in all?",
        n=more,
    )
    other = story.compute("{friend} has {} {thing}.", f"{story.amount}+{more}", story.amount + more)
    return story.compute("Together they have {} {thing}.", f"{story.amount}+{other}", story.amount + other)


def ask_missing(story: Story) -> int:
    """How many are missing to a larger number."""
    goal = story.amount + story.random.randint(5, 150)
    story.say(
        "{she} wants to have {n}. How many more does {name} need?",
        "{name} needs {n} {thing} in all. How many are still missing?",
        "{friend} has {n} {thing}. How many more is that than {name} has?",
        n=goal,
    )
    return story.compute("The difference is {}.", f"{goal}-{story.amount}", goal - story.amount)


STARTS: tuple[Callable[[Story], None], ...] = (start_count, start_boxes, start_kinds, start_days)
EVENTS: tuple[Callable[[Story], bool], ...] = (gain, loss, gain_boxes, multiply, part_away, percent_away)
QUESTIONS: tuple[Callable[[Story], int | None], ...] = (
    ask_count,
    ask_money,
    ask_share,
    ask_together_times,
    ask_together_more,
    ask_missing,
)
DISTRACTIONS = (
    "{friend} is {n} years old.",
    "{friend} has {n} chairs at home.",
    "The walk to school takes {n} minutes.",
    "There are {n} children in the school of {friend}.",
)


def examples(split: str, seed: int = WORLD_SEED) -> list[Example]:
    """The examples of a split; no question stands twice, in it or in another split. `unlabelled` has no rationales."""
    return list(_made_once(split, seed))


@cache  # a command reads up to seven splits, and each takes those before it
def _made_once(split: str, seed: int) -> tuple[Example, ...]:
    """The examples of a split, which avoids the questions of those before it; KeyError where there is no such split."""
    n = SIZES[split]
    before = SPLITS[: SPLITS.index(split)]
    seen = {example.question for name in before for example in _made_once(name, seed)}
    return tuple(new_examples(split, n, Random(f"{seed}/{split}"), seen))


def new_examples(split: str, n: int, random: Random, seen: set[str]) -> list[Example]:
    """`n` examples of a split's kind, none of a question that was `seen`; adds their questions to it."""
    n_events = LONGER_EVENTS if split == "longer" else EVENTS_A_PROBLEM
    made: list[Example] = []
    while len(made) < n:
        example = problem(random, split, n_events)
        if example is None or example.question in seen or largest_number(example) > MAX_AMOUNT:
            continue
        seen.add(example.question)
        rationale = None if split == "unlabelled" else example.rationale
        made.append(Example(example.question, example.answer, rationale))
    return made


def problem(random: Random, split: str, n_events: tuple[int, ...]) -> Example | None:
    """One problem of a split's kind, with one of these numbers of events; None where its parts do not fit together."""
    story = new_story(random, unseen=split == "words")
    random.choice(STARTS)(story)
    for _ in range(random.choice(n_events)):
        fits = random.choice(EVENTS)(story)
        if not fits or story.amount > MAX_AMOUNT:
            return None
        if split == "distractors" and random.random() < 0.5:
            story.say(*DISTRACTIONS, n=random.randint(3, 60))
    return finished(story, random.choice(QUESTIONS)(story))


def new_story(random: Random, unseen: bool) -> Story:
    """An empty story with its people and things."""
    name, friend = random.sample(UNSEEN_NAMES if unseen else NAMES, 2)
    thing = random.choice(UNSEEN_THINGS if unseen else THINGS)
    box = random.choice(UNSEEN_BOXES if unseen else BOXES)
    return Story(random, name, friend, thing, box, unseen)


def finished(story: Story, answer: int | None) -> Example | None:
    """The story as an example; None where the question did not fit."""
    if answer is None:
        return None
    rationale = "\n".join([*story.steps, f"#### {answer}"])
    question = " ".join(sentence[0].upper() + sentence[1:] for sentence in story.sentences)
    return Example(question, str(answer), rationale)


def largest_number(example: Example) -> int:
    """The largest number of a rationale."""
    assert example.rationale is not None
    return max(int(digits) for digits in re.findall(r"\d+", example.rationale))
