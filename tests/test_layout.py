"""The rules of the house that a program can check: one-way imports, short modules, nothing above PyTorch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minidpost"
COMMANDS = ("train.py", "sample.py", "eval.py")
# A module imports only from those above it.
ORDER = """
    files calculator answers formats tokenizer toy datasets hub kvcache t5 llama layouts checkpoint lanes draws
    graphs sampler batches objectives optimizer resume sft dpo selection generation evaluation presets flops memory
    rundir selftrain report commands
""".split()
MAX_LINES = {"t5.py": 300, "llama.py": 250, **dict.fromkeys(COMMANDS, 120)}
FOREIGN = {"transformers", "trl", "accelerate", "lightning", "pytorch_lightning", "peft", "deepspeed", "pickle"}

PRODUCT = [*sorted(PACKAGE.glob("*.py")), *(ROOT / name for name in COMMANDS)]
each_file = pytest.mark.parametrize("path", PRODUCT, ids=lambda path: path.name)


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own(path: Path) -> set[str]:
    """Which of our modules a file imports."""
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "minidpost" and part[1] != "__version__"}


def test_every_module_has_its_place():
    assert sorted(ORDER) == sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


@each_file
def test_imports_go_one_way(path):
    above = ORDER[: ORDER.index(path.stem)] if path.stem in ORDER else [] if path.stem == "__init__" else ORDER
    assert own(path) <= set(above)


@pytest.mark.parametrize("name", ["lanes", "draws", "graphs", "kvcache", "calculator", "selection"])
def test_some_modules_know_nothing_of_the_others(name):
    assert own(PACKAGE / f"{name}.py") == set()


def test_the_sampler_knows_nothing_of_text_and_models():
    assert own(PACKAGE / "sampler.py") == {"draws", "graphs", "lanes"}


def test_models_know_nothing_of_sampling():
    assert own(PACKAGE / "t5.py") == {"kvcache"}


@each_file
def test_files_are_short_and_open_with_what_they_are(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES.get(path.name, 350)
    assert ast.get_docstring(ast.parse(text))


@each_file
def test_nothing_above_pytorch_is_imported(path):
    assert not FOREIGN & {name.split(".")[0] for name in imported(path)}
