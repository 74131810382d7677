"""The kernels of packed attention, against attention in fp64 and against padded batches: interpreted, or on a GPU.

test_packed_kernels.py runs this file in a process of its own, as Triton asks for TRITON_INTERPRET where it is first
imported; so does test_gpu.py, without. By hand: `TRITON_INTERPRET=1 python -m pytest
tests/models/packed_kernels_cases.py`.
"""

import os
from dataclasses import dataclass

import pytest
import torch
from interpreted import multiply_bf16
from torch import Tensor

from minidpost.models import llama, t5
from minidpost.models.hf_config import Model
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.packed_attention import try_kernel
from minidpost.models.packed_kernels import packed_attention
from minidpost.models.packing import PositionBias, Rows, packing_of, rows_of
from minidpost.models.t5 import T5, T5Config
from minidpost.training.batching import TokenizedExample, collate
from minidpost.training.losses import log_probabilities
from minidpost.training.optim import enable_activation_checkpointing

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"


@dataclass(frozen=True)
class Shape:
    """Tokens of the rows of queries and of keys, which row of keys each row of queries reads, and heads."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    key_row: tuple[int, ...]
    heads: int = 2
    key_heads: int = 2
    width: int = 16
    has_bias: bool = False
    is_causal: bool = False
    scale: float = 1.0


SHAPES = {
    "T5's encoder": Shape((5, 70, 1), (5, 70, 1), (0, 1, 2), has_bias=True),
    "T5's decoder": Shape((5, 100, 64), (5, 100, 64), (0, 1, 2), has_bias=True, is_causal=True),
    "cross-attention, shared prompts": Shape((3, 70, 9, 65), (66, 7), (1, 0, 1, 0), width=32),
    "Llama": Shape((5, 70, 1), (5, 70, 1), (0, 1, 2), 6, 2, 32, is_causal=True, scale=0.2),
    "one token": Shape((1,), (1,), (0,), 1, 1),
    "keys that nobody reads, heads no power of two": Shape((3, 66), (7, 65, 70), (2, 0), 6, 3),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch):
    """The interpreter multiplies them right."""
    if IS_INTERPRETED:
        multiply_bf16(monkeypatch)
    else:
        torch.backends.cuda.matmul.allow_tf32 = False


def mask_of(lengths: tuple[int, ...]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def rows_for(shape: Shape) -> Rows:
    row_B = None if shape.key_row == (*range(len(shape.keys)),) else torch.tensor(shape.key_row)
    queries, keys = (packing_of(mask_of(lengths)).to(DEVICE) for lengths in (shape.queries, shape.keys))
    return rows_of(queries, keys, None if row_B is None else row_B.to(DEVICE))


def inputs_for(shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], PositionBias | None]:
    """Queries, keys and values, not one behind the other in memory, and the table; all want gradients."""
    torch.manual_seed(0)
    n_queries, n_keys = sum(shape.queries), sum(shape.keys)
    tensors = [
        torch.randn(n, heads + 1, shape.width + 16).to(DEVICE, dtype)[:, :heads, : shape.width].requires_grad_()
        for n, heads in ((n_queries, shape.heads), (n_keys, shape.key_heads), (n_keys, shape.key_heads))
    ]
    if not shape.has_bias:
        return tensors, None
    zero = max(shape.queries) - 1
    table_EH = torch.randn(7, shape.heads, device=DEVICE, requires_grad=True)
    entry_X = torch.randint(7, (2 * zero + 1,), dtype=torch.int32).to(DEVICE)
    bias_HX = table_EH.detach().T[:, entry_X].contiguous()
    return [*tensors, table_EH], PositionBias(bias_HX, table_EH, entry_X, zero)


def fp64_attention(
    tensors: list[Tensor], bias: PositionBias | None, shape: Shape, factors: dict[int, Tensor] | None = None
) -> Tensor:
    """The same by its definition; `factors` (H, T, S) of each row multiply the weights."""
    q_rows, k_rows, v_rows = (
        tensor.double().split(lengths)
        for tensor, lengths in zip(tensors[:3], (shape.queries, shape.keys, shape.keys), strict=True)
    )
    heads_a_key = shape.heads // shape.key_heads
    found = []
    for row, key_row in enumerate(shape.key_row):
        k_SHK = k_rows[key_row].repeat_interleave(heads_a_key, 1)
        v_SHK = v_rows[key_row].repeat_interleave(heads_a_key, 1)
        score_HTS = torch.einsum("thk,shk->hts", q_rows[row], k_SHK) * shape.scale
        distance_TS = (torch.arange(len(k_SHK)) - torch.arange(len(q_rows[row]))[:, None]).to(DEVICE)
        if bias is not None:
            score_HTS = score_HTS + bias.table_EH.double()[bias.entry_X[distance_TS + bias.zero]].permute(2, 0, 1)
        if shape.is_causal:
            score_HTS = score_HTS.masked_fill(distance_TS > 0, -torch.inf)
        weight_HTS = score_HTS.softmax(-1)
        if factors is not None:
            weight_HTS = weight_HTS * factors[row]
        found.append(torch.einsum("hts,shk->thk", weight_HTS, v_SHK))
    return torch.cat(found)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_gradients_are_those_of_attention(shape, dtype):
    tensors, bias = inputs_for(shape, dtype)
    y_NHK = packed_attention(*tensors[:3], rows_for(shape), bias, scale=shape.scale, is_causal=shape.is_causal)
    expected_NHK = fp64_attention(tensors, bias, shape)
    grad_NHK = torch.randn_like(y_NHK)
    gradients = torch.autograd.grad(y_NHK, tensors, grad_NHK)
    expected = torch.autograd.grad(expected_NHK, tensors, grad_NHK.double())
    assert y_NHK.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for name, ours, theirs in zip(
        ("y", "q", "k", "v", "table"), (y_NHK, *gradients), (expected_NHK, *expected), strict=False
    ):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=0.1)
        assert error < tolerance, f"{name}: {error}"


def test_a_table_that_is_not_trained_has_no_gradient_and_the_others_theirs():
    shape = SHAPES["T5's decoder"]
    tensors, bias = inputs_for(shape)

    def gradients() -> tuple[Tensor | None, ...]:
        y_NHK = packed_attention(*tensors[:3], rows_for(shape), bias, scale=1.0, is_causal=True)
        return torch.autograd.grad(y_NHK.square().sum(), [x for x in tensors if x.requires_grad])

    expected = gradients()
    tensors[3].requires_grad_(False)
    found = gradients()
    assert (len(expected), len(found)) == (4, 3)
    for ours, theirs in zip(found, expected, strict=False):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_trial_passes_in_any_mode_and_notices_wrong_gradients(gradients):
    """The first pass may be one without gradients; and the trial's kernels are those that need most."""
    given = []

    def kernel(q_NHK, k_MGK, v_MGK, rows, bias, **options):
        given.append((bias, options))
        return packed_attention(q_NHK, k_MGK, v_MGK, rows, bias, **options)

    with gradients():
        try_kernel(kernel, torch.device(DEVICE), torch.float32 if IS_INTERPRETED else torch.bfloat16, 16)
    (bias, options), *_ = given
    assert bias.table_EH.grad is not None and options["is_causal"] and 0 < options["dropout"] < 1e-3
    with gradients(), pytest.raises(RuntimeError, match="a gradient of 1"):
        try_kernel(lambda *tensors, **options: 2 * kernel(*tensors, **options), torch.device(DEVICE), torch.float32, 16)


def factors_of(shape: Shape, dropout: float, seed: int) -> dict[int, Tensor]:
    """What dropout multiplies each weight by, (H, T, S) of each row: all weights alike, each value another column."""
    n_keys = max(shape.keys)
    width = 1 << (n_keys - 1).bit_length()
    width = max(width, 16)
    q_NHK = torch.zeros(sum(shape.queries), shape.heads, width, device=DEVICE)
    k_MGK = torch.zeros(sum(shape.keys), shape.key_heads, width, device=DEVICE)
    of_row = [torch.eye(width, device=DEVICE)[:length, None].expand(-1, shape.key_heads, -1) for length in shape.keys]
    y_NHK = packed_attention(q_NHK, k_MGK, torch.cat(of_row), rows_for(shape), scale=1.0, dropout=dropout, seed=seed)
    rows = {}
    for row, y_THK in enumerate(y_NHK.split(shape.queries)):
        n = shape.keys[shape.key_row[row]]
        rows[row] = (y_THK[..., :n] * n).permute(1, 0, 2).double()
    return rows


@each_shape
def test_with_dropout_gradients_are_those_of_the_weights_that_were_not_dropped(shape):
    factors = factors_of(shape, dropout=0.3, seed=5)
    assert sum((factor == 0).sum() for factor in factors.values()) > 0 or shape == SHAPES["one token"]
    tensors, bias = inputs_for(shape)
    y_NHK = packed_attention(
        *tensors[:3], rows_for(shape), bias, scale=shape.scale, is_causal=shape.is_causal, dropout=0.3, seed=5
    )
    expected_NHK = fp64_attention(tensors, bias, shape, factors)
    torch.testing.assert_close(y_NHK.double(), expected_NHK, rtol=1e-4, atol=1e-5)
    grad_NHK = torch.randn_like(y_NHK)
    gradients = torch.autograd.grad(y_NHK, tensors, grad_NHK)
    expected = torch.autograd.grad(expected_NHK, tensors, grad_NHK.double())
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-3, atol=1e-4)


def test_dropout_is_as_often_as_said_and_each_weight_for_itself():
    shape = Shape((120, 100), (100, 128), (0, 1), heads=4, key_heads=4)
    factors = factors_of(shape, dropout=0.2, seed=9)
    stays = torch.cat([factor.flatten() for factor in factors.values()])
    assert set(stays.mul(0.8).round(decimals=5).tolist()) == {0.0, 1.0}
    n = len(stays)
    dropped = (stays == 0).double()
    assert abs(dropped.mean() - 0.2) < 4 * (0.2 * 0.8 / n) ** 0.5
    # Neighbours in any direction, and heads, have nothing to do with each other.
    centred_HTS = (factors[0] == 0).double() - 0.2
    for other_HTS in (
        centred_HTS.roll(1, 0),
        centred_HTS.roll(1, 1),
        centred_HTS.roll(1, 2),
        centred_HTS.roll((1, -1), (1, 2)),
    ):
        assert abs((centred_HTS * other_HTS).mean() / 0.16) < 4 / centred_HTS.numel() ** 0.5
    again = factors_of(shape, dropout=0.2, seed=9)
    other = factors_of(shape, dropout=0.2, seed=10)
    assert all(torch.equal(again[row], factors[row]) for row in factors)
    agreement = torch.cat([((other[row] == 0) == (factors[row] == 0)).flatten().double() for row in factors]).mean()
    assert abs(agreement - (0.2**2 + 0.8**2)) < 4 * (0.68 * 0.32 / n) ** 0.5


def a_t5() -> T5:
    torch.manual_seed(0)
    return T5(T5Config(50, 24, 16, 24, 2, n_encoder_layers=2, n_decoder_layers=2)).initialise().to(DEVICE)


def a_llama() -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(50, 24, 40, 2, n_heads=4, n_kv_heads=2, d_head=16, qk_norm=True, tied=True, dropout=0.1)
    return Llama(config).initialise().to(DEVICE)


def batch_of(shared_prompts: bool) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(50, (n,), generator=generator).tolist())

    examples = [TokenizedExample(ids(source), ids(target)) for source, target in ((3, 9), (1, 1), (12, 2), (70, 66))]
    if shared_prompts:
        examples += [TokenizedExample(examples[2].prompt_ids, ids(4)), TokenizedExample(examples[0].prompt_ids, ids(1))]
    return examples


def results(model: Model, batch: list[TokenizedExample], *, is_packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probabilities of the labels, and each parameter's gradient."""
    model.zero_grad()
    log_probability_BT = log_probabilities(model, collate(model.config, batch, DEVICE, is_packed))
    weight_BT = torch.linspace(0.5, 2, log_probability_BT.numel(), device=DEVICE).view(log_probability_BT.shape)
    (log_probability_BT * weight_BT).sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return log_probability_BT.detach(), gradients


@pytest.fixture
def used_kernel(monkeypatch) -> list[int]:
    """The models take the kernel, in fp32; the list has a number for each of its calls."""
    calls: list[int] = []

    def counted(*arguments, **keywords):
        calls.append(1)
        return packed_attention(*arguments, **keywords)

    for module in (t5, llama):
        monkeypatch.setattr(module, "packed_kernel", lambda weight, width: counted)
    return calls


@pytest.mark.parametrize("shared_prompts", [False, True], ids=["prompts of their own", "shared prompts"])
@pytest.mark.parametrize("make", [a_t5, a_llama])
def test_models_with_the_kernel_have_the_results_of_padded_rows(make, shared_prompts, used_kernel):
    model = make().eval()
    batch = batch_of(shared_prompts)
    expected_BT, expected_gradients = results(model, batch, is_packed=False)
    assert not used_kernel
    packed_BT, gradients = results(model, batch, is_packed=True)
    assert len(used_kernel) == (6 if isinstance(model, T5) else 2)
    torch.testing.assert_close(packed_BT, expected_BT, rtol=1e-4, atol=1e-4)
    assert gradients.keys() == expected_gradients.keys()
    for name, expected in expected_gradients.items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradients[name], expected, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("make", [a_t5, a_llama])
def test_dropout_is_seeded_and_repeated_by_activation_checkpointing(make, used_kernel):
    model = make().train()
    batch = batch_of(False)

    def seeded(seed: int) -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(seed)
        return results(model, batch, is_packed=True)

    first_BT, first_gradients = seeded(3)
    assert not torch.equal(seeded(4)[0], first_BT)
    n_calls = len(used_kernel)
    enable_activation_checkpointing(model)
    again_BT, again_gradients = seeded(3)
    assert len(used_kernel) == 2 * n_calls  # as many as the two before, being computed twice
    assert torch.equal(again_BT, first_BT)
    for name, gradient in first_gradients.items():
        torch.testing.assert_close(again_gradients[name], gradient, msg=name)
