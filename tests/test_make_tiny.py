"""tools/make_tiny.py: a small base from the toy world, never over a directory that is there."""

import sys

import pytest

from minidpost.errors import UserError
from minidpost.models.weights import load_model
from tools import make_tiny


def test_a_small_base_is_made_once(monkeypatch, tmp_path, capsys):
    output = tmp_path / "tiny"
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", "t5", "--output", str(output), "--examples", "40"])
    make_tiny.main()
    load_model(output)
    with pytest.raises(UserError, match="tiny: exists already; give --output a new name"):
        make_tiny.main()


@pytest.mark.parametrize("family", make_tiny.FAMILIES)
def test_the_bundled_bases_are_not_replaced(monkeypatch, family):
    monkeypatch.setattr(sys, "argv", ["make_tiny.py", family, "--examples", "10"])
    with pytest.raises(UserError, match=f"tiny-{family}: exists already"):
        make_tiny.main()
