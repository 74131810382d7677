"""tools/memory_table.py: the README's table is what it prints, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import pytest

from minidpost.models.hf_config import read_config
from minidpost.models.weights import empty_model
from minidpost.selftraining.presets import n_parameters

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("memory_table", ROOT / "tools/memory_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cells(line: str) -> list[str]:
    """What stands between the bars of a table's line."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_of_the_readme_is_what_the_tool_prints(tool, shared, capsys):
    assert tool.main(list(map(str, shared.glob("configs/*/config.json")))) == 0
    table = capsys.readouterr().out
    assert table.count("\n") == 2 + len([*shared.glob("configs/*/config.json")])
    assert table in (ROOT / "README.md").read_text(encoding="utf-8")


def test_one_model_of_ones_own(tool, shared, capsys):
    directory = shared / "configs/smollm2-135m"
    assert tool.main([str(directory)]) == tool.main([str(directory / "config.json")]) == 0
    first, again = capsys.readouterr().out.split("\n| model")
    assert first.splitlines()[-1] == again.splitlines()[-1]
    (name, size, training, with_lora, *_, disk, disk_with_lora) = cells(again.splitlines()[-1])
    n_weights = n_parameters(empty_model(read_config(directory)))
    assert (name, size) == ("smollm2-135m", f"{n_weights / 1e6:.0f} M")
    # Weights, gradients and moments alone take 16 bytes a parameter, of which adapters take next to none.
    assert float(training.removesuffix(" GB")) - float(with_lora.removesuffix(" GB")) >= 1
    # Seven models of 4 bytes a parameter, and two states of 12 of what is trained.
    assert float(disk.removesuffix(" GB")) == round((7 * 4 + 2 * 12) * n_weights / 1e9)
    assert float(disk_with_lora.removesuffix(" GB")) < 5
    tool.main([str(directory), "--lora-rank", "512"])
    assert float(cells(capsys.readouterr().out.splitlines()[-1])[3].removesuffix(" GB")) > float(with_lora.split()[0])


def test_what_is_no_model_is_one_line(tool, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for arguments, words in (
        ([str(tmp_path)], "model_type 'bert' is not known"),
        ([str(tmp_path / "nowhere")], "no config.json here"),
        ([str(tmp_path), "--lora-rank", "0"], "--lora-rank 0: at least 1 is expected"),
    ):
        assert tool.main(arguments) == 2
        printed = capsys.readouterr()
        assert words in printed.err and printed.err.count("\n") == 1 and not printed.out
