"""Nothing that is read can run: no eval, exec, pickle or shell anywhere in the product, found in the syntax tree.

Names are followed through the file's own imports (`import torch as t; t.load`, `from os import system`), so that
methods of the same name (`model.eval()`, `re.compile`) are told apart.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = sorted(
    path
    for pattern in ("*.py", "minidpost/**/*.py", "tools/**/*.py", "benchmarks/**/*.py")
    for path in ROOT.glob(pattern)
)
BUILTINS = {"eval", "exec", "compile", "__import__"}
MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "code", "codeop", "runpy"),
    *("importlib.import_module", "importlib.util", "importlib.machinery", "imp", "pty", "commands", "builtins"),
    *("torch.load", "torch.jit.load", "torch.package", "torch.hub", "torch.export.load", "torch.serialization"),
    *("numpy.load", "numpy.fromregex", "yaml", "ruamel", "xml.sax", "pandas.read_pickle", "ctypes.CDLL"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *(f"os.{kind}{end}" for kind in ("exec", "spawn", "posix_spawn") for end in ("", "l", "le", "lp", "v", "ve", "vp")),
}
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}  # refused unless they are False


def offences(source: str) -> list[str]:
    """What in a file could run what it reads, as `line number: name`."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found += forbidden(alias.name, node)
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found += forbidden(f"{node.module}.{alias.name}", node)
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in BUILTINS:
            found.append(f"{node.lineno}: {node.id}")
        elif isinstance(node, ast.Attribute):
            found += forbidden(dotted(node, names), node)
        elif isinstance(node, ast.keyword) and node.arg in KEYWORDS:
            if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                found.append(f"{node.value.lineno}: {node.arg}")
        elif isinstance(node, ast.Constant) and node.value in ("__builtins__", "__import__"):
            found.append(f"{node.lineno}: {node.value}")
    return found


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`t.jit.load` as the name it was imported by: torch.jit.load; "" where it does not begin with a module."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return names.get(node.id, "") if isinstance(node, ast.Name) else ""


def forbidden(name: str, node: ast.AST) -> list[str]:
    """The offence in using this dotted name, if it or what it belongs to is forbidden."""
    parts = name.split(".")
    prefixes = {".".join(parts[:n]) for n in range(1, len(parts) + 1)}
    return [f"{node.lineno}: {name}"] if prefixes & MODULES else []


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_it_reads(path):
    assert offences(path.read_text(encoding="utf-8")) == []


def test_the_whole_product_is_looked_at():
    seen = {str(path.relative_to(ROOT)) for path in PRODUCT}
    assert {"train.py", "sample.py", "eval.py", "minidpost/models/weights.py", "benchmarks/effect.py"} <= seen


@pytest.mark.parametrize(
    "source",
    [
        *("eval(text)", "f = eval", "exec(text)", "compile(text, '', 'exec')", "__import__(name)", "import pickle"),
        *("import torch\ntorch.load(path)", "import torch as t\nt.load(path)", "from torch import load as l\nl(path)"),
        *(
            "import torch.jit\ntorch.jit.load(path)",
            "import os\nos.system(text)",
            "from os import system\nsystem(text)",
        ),
        *("import os\nos.execvp(a, b)", "import os as o\no.popen(text)", "from importlib import import_module"),
        *("import importlib\nimportlib.import_module(name)", "import subprocess\nsubprocess.run(text, shell=True)"),
        *("import subprocess as s\ns.Popen(text, shell=flag)", "import numpy as np\nnp.load(path)", "import yaml"),
        *("load(path, allow_pickle=True)", "getattr(module, '__import__')(name)", "import builtins\nbuiltins.eval"),
        *("def f():\n    import dill", "AutoModel.from_pretrained(name, trust_remote_code=True)"),
        *("globals()['__builtins__']", "import xml.sax", "from pickle import loads", "import runpy"),
    ],
)
def test_what_would_be_found(source):
    assert len(offences(source)) >= 1


@pytest.mark.parametrize(
    "source",
    [
        *("model.eval()", "import re\nre.compile(text)", "import torch\ntorch.compile(model)", "tokenizer.load(path)"),
        *("import json\njson.load(stream)", "import subprocess\nsubprocess.run(words, shell=False)", "'eval(text)'"),
        *("from importlib.metadata import version", "import os\nos.replace(a, b)", "# exec(text)"),
    ],
)
def test_what_is_no_offence(source):
    assert offences(source) == []
