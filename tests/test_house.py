"""The rules of the house that a program can check: one-way imports, nothing above PyTorch, no retired words."""

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "minidpost"
COMMANDS = ("train.py", "sample.py", "eval.py", "report.py")
# A module imports only from its own room and from those above it.
ROOMS = (
    *("version", "errors", "progress", "storage", "precision", "processes"),
    *("text", "data", "models", "sampling", "training", "selftraining", "page", "cli"),
)
FOREIGN = {"transformers", "trl", "accelerate", "lightning", "pytorch_lightning", "peft", "deepspeed", "pickle"}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
PRODUCT = [*sorted(PACKAGE.rglob("*.py")), *(ROOT / name for name in COMMANDS)]
each_file = pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
each_module = pytest.mark.parametrize("module", MODULES)

SOURCES = [
    *PRODUCT,
    *(
        path
        for folder in ("tests", "tools", "benchmarks", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ),
]
TEXTS = [
    *SOURCES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(path for folder in ("docs", "benchmarks") for path in sorted((ROOT / folder).rglob("*.md"))),
]
# Words that only we used for what the field has a word for; this file, which lists them, is left out.
RETIRED = re.compile(
    r"\b(lanes?|shelf|draws|layouts|embedded world|of no account|spoilt|unspoilt|drills?|rouses|dormant|wakes"
    r"|winners?|losers?)\b|side_by_side",
    re.IGNORECASE,
)
# Lookups by name in objects that are not ours; everywhere else a Protocol or a dataclass says what is there.
LOOKUPS = {
    ("minidpost/selftraining/estimates.py", "hasattr(os, 'sysconf')"),  # Windows has none
    ("benchmarks/profiling.py", "getattr(owner, name)"),  # replaces functions of torch and of ours to measure them
}


@cache
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


def our_modules(path: Path) -> set[str]:
    """Which of our modules a file imports, as dotted names: `minidpost.models.t5`."""
    names = imported(path)
    return {module for module in MODULES for name in names if f"{name}.".startswith(f"{module}.")}


def room(module: str) -> str:
    """The folder of a module, or the module itself where it lies in none: `models`, `storage`."""
    return module.split(".")[1]


def test_every_module_lies_in_a_room():
    assert {room(module) for module in MODULES} == set(ROOMS)


@each_module
def test_imports_go_one_way(module):
    allowed = ROOMS[: ROOMS.index(room(module)) + 1]
    assert {room(name) for name in our_modules(MODULES[module])} <= set(allowed)


def test_no_imports_form_a_circle():
    TopologicalSorter({module: our_modules(path) for module, path in MODULES.items()}).prepare()  # CycleError


@pytest.mark.parametrize(
    "module",
    ["models.decode_attention", "text.calculator", "text.grading", "sampling.workers", "sampling.token_choice"],
)
def test_some_modules_import_no_other(module):
    assert our_modules(MODULES[f"minidpost.{module}"]) == set()


def test_triton_is_imported_for_the_kernels_alone():
    """By modules that one other imports where they are needed and not at its top: torch for CPUs has no Triton."""
    chosen_by = {"decode_attention": "layers", "packed_kernels": "packed_attention"}
    users = {path for path in PRODUCT if "triton" in {name.split(".")[0] for name in imported(path)}}
    assert users == {MODULES[f"minidpost.models.{kernel}"] for kernel in chosen_by}
    for kernel, chooser in chosen_by.items():
        importers = {name for name, path in MODULES.items() if f"minidpost.models.{kernel}" in our_modules(path)}
        assert importers == {f"minidpost.models.{chooser}"}
        top = ast.parse(MODULES[f"minidpost.models.{chooser}"].read_text(encoding="utf-8")).body
        imports = [ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any(kernel in line for line in imports)


def test_the_sampler_knows_nothing_of_text_and_models():
    assert {room(name) for name in our_modules(MODULES["minidpost.sampling.sampler"])} == {"precision", "sampling"}


@pytest.mark.parametrize(
    ("family", "further"), [("t5", {"models.dropout"}), ("llama", {"models.dropped_attention", "precision", "errors"})]
)
def test_models_know_nothing_of_sampling(family, further):
    ours = our_modules(MODULES[f"minidpost.models.{family}"])
    common = {"models.layers", "models.kvcache", "models.packing", "models.packed_attention"}
    assert ours == {f"minidpost.{name}" for name in common | further}


@each_file
def test_files_open_with_what_they_are(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@each_file
def test_nothing_above_pytorch_is_imported(path):
    assert not FOREIGN & {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=lambda path: path.name)
def test_tests_are_collected_without_gguf(path):
    """It is optional (requirements.txt): whoever lacks it can still run the other files' tests, such as a GPU's."""
    top = [ast.unparse(node) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    assert "import gguf" not in top


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_retired_words_do_not_come_back(path):
    if path == Path(__file__).resolve():
        return
    text = path.read_text(encoding="utf-8")
    words = " ".join(text.replace("_", " ").split())  # parts of names, and phrases that reach over a line's end
    assert {match[0] for spelling in (text, words) for match in RETIRED.finditer(spelling)} == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_attributes_are_not_looked_up_by_name(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    by_name = [call for call in calls if isinstance(call.func, ast.Name)]
    lookups = {ast.unparse(call) for call in by_name if call.func.id in ("getattr", "hasattr")}
    assert {(str(path.relative_to(ROOT)), lookup) for lookup in lookups} <= LOOKUPS


def undocumented(body: list[ast.stmt], prefix: str = "") -> list[str]:
    """The public functions and classes that have no docstring, but for the methods of protocols."""
    found = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef) and not any("Protocol" in ast.unparse(base) for base in node.bases):
                found += undocumented(node.body, f"{prefix}{node.name}.")
    return found


@each_file
def test_public_names_have_docstrings(path):
    assert undocumented(ast.parse(path.read_text(encoding="utf-8")).body) == []
