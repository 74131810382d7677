"""Every hyperparameter has a flag with a sentence of its own, bounds, and the same checks in a JSON file."""

import argparse
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from minidpost.errors import UserError
from minidpost.selftraining import flags
from minidpost.selftraining.flags import (
    FLAGS,
    GROUPS,
    MAY_CHANGE,
    add_hyperparameters,
    changes,
    flag_name,
    given,
    kinds,
    read_hyperparameters,
    written,
)
from minidpost.selftraining.presets import LLAMA, T5, TINY_T5, Preset

NAMES = [field.name for field in fields(Preset)]


def parse(*arguments: str) -> dict:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_hyperparameters(parser)
    return given(parser.parse_args(arguments))


def other_value(name: str):
    """A value within a hyperparameter's bounds that is not the default, as it is read."""
    default = vars(T5)[name]
    if isinstance(default, bool):
        return not default
    flag = FLAGS[name]
    candidates = [flag.low, flag.high, (flag.low + flag.high) / 2]
    number = next(value for value in candidates if value != default)
    return int(number) if int in kinds(name) else float(number)


def arguments_for(name: str, value) -> list[str]:
    if isinstance(value, bool):
        return [flag_name(name) if value else flag_name(name).replace("--", "--no-", 1)]
    return [flag_name(name), written(value) if value is None else repr(value)]


def test_every_field_has_a_flag_and_no_flag_is_without_a_field():
    assert sorted(FLAGS) == sorted(NAMES)
    assert sum(len(group) for group in GROUPS.values()) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_replaces_its_hyperparameter(name):
    value = other_value(name)
    assert parse(*arguments_for(name, value)) == {name: value}
    assert type(parse(*arguments_for(name, value))[name]) in kinds(name)
    assert vars(replace(T5, **parse(*arguments_for(name, value))))[name] == value


def test_what_is_not_given_is_the_presets():
    assert parse() == {}


@pytest.mark.parametrize("name", [name for name in NAMES if type(None) in kinds(name)])
def test_none_takes_a_limit_away(name):
    assert parse(flag_name(name), "none") == {name: None}
    assert parse(flag_name(name), "None") == {name: None}


@pytest.mark.parametrize("name", [name for name in NAMES if bool not in kinds(name)])
def test_bounds_are_checked_ends_included(name, tmp_path):
    flag = FLAGS[name]
    for allowed in (flag.low, flag.high):
        assert parse(flag_name(name), repr(allowed)) == {name: allowed}
    wrong = [repr(flag.low - 1), repr(flag.high + 1), "nan", "inf", "", "many"]
    if float not in kinds(name):
        wrong.append("1.5")
    if type(None) not in kinds(name):
        wrong.append("none")
    for text in wrong:
        with pytest.raises(argparse.ArgumentError, match="number from"):
            parse(f"{flag_name(name)}={text}")


def test_numbers_without_a_use_are_refused():
    for line in ("--beta 0", "--temperature 0", "--max-grad-norm 0", "--top-p 0", "--sft-dropout 1", "--pass-at 0"):
        with pytest.raises(argparse.ArgumentError):
            parse(*line.split())


def test_presets_are_within_their_own_bounds():
    for preset in (T5, LLAMA, TINY_T5):
        for name, value in asdict(preset).items():
            assert flags.check(name, value) == value


def test_help_has_a_sentence_and_a_default_for_each():
    parser = argparse.ArgumentParser(prog="train.py")
    add_hyperparameters(parser)
    text = " ".join(parser.format_help().split())
    for name in NAMES:
        assert flag_name(name) in text
    assert text.count("(default: ") == len(NAMES)
    assert "β of the DPO loss" in text and "(default: T5 0.1, Llama 0.1, tiny models 1)" in text
    assert "(default: T5 3, Llama 10, tiny models 3; with --method rft 100; with --method rest-em 32)" in text
    for title in GROUPS:
        assert f"{title}:" in text
    assert len({flag.text for flag in FLAGS.values()}) == len(NAMES)


# -- --config ---------------------------------------------------------------------------------------------------------


def write(path: Path, content) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_file_of_hyperparameters(tmp_path):
    path = write(tmp_path / "mine.json", {"beta": 1, "label_cap": None, "warm_up": False, "sft_epochs": 3})
    values = {"beta": 1.0, "label_cap": None, "warm_up": False, "sft_epochs": 3}
    assert read_hyperparameters(path) == (values, None)


def test_a_whole_preset_there_and_back(tmp_path):
    values, _ = read_hyperparameters(write(tmp_path / "all.json", asdict(LLAMA)))
    assert Preset(**values) == LLAMA


@pytest.mark.parametrize(("named", "method"), [("rft", "rft"), (None, None), ("another", None), ([1], None)])
def test_a_runs_config_gives_its_hyperparameters_and_method(tmp_path, named, method):
    run = {"format": 4, "settings": {"method": named, "preset": asdict(TINY_T5)}, "versions": {}}
    values, found = read_hyperparameters(write(tmp_path / "config.json", run))
    assert (Preset(**values), found) == (TINY_T5, method)


def test_what_suits_a_devices_memory_is_not_taken_over_from_another_kind(tmp_path):
    preset = asdict(replace(TINY_T5, micro_batch_tokens=65536, slots=1024))
    path = write(tmp_path / "config.json", {"settings": {"method": "st", "preset": preset}, "device": "cuda"})
    assert read_hyperparameters(path, "cuda:1") == (preset, "st")
    values, _ = read_hyperparameters(path, "cpu")
    assert values == {name: preset[name] for name in preset if name not in ("micro_batch_tokens", "slots")}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "no such file"),
        ('{"beta": 0.1', "not readable as JSON"),
        ("[1]", "an object of hyperparameters"),
        ({"settings": {}}, "an object of hyperparameters"),
        ({"betta": 1}, r"'betta' is no hyperparameter \(did you mean beta\?\)"),
        ({"x" * 500: 1}, "is no hyperparameter"),
        ({"beta": "1"}, "beta: a number from"),
        ({"beta": True}, "beta: a number from"),
        ({"beta": None}, "beta: a number from"),
        ({"beta": float("nan")}, "beta: a number from"),
        ({"sft_epochs": 2.0}, "sft_epochs: a whole number from"),
        ({"sft_epochs": 10**30}, "sft_epochs: a whole number from"),
        ({"warm_up": 1}, "warm_up: true or false is expected"),
        ({"label_cap": [1]}, "label_cap: a whole number from 1 to 1,000,000, or none is expected"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path, content, complaint):
    path = tmp_path / "mine.json"
    if content is not None:
        write(path, content)
    with pytest.raises(UserError, match=complaint) as error:
        read_hyperparameters(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# -- what tells two runs apart ----------------------------------------------------------------------------------------


def test_changes_are_what_a_continued_run_may_not_change():
    assert changes(T5, T5, "dpo-st") == {}
    assert changes(T5, replace(T5, beta=0.5, samples=10), "dpo-st") == {"samples": 10, "beta": 0.5}
    for name in NAMES:
        differs = name in changes(T5, replace(T5, **{name: other_value(name)}), "dpo-st")
        assert differs == (name not in MAY_CHANGE)


@pytest.mark.parametrize("method", ["sft", "st", "rft", "rest-em"])
def test_without_dpo_its_hyperparameters_tell_no_runs_apart(method):
    of_dpo = {name for name in NAMES if "dpo" in name} | {"beta", "pairs_per_question"}
    for name in NAMES:
        differs = name in changes(T5, replace(T5, **{name: other_value(name)}), method)
        assert differs == (name not in MAY_CHANGE and name not in of_dpo)
