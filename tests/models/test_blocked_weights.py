"""Products with copies in oneDNN's order: the same numbers, made where they may be, let go at the end."""

from contextlib import ExitStack, nullcontext

import pytest
import torch
from llama_oracle import LLAMA_SHAPES, random_llama
from t5_oracle import SHAPES, random_t5
from torch import nn
from torch.nn import functional as F

from minidpost.models import blocked_weights
from minidpost.models.blocked_weights import copied, copy_in_blocks, has_blocked_products, kept_in_blocks
from minidpost.models.layers import Linear, linear, linears
from minidpost.models.lora import LoRALinear
from minidpost.sampling.sampler import Request, SamplingSettings, sample

needs_blocks = pytest.mark.skipif(
    not has_blocked_products(torch.float32), reason="this build of torch has no products with oneDNN's blocks"
)
PROMPTS = [[5, 6, 7, 8], [9, 10]]


@pytest.fixture
def all_sizes(monkeypatch):
    """Small matrices are copied too."""
    monkeypatch.setattr(blocked_weights, "MIN_ENTRIES_FOR_BLOCKS", 1)


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of all rows that have been multiplied by a copy."""
    shapes = []
    multiply = blocked_weights.multiply

    def counted(x_BTD: torch.Tensor, copy_OD: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(x_BTD.shape))
        return multiply(x_BTD, copy_OD)

    monkeypatch.setattr("minidpost.models.layers.multiply", counted)
    return shapes


@needs_blocks
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 512), (3, 1, 512), (200, 512), (2, 0, 512)])
@torch.inference_mode()
def test_products_are_those_of_torch(dtype, shape, products):
    if not has_blocked_products(dtype):
        pytest.skip("this processor has no such products of bf16 numbers")
    torch.manual_seed(0)
    layer = Linear(512, 300, bias=True, dtype=dtype)
    x = torch.randn(shape).to(dtype)
    expected = F.linear(x, layer.weight) + layer.bias
    with kept_in_blocks([layer.weight]):
        torch.testing.assert_close(layer(x), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        assert products == [shape]


@needs_blocks
@torch.inference_mode()
def test_layers_of_the_same_x_are_one_product(products):
    torch.manual_seed(0)
    layers = [Linear(512, n_outputs, bias=n_outputs < 300) for n_outputs in (300, 100, 200)]
    x = torch.randn(4, 1, 512)
    expected = [F.linear(x, layer.weight, layer.bias) for layer in layers]
    with kept_in_blocks([layer.weight for layer in layers]):
        torch.testing.assert_close(linears(x, *layers), expected, rtol=1e-5, atol=1e-5)
        assert len(products) == 1
        torch.testing.assert_close(linear(x, layers[0].weight), F.linear(x, layers[0].weight), rtol=1e-5, atol=1e-5)
        assert len(products) == 2  # a copy of its own
    assert linears(x, *layers)[0].shape == (4, 1, 300) and len(products) == 2


@needs_blocks
@torch.inference_mode()
def test_a_layer_with_an_adapter_adds_it(products):
    layer = LoRALinear(Linear(512, 300, bias=False), 2, 4.0)
    nn.init.normal_(layer.lora_B)
    plain = Linear(512, 300)
    x = torch.randn(4, 1, 512)
    expected = [layer(x), plain(x)]
    with kept_in_blocks([layer.weight, plain.weight]):
        torch.testing.assert_close(linears(x, layer, plain), expected, rtol=1e-5, atol=1e-5)
    assert len(products) == 2


@needs_blocks
@pytest.mark.parametrize("name", [*SHAPES, *LLAMA_SHAPES])
def test_a_model_decodes_the_same_logits(name, all_sizes, products):
    """And with every matrix that it multiplies by in blocks: nothing falls back to a plain product unnoticed."""
    model = random_t5(SHAPES[name]) if name in SHAPES else random_llama(LLAMA_SHAPES[name])
    logits = []
    for decoding in (nullcontext(), model.decoding()):
        with decoding:
            cache = model.new_cache(2, 8, 4)
            ids = model.prefill(cache, [0, 1], PROMPTS)
            logits += [model.decode(cache, torch.tensor(ids)), model.decode(cache, torch.tensor([3, 4]))]
            used = {id(weight) for joined in blocked_weights._copies for weight in joined}
    torch.testing.assert_close(logits[2:], logits[:2], rtol=1e-4, atol=1e-4)
    assert products and used == {id(weight) for weight in model.matrices()}


@needs_blocks
def test_copies_end_with_the_decoding_whatever_ends_it(all_sizes):
    first, second = Linear(8, 8), Linear(8, 8)
    with pytest.raises(KeyboardInterrupt), kept_in_blocks([first.weight]):
        assert copy_in_blocks(first.weight) is not None
        with kept_in_blocks([first.weight, second.weight]):
            assert copy_in_blocks(second.weight) is not None
        # What is open still keeps its own.
        assert copy_in_blocks(second.weight) is None and copy_in_blocks(first.weight) is not None
        raise KeyboardInterrupt
    assert copy_in_blocks(first.weight) is None
    assert not blocked_weights._copies and not blocked_weights._decoding


@needs_blocks
def test_of_two_decodings_of_a_model_the_later_one_keeps_its_copies(all_sizes):
    """As of two samplings that take turns and do not end together."""
    layer = Linear(8, 8)
    with ExitStack() as later:
        with kept_in_blocks([layer.weight]):
            later.enter_context(kept_in_blocks([layer.weight]))
            copy = copy_in_blocks(layer.weight)
        assert copy is not None and copy_in_blocks(layer.weight) is copy
    assert not blocked_weights._copies and not blocked_weights._decoding


@needs_blocks
def test_each_sampling_sees_the_weights_of_its_time(all_sizes, products):
    model = random_llama(LLAMA_SHAPES["plain"])
    settings = SamplingSettings(temperature=0.0, max_new_tokens=6, slots=2)
    requests = [Request((5, 6, 7), ""), Request((8, 9), "")]

    def ids() -> list[list[int]]:
        rows = sample(model, requests, settings, -1)
        return [row.token_ids for row in sorted(rows, key=lambda row: row.request_index)]

    before = ids()
    assert products and not blocked_weights._copies
    with torch.no_grad():
        model.output_matrix.neg_()  # what was least likely is likeliest
    assert ids() != before
    rows = sample(model, requests, settings, -1)
    next(rows)
    rows.close()
    assert not blocked_weights._copies


def test_what_is_not_copied(monkeypatch):
    weights = list(Linear(512, 300).parameters())[:1]
    small = Linear(16, 16).weight
    with kept_in_blocks([small]):
        assert copy_in_blocks(small) is None
    assert copied(weights, torch.float64, "cpu") == []
    assert copied(weights, torch.float32, "cuda") == copied(weights, torch.bfloat16, "meta") == []
    with kept_in_blocks([]):
        assert copy_in_blocks(*weights) is None
    monkeypatch.setattr(blocked_weights, "MAX_ENTRIES_FOR_BLOCKS", 512 * 300 - 1)
    assert copied(weights, torch.float32, "cpu") == []


@pytest.mark.parametrize("error", [AttributeError, NotImplementedError, RuntimeError])
def test_without_the_operations_products_are_plain(monkeypatch, error):
    def missing(weight_OD: torch.Tensor) -> torch.Tensor:
        raise error("no such operation")

    has_blocked_products.cache_clear()
    monkeypatch.setattr(blocked_weights, "in_blocks", missing)
    try:
        layer = Linear(512, 300)
        x = torch.randn(4, 512)
        with torch.inference_mode(), kept_in_blocks([layer.weight]):
            torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)
    finally:
        has_blocked_products.cache_clear()


@needs_blocks
def test_training_multiplies_by_the_weights_themselves(all_sizes, products):
    """A copy has no gradient."""
    layer = Linear(8, 8)
    with kept_in_blocks([layer.weight]):
        sum(y.sum() for y in linears(torch.ones(2, 8), layer, layer)).backward()
    assert not products and layer.weight.grad is not None and layer.weight.grad.abs().sum() > 0
