"""The toy world: deterministic, consistent with its own rationales, split without overlap."""

import re

import pytest

from minidpost.data import toy
from minidpost.text.calculator import evaluate_expression
from minidpost.text.grading import is_correct

ANNOTATION = re.compile(r"<<([^=]+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def world():
    return {split: toy.examples(split) for split in toy.SPLITS}


def test_examples_depend_on_the_seed_alone(world):
    toy._made_once.cache_clear()
    assert toy.examples("dev") == world["dev"]
    assert toy.examples("dev", seed=1) != world["dev"]


def test_split_sizes_and_no_question_twice(world):
    assert {split: len(examples) for split, examples in world.items()} == toy.SIZES
    questions = [example.question for examples in world.values() for example in examples]
    assert len(set(questions)) == len(questions)


def test_unlabelled_examples_have_answers_but_no_rationales(world):
    assert all(example.rationale is None and example.answer for example in world["unlabelled"])
    assert all(example.rationale for split, examples in world.items() if split != "unlabelled" for example in examples)


@pytest.mark.parametrize("split", [split for split in toy.SPLITS if split != "unlabelled"])
def test_every_annotation_is_what_the_calculator_says(world, split):
    for example in world[split]:
        steps = ANNOTATION.findall(example.rationale)
        assert len(steps) == example.rationale.count("<<")
        assert all(evaluate_expression(expression) == result == shown for expression, result, shown in steps)
        assert is_correct(example.rationale, example.answer)
        assert not steps or steps[-1][1] == example.answer


def test_every_number_is_in_the_question_or_computed(world):
    for example in world["train"]:
        words = {"twice": "2", "doubles": "2", "half": "2", "three": "3", "triples": "3", "third": "3", "four": "4"}
        known = set(re.findall(r"\d+", example.question)) | {"100"}
        known |= {words[word] for word in re.findall(r"\w+", example.question) if word in words}
        known |= {"4"} if "quarter" in example.question else set()
        for expression, result, _ in ANNOTATION.findall(example.rationale):
            assert set(re.findall(r"\d+", expression)) <= known, example
            known.add(result)


def test_out_of_domain_sets_are_what_they_are_named_for(world):
    def mean_steps(split):
        return sum(example.rationale.count("<<") for example in world[split]) / len(world[split])

    def words(split):
        return {word for example in world[split] for word in re.findall(r"[A-Za-z]+", example.question)}

    assert mean_steps("longer") > mean_steps("test") + 1.5
    unseen = {*toy.UNSEEN_NAMES, *toy.UNSEEN_THINGS, *toy.UNSEEN_BOXES}
    assert not unseen & (words("train") | words("unlabelled"))
    assert unseen <= words("words")
    distracting = [
        e for e in world["distractors"] if re.search(r"years old|chairs at home|walk to school|school of", e.question)
    ]
    assert len(distracting) > 0.4 * len(world["distractors"])
    assert not any("years old" in example.question for example in world["test"])
