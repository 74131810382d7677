"""Fixtures all tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minidpost.models import llama, t5
from minidpost.models.dropout import drop
from minidpost.models.dropped_attention import dropped_attention
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import save_model
from minidpost.text.templates import T5Template
from minidpost.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]

# Tests run side by side, a process a core (-n 2): with threads of their own they would wait for each other most of the
# time. Commands that they start have one thread too, if not told otherwise.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real datasets, tokenizers and configs that lies beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("../shared (real data, tokenizers, configs) is not here")
    return folder


@pytest.fixture
def dropped(monkeypatch) -> list[tuple[tuple[int, ...], float]]:
    """Fills, as models run, with the shape and the rate of everything that is dropped, attention weights included."""
    noted = []
    plain_dropout, plain_attention = F.dropout, F.scaled_dot_product_attention

    def dropout(x, p=0.5, training=True, inplace=False):
        if training and p > 0:
            noted.append((tuple(x.shape), p))
        return plain_dropout(x, p, training, inplace)

    def noted_drop(x, dropout):
        if dropout > 0:
            noted.append((tuple(x.shape), dropout))
        return drop(x, dropout)

    def attention(q, k, v, attn_mask=None, dropout_p=0.0, **options):
        if dropout_p > 0:
            noted.append(((*q.shape[:-1], k.shape[-2]), dropout_p))
        return plain_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, **options)

    def own_attention(q, k, v, mask, *, dropout, scale):
        noted.append(((*q.shape[:-1], k.shape[-2]), dropout))
        return dropped_attention(q, k, v, mask, dropout=dropout, scale=scale)

    monkeypatch.setattr(llama, "dropped_attention", own_attention)
    monkeypatch.setattr(t5, "drop", noted_drop)
    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return noted


@pytest.fixture
def out_of_memory() -> Callable[..., None]:
    """A function that runs out of a GPU's memory, whatever it is asked."""

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    return fail


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
