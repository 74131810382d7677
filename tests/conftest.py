"""Fixtures all tests share."""

from pathlib import Path

import pytest
import torch

from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import save_model
from minidpost.text.templates import T5Template
from minidpost.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real datasets, tokenizers and configs that lies beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared (real data, tokenizers, configs) is not here")
    return folder


@pytest.fixture(scope="session")
def tiny_template() -> T5Template:
    """How a T5 with the bundled vocabulary writes."""
    return T5Template(load_tokenizer(ROOT / "weights" / "tiny-t5"))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """A checkpoint of random weights, one layer of width 16, with the bundled vocabulary."""
    tokenizer = load_tokenizer(ROOT / "weights" / "tiny-t5")
    torch.manual_seed(0)
    model = T5(T5Config(tokenizer.vocab_size, 16, 8, 24, 2, 1, 1, dropout=0.1)).initialise()
    directory = tmp_path_factory.mktemp("models") / "tiny-random"
    save_model(model, directory, tokenizer.files)
    return directory
