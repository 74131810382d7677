"""Triton's kernels in its interpreter, for the tests of machines without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_interpreted(cases: str) -> None:
    """All tests of a file of this folder, in a process of its own, as Triton asks how it is to run when imported.

    Before 3.7 the interpreter's loops fail with numpy 2.4.
    """
    pytest.importorskip("triton", minversion="3.7")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "models" / cases)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


def multiply_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter holds bf16 as whole numbers of 16 bits, and multiplies those; here they are made fp32 first."""
    from triton.runtime import interpreter

    create_dot = interpreter.InterpreterBuilder.create_dot

    def fp32(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        data = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(data, interpreter.tl.float32)

    def dot(self, a, b, *rest):
        return create_dot(self, fp32(a), fp32(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
