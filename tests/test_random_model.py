"""tools/random_model.py: what it makes, and what it refuses."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from t5_oracle import SHAPES, assert_same_model

from minidpost.models.hf_config import config_json
from minidpost.models.weights import load_model

TOOL = Path(__file__).resolve().parents[1] / "tools/random_model.py"
CONFIG = replace(SHAPES["gated-untied"], vocab_size=32128)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("random_model", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config_file(tmp_path) -> Path:
    """The real vocabulary and little else, under another name than config.json."""
    path = tmp_path / "small.json"
    path.write_text(json.dumps(config_json(CONFIG, torch.float32)))
    return path


def test_directory_is_whole_and_belongs_to_its_seed(shared, config_file, tmp_path, tool):
    tokenizer = shared / "tokenizers/t5"

    def arguments(name: str) -> list[str]:
        pairs = {"--config": config_file, "--tokenizer": tokenizer, "--output": tmp_path / name, "--layers": 1}
        return [str(word) for pair in pairs.items() for word in pair]

    done = subprocess.run([sys.executable, str(TOOL), *arguments("a")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    model = load_model(tmp_path / "a")
    assert model.config == replace(CONFIG, n_encoder_layers=1, n_decoder_layers=1)
    assert f"{sum(weight.numel() for weight in model.parameters()):,}" in done.stdout
    assert (tmp_path / "a/spiece.model").read_bytes() == (tokenizer / "spiece.model").read_bytes()
    for name, seed in (("b", "0"), ("c", "1")):
        assert tool.main([*arguments(name), "--seed", seed]) == 0
    assert_same_model(load_model(tmp_path / "b"), model)
    assert not torch.equal(load_model(tmp_path / "c").embedding.weight, model.embedding.weight)


def test_refusals_are_one_line_and_leave_nothing(shared, config_file, tmp_path, tool, capsys):
    tokenizer, output = shared / "tokenizers/t5", tmp_path / "new"
    for name in ("broken", "existing"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken/spiece.model").write_bytes(b"no pieces")
    tiny_vocabulary = tmp_path / "tiny-vocabulary.json"
    tiny_vocabulary.write_text(json.dumps(config_json(SHAPES["gated-untied"], torch.float32)))
    wrong = {
        "exists already": (config_file, tokenizer, tmp_path / "existing", 1),
        "no config.json": (tmp_path / "nowhere", tokenizer, output, 1),
        "no tokenizer": (config_file, tmp_path, output, 1),
        "not a SentencePiece model": (config_file, tmp_path / "broken", output, 1),
        "vocab_size 97 is too small": (tiny_vocabulary, tokenizer, output, 1),
        "--layers 0": (config_file, tokenizer, output, 0),
        "--layers 1000000": (config_file, tokenizer, output, 10**6),
        "small.json": (config_file, tokenizer, config_file / "below-a-file", 1),
    }
    before = sorted(tmp_path.rglob("*"))
    for words, (config, tokenizer_dir, target, n_layers) in wrong.items():
        arguments = ["--config", config, "--tokenizer", tokenizer_dir, "--output", target, "--layers", n_layers]
        assert tool.main(list(map(str, arguments))) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert sorted(tmp_path.rglob("*")) == before


def test_a_wrong_command_line_is_one_line(tool, capsys):
    for arguments, words in (
        ([], "the following arguments are required: --config, --tokenizer, --output"),
        (["--config", "a", "--tokenizer", "b", "--output", "c", "--layers", "two"], "argument --layers: invalid int"),
        (["--config", "a", "--tokenizer", "b", "--output", "c", "--depth", "2"], "unrecognized arguments: --depth 2"),
    ):
        assert tool.main(arguments) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and not printed.out


def test_help_names_every_flag(tool, capsys):
    with pytest.raises(SystemExit, match="0"):
        tool.main(["--help"])
    shown = capsys.readouterr().out
    assert all(
        flag in shown for flag in ("random weights", "--config", "--tokenizer", "--output", "--seed", "--layers")
    )
