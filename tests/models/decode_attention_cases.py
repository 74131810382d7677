"""The decoding kernel in Triton's interpreter, against softmax attention in fp64 and against plain decoding steps.

test_decode_attention.py runs this file in a process of its own, as Triton asks for TRITON_INTERPRET where it is first
imported. By hand: `TRITON_INTERPRET=1 python -m pytest tests/models/decode_attention_cases.py`.
"""

import os
import warnings

import pytest
import torch
from interpreted import multiply_bf16
from torch import Tensor

from minidpost.models import decode_attention as kernel
from minidpost.models import kvcache
from minidpost.models.decode_attention import decode_attention, positions_at_once
from minidpost.models.kvcache import KVCache, T5Cache
from minidpost.models.layers import decoding_kernel
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.sampling.cuda_graphs import CUDAGraphs, PlannedStep, Recorded

assert os.environ.get("TRITON_INTERPRET") == "1", "see the head of this file"
TOLERANCES = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7}}


@pytest.fixture(autouse=True)
def products_of_bf16(monkeypatch):
    """The interpreter multiplies them right."""
    multiply_bf16(monkeypatch)


def fp64_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, n_valid_B: Tensor, scale: float) -> Tensor:
    """The same by its definition; zeros where nothing may be read."""
    after_B11S = torch.arange(k.shape[2]) >= n_valid_B[:, None, None, None]
    score_BGRS = (q.double() @ k.double().mT * scale + bias.double()).masked_fill(after_B11S, -torch.inf)
    clean_BGSK = v.double().masked_fill(after_B11S.mT, 0)
    return score_BGRS.softmax(-1).nan_to_num() @ clean_BGSK


def cached(n_rows: int, n_heads: int, n_read: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values as a step is given them: views of a cache that has more layers, rows and positions."""
    caches_LBGSK = torch.randn(2, 3, n_rows + 2, n_heads, n_read + 9, width).to(dtype)
    return caches_LBGSK[0, 1, :n_rows, :, :n_read], caches_LBGSK[1, 1, :n_rows, :, :n_read]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("bias_shape", ["rows", "heads", "one"])
@pytest.mark.parametrize(
    ("n_queries", "width"), [(1, 64), (3, 16), (8, 64), (16, 32), (20, 64), (1, 128), (4, 128), (33, 16)]
)
def test_it_equals_attention_in_fp64(n_queries, width, bias_shape, dtype):
    """Ragged rows, one empty, one full, one longer than what is read; what lies after a row's own positions is NaN."""
    torch.manual_seed(n_queries * width)
    n_rows, n_heads, n_read = 6, 2, 150
    n_valid_B = torch.tensor([0, 1, 64, 65, n_read, n_read + 7])
    q_BGRK = torch.randn(n_rows, n_heads, n_queries, width).to(dtype)
    k_BGSK, v_BGSK = cached(n_rows, n_heads, n_read, width, dtype)
    after_B11S = torch.arange(n_read) >= n_valid_B[:, None, None, None]
    k_BGSK.masked_fill_(after_B11S.mT, torch.nan)
    v_BGSK.masked_fill_(after_B11S.mT, torch.nan)
    n_bias_rows, n_bias_heads = {"rows": (n_rows, 1), "heads": (n_rows, n_heads), "one": (1, 1)}[bias_shape]
    bias_BG1S = torch.randn(n_bias_rows, n_bias_heads, 1, n_read).to(dtype)
    if n_bias_rows > 1:
        bias_BG1S.masked_fill_(after_B11S, torch.nan)
    ours = decode_attention(q_BGRK, k_BGSK, v_BGSK, bias_BG1S, n_valid_B, width**-0.5)
    theirs = fp64_attention(q_BGRK, k_BGSK, v_BGSK, bias_BG1S, n_valid_B, width**-0.5)
    assert ours.dtype == dtype
    assert (ours[0] == 0).all()
    torch.testing.assert_close(ours.double(), theirs, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_blocks_of_minus_infinity_are_no_nan(dtype):
    """The first block of one row, all of another, and the last block of a third."""
    torch.manual_seed(0)
    width = 64
    block = positions_at_once(width, dtype)
    n_read = 3 * block
    q_BGRK = torch.randn(3, 2, 3, width).to(dtype)
    k_BGSK, v_BGSK = cached(3, 2, n_read, width, dtype)
    bias_B11S = torch.zeros(3, 1, 1, n_read, dtype=dtype)
    bias_B11S[0, ..., :block] = -torch.inf
    bias_B11S[1] = -torch.inf
    bias_B11S[2, ..., -block:] = -torch.inf
    n_valid_B = torch.full((3,), n_read)
    ours = decode_attention(q_BGRK, k_BGSK, v_BGSK, bias_B11S, n_valid_B, 1.0)
    theirs = fp64_attention(q_BGRK, k_BGSK, v_BGSK, bias_B11S, n_valid_B, 1.0)
    assert (ours[1] == 0).all()
    torch.testing.assert_close(ours.double(), theirs, **TOLERANCES[dtype])


def test_scores_that_rise_by_hundreds_do_not_overflow():
    torch.manual_seed(0)
    q_BGRK = torch.randn(2, 1, 4, 16)
    k_BGSK, v_BGSK = cached(2, 1, 400, 16, torch.float32)
    bias_B11S = (torch.arange(400.0) * torch.tensor([[1.0], [-1.0]]))[:, None, None]  # rising and falling
    n_valid_B = torch.tensor([400, 399])
    ours = decode_attention(q_BGRK, k_BGSK, v_BGSK, bias_B11S, n_valid_B, 2.0)
    theirs = fp64_attention(q_BGRK, k_BGSK, v_BGSK, bias_B11S, n_valid_B, 2.0)
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=1e-5)


def test_queries_may_lie_in_any_order():
    """Those of prompts are a transposed view (PromptPlan.by_prompt), and the result is laid out as they are."""
    torch.manual_seed(0)
    q_QRHK = torch.randn(3, 5, 2, 16)
    k_QHSK, v_QHSK = cached(3, 2, 40, 16, torch.float32)
    bias_Q11S = torch.zeros(3, 1, 1, 40)
    n_valid_Q = torch.tensor([40, 3, 17])
    ours = decode_attention(q_QRHK.transpose(1, 2), k_QHSK, v_QHSK, bias_Q11S, n_valid_Q, 0.3)
    assert ours.stride() == q_QRHK.transpose(1, 2).stride()
    theirs = fp64_attention(q_QRHK.transpose(1, 2), k_QHSK, v_QHSK, bias_Q11S, n_valid_Q, 0.3)
    torch.testing.assert_close(ours.double(), theirs, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("width", [16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_blocks_are_small_powers_of_two(width, dtype):
    """Of both keys and values all stages together fit into what Ampere's smaller GPUs give a program, 99 KiB."""
    n_positions = positions_at_once(width, dtype)
    assert n_positions.bit_count() == 1 and 16 <= n_positions <= 128
    if width <= 256:
        assert 2 * kernel.N_STAGES * n_positions * width * dtype.itemsize <= 99 * 1024


def test_it_is_found_where_it_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoding_kernel(torch.device("cpu"), torch.float32, 64) is decode_attention
        assert decoding_kernel(torch.device("cpu"), torch.bfloat16, 128) is decode_attention


# -- whole decoding steps ---------------------------------------------------------------------------------------------

VOCABULARY = 60
MODELS = {
    "t5": lambda: T5(T5Config(VOCABULARY, 32, 16, 64, 2, 2, 2)),
    "llama": lambda: Llama(LlamaConfig(VOCABULARY, 64, 96, 2, n_heads=4, n_kv_heads=2, d_head=16)),
}


def random_model(family: str) -> T5 | Llama:
    torch.manual_seed(0)
    return MODELS[family]().initialise()


def stores(cache: KVCache | T5Cache) -> list[KVCache]:
    return [cache] if isinstance(cache, KVCache) else [cache.own, cache.prompt.store]


def repeat(step: PlannedStep, ids_B: Tensor) -> Recorded:
    """In the place of a CUDA graph: takes the same step anew."""
    logits_BV = step(ids_B)
    return Recorded(ids_B, lambda: logits_BV.copy_(step(ids_B)), logits_BV)


@pytest.mark.parametrize("family", MODELS)
@torch.inference_mode()
@pytest.mark.parametrize("is_recorded", [False, True], ids=["plain", "padded as for graphs"])
def test_decoding_steps_give_the_logits_of_the_plain_way(family, is_recorded, monkeypatch):
    """Rows of several lengths share prompts, start anew and become fewer; what was not written is NaN, and not read."""
    model = random_model(family)
    plain, ours = (model.new_cache(7, max_prompt=90, max_new=80) for _ in range(2))
    for store in stores(ours):
        store.keys_LBGSK.fill_(torch.nan)
        store.values_LBGSK.fill_(torch.nan)
    step = CUDAGraphs(model, ours, repeat) if is_recorded else lambda ids_B: model.decode(ours, ids_B)
    generator = torch.Generator().manual_seed(1)

    def start(row_ids: list[int], lengths: list[int]) -> None:
        prompts = [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
        for cache in (plain, ours):
            model.prefill(cache, row_ids, prompts)

    start([4, 5, 6], [70, 2, 33])
    for cache in (plain, ours):
        cache.copy_rows([4, 4, 4, 5], [0, 1, 2, 3])
    n_used = 0
    for i, n_rows in enumerate([5, 5, 5, 6, 6, 3, 3, 1]):
        if i == 3:
            start([0, 5], [1, 90])  # from here on rows stand at different positions
        ids_B = torch.randint(2, VOCABULARY, (n_rows,), generator=generator)
        expected_BV = model.decode(plain, ids_B)
        with monkeypatch.context() as patch:

            def counted(*arguments):
                nonlocal n_used
                n_used += 1
                return decode_attention(*arguments)

            patch.setattr(kvcache, "attention", counted)
            logits_BV = step(ids_B)
        torch.testing.assert_close(logits_BV, expected_BV, rtol=1e-4, atol=1e-5)
    assert n_used >= 8 * 2


@pytest.mark.parametrize("family", MODELS)
def test_bf16_decoding_steps_follow_the_plain_ones(family, monkeypatch):
    """Of bf16 weights a CPU has fp32 keys: the kernel takes values of another precision than keys."""
    model = random_model(family).bfloat16()
    caches = [model.new_cache(3, max_prompt=20, max_new=10) for _ in range(2)]
    for cache in caches:
        model.prefill(cache, [0, 1, 2], [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 3, 4, 5], [3, 4]])
    ids_TB = torch.randint(2, VOCABULARY, (5, 3), generator=torch.Generator().manual_seed(2))
    expected_TBV = torch.stack([model.decode(caches[0], ids_B) for ids_B in ids_TB])
    monkeypatch.setattr(kvcache, "attention", decode_attention)
    logits_TBV = torch.stack([model.decode(caches[1], ids_B) for ids_B in ids_TB])
    assert (logits_TBV - expected_TBV).abs().max() < 0.03 * expected_TBV.abs().max()
