"""What only a CUDA device can show: bf16 sampling and training steps of a real shape. Run with `pytest -m gpu`."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from minidpost.models import layers, packed_attention
from minidpost.models.layers import attention, decoding_kernel, mask_bias
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.precision import autocast
from minidpost.sampling.sampler import Request, SamplingSettings, sample
from minidpost.training.batching import TokenizedExample, collate
from minidpost.training.dpo import DPOSettings, PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.losses import log_probabilities
from minidpost.training.optim import Schedule, read_log
from minidpost.training.sft import SFTSettings, train_sft

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[1]
FLAN_T5_SMALL = T5Config(32128, 512, 64, 1024, 6, 8, 8)
SMALL_LLAMA = LlamaConfig(32000, 512, 1024, 8, n_heads=8, n_kv_heads=2, d_head=64)


@pytest.fixture(params=["t5", "llama"])
def model(request) -> T5 | Llama:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    torch.manual_seed(0)
    model = T5(FLAN_T5_SMALL) if request.param == "t5" else Llama(SMALL_LLAMA)
    return model.initialise().to("cuda")


def sequences(n: int) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(5, 60, (n, 2), generator=generator).tolist()

    def random_ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 32000, (length,), generator=generator).tolist())

    return [TokenizedExample(random_ids(source), (*random_ids(target), 1)) for source, target in lengths]


def test_sampling_in_bf16_gives_every_request_its_completion(model):
    requests = [Request(s.prompt_ids, str(i // 2), i % 2) for i, s in enumerate(sequences(20))]
    settings = SamplingSettings(temperature=0.7, max_new_tokens=24, slots=8)
    rows = list(sample(model.to(torch.bfloat16), requests, settings, eos_id=1))
    assert sorted(row.request_index for row in rows) == list(range(20))
    assert all(1 <= len(row.token_ids) <= 24 for row in rows)


def test_recorded_steps_give_the_completions_of_plain_ones(model):
    """In fp32, where hardly a token hangs on the rounding; a failure to record would be a warning, which fails."""
    requests = [Request(s.prompt_ids, str(i // 4), i % 4) for i, s in enumerate(sequences(40))]
    settings = SamplingSettings(temperature=0.7, max_new_tokens=100, slots=16)
    rows = sample(model, requests, settings, eos_id=1, use_cuda_graphs=False, overlap=False)
    expected = {row.request_index: row.token_ids for row in rows}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = list(sample(model, requests, settings, eos_id=1))
    same = sum(row.token_ids == expected[row.request_index] for row in rows)
    assert same >= 0.95 * len(requests), f"{same} of {len(requests)} completions are the same"


def test_packed_tokens_give_the_log_probabilities_and_gradients_of_a_cpu(model):
    """In fp32: there padded rows are computed, and on a GPU tokens alone; attention is another kernel's."""
    torch.backends.cuda.matmul.allow_tf32 = False
    batch = sequences(24)
    results = {}
    for device in ("cuda", "cpu"):
        model = model.to(device).eval()
        model.zero_grad()
        inputs = collate(model.config, batch, device)
        assert (inputs.inputs[-1] is not None) == (device == "cuda")
        log_probability_BT = log_probabilities(model, inputs)
        (log_probability_BT.sum() / 100).backward()  # not the mean, as padding differs
        gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters()}
        results[device] = log_probability_BT.sum(1).detach().cpu(), gradients
    torch.testing.assert_close(results["cuda"][0], results["cpu"][0], rtol=1e-4, atol=1e-3)
    for name, expected in results["cpu"][1].items():
        error = (results["cuda"][1][name] - expected).norm() / expected.norm()
        assert error < 1e-3, f"{name}: {error:.1e}"


def test_the_packed_kernels_give_the_gradients_of_padded_rows(model, monkeypatch):
    """In bf16, which both round to; prompts that several targets share among them."""
    batch = sequences(24)
    batch += [TokenizedExample(example.prompt_ids, example.target_ids[::-1]) for example in batch[:6]]
    model.eval()
    inputs = collate(model.config, batch, "cuda")

    def results() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad()
        with autocast(torch.device("cuda"), torch.bfloat16):
            log_probability_BT = log_probabilities(model, inputs)
        (log_probability_BT.sum() / 100).backward()
        gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
        return log_probability_BT.detach().sum(1), gradients

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours_B, gradients = results()
        assert packed_attention.kernel_for(inputs.label_BT.device, torch.bfloat16, 64) is not None
    monkeypatch.setattr(packed_attention, "kernel_for", lambda *kind: None)
    theirs_B, expected_gradients = results()
    assert ((ours_B - theirs_B).abs() / theirs_B.abs()).max() < 0.01
    for name, expected in expected_gradients.items():
        error = (gradients[name] - expected).norm() / expected.norm()
        assert error < 0.05, f"{name}: {error:.1e}"


SOME_CASES = "(bfloat16 and attention) or (not_dropped and decoder) or as_often or (models_with and t5)"


def test_the_packed_kernels_equal_attention():
    """Cases of packed_kernels_cases.py, compiled: all would take some minutes of compiling."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    cases = str(ROOT / "tests" / "models" / "packed_kernels_cases.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", SOME_CASES, cases]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


# Rows, heads of keys, queries of each, positions, width; and whether each row or each head has a bias of its own. The
# last shape has more queries than one program takes.
ATTENTION_SHAPES = {
    "smollm2-135m": (64, 3, 3, 300, 64, "rows"),
    "llama-3-8b": (16, 8, 4, 200, 128, "rows"),
    "flan-t5-large, own tokens": (64, 16, 1, 192, 64, "heads"),
    "flan-t5-large, prompts": (8, 16, 8, 130, 64, "rows"),
    "tiny": (5, 2, 20, 77, 32, "rows"),
}


@pytest.mark.parametrize("shape", ATTENTION_SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@torch.inference_mode()
def test_the_decoding_kernel_equals_attention_in_fp64(shape, dtype):
    """In a CUDA graph that is replayed with other lengths; after a row's own positions there is nothing but NaN."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    n_rows, n_heads, n_queries, n_read, width, bias_kind = ATTENTION_SHAPES[shape]
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)

    def numbers(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoding_kernel(device, dtype, width) is not None
    q_BGRK = numbers(n_rows, n_heads, n_queries, width)
    whole_BGSK = numbers(2, n_rows + 2, n_heads, n_read + 8, width)
    k_BGSK, v_BGSK = (whole_BGSK[i, :n_rows, :, :n_read].clone() for i in range(2))
    kept_BGSK = torch.full_like(whole_BGSK, torch.nan)  # what a step is given views of
    kept_k_BGSK, kept_v_BGSK = (kept_BGSK[i, :n_rows, :, :n_read] for i in range(2))
    position_bias_BG1S = numbers(n_rows, n_heads if bias_kind == "heads" else 1, 1, n_read)
    bias_BG1S = torch.empty_like(position_bias_BG1S)
    n_valid_B = torch.ones(n_rows, dtype=torch.long, device=device)

    def set_lengths(lengths: list[int]) -> None:
        n_valid_B.copy_(torch.tensor([lengths[row % len(lengths)] for row in range(n_rows)]))
        is_valid_BS = torch.arange(n_read, device=device) < n_valid_B[:, None]
        bias_BG1S.copy_(position_bias_BG1S + mask_bias(is_valid_BS, dtype))
        for kept, numbers_BGSK in ((kept_k_BGSK, k_BGSK), (kept_v_BGSK, v_BGSK)):
            kept.copy_(numbers_BGSK.masked_fill(~is_valid_BS[:, None, :, None], torch.nan))

    def step() -> torch.Tensor:
        return attention(q_BGRK, kept_k_BGSK, kept_v_BGSK, bias_BG1S, n_valid_B, width**-0.5)

    def check(y_BGRK: torch.Tensor) -> None:
        score_BGRS = q_BGRK.double() @ k_BGSK.double().mT * width**-0.5 + bias_BG1S.double()
        expected_BGRK = score_BGRS.softmax(-1).nan_to_num() @ v_BGSK.double()
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-5
        assert y_BGRK.dtype == dtype
        torch.testing.assert_close(y_BGRK.double(), expected_BGRK, rtol=tolerance, atol=tolerance)

    set_lengths([n_read, 1, n_read // 2])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        check(step())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y_BGRK = step()
    for lengths in ([1, 2, 3], [0, n_read, 64, 65], [n_read], [17, n_read - 1]):
        set_lengths(lengths)
        y_BGRK.fill_(torch.nan)
        graph.replay()
        check(y_BGRK)


@torch.inference_mode()
def test_decoding_steps_with_the_kernel_give_the_logits_of_the_plain_way(model, monkeypatch):
    """In fp32; the kernel is in use, and without it the cache's attention is torch's."""
    device = next(model.parameters()).device
    assert decoding_kernel(device, torch.float32, 64) is not None
    prompts = [s.prompt_ids for s in sequences(6)]
    ids_TB = torch.randint(3, 32000, (8, 6), device=device)

    def logits() -> torch.Tensor:
        cache = model.new_cache(6, 60, 20)
        model.prefill(cache, range(6), prompts)
        cache.copy_rows([0], [3])
        return torch.stack([model.decode(cache, ids_B) for ids_B in ids_TB])

    ours_TBV = logits()
    monkeypatch.setattr(layers, "decoding_kernel", lambda *kind: None)
    torch.testing.assert_close(ours_TBV, logits(), rtol=0, atol=1e-3 * ours_TBV.abs().max().item())


def test_sft_in_bf16_lowers_the_loss_and_keeps_fp32_weights(model, tmp_path):
    train_sft(model, sequences(16), SFTSettings(20, 16, Schedule(1e-3)), log_path=tmp_path / "log.jsonl")
    losses = [step["loss"] for step in read_log(tmp_path / "log.jsonl")]
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_dpo_in_bf16_begins_near_ln_2_and_learns(model, tmp_path):
    examples = sequences(16)
    pairs = [
        PreferencePair(a, TokenizedExample(a.prompt_ids, b.target_ids))
        for a, b in zip(examples[:8], examples[8:], strict=True)
    ]
    settings = DPOSettings(20, 8, Schedule(1e-5))
    reference_P2 = reference_log_probabilities(model, pairs, micro_batch_tokens=settings.micro_batch_tokens)
    train_dpo(model, pairs, reference_P2, settings, log_path=tmp_path / "log.jsonl")
    steps = list(read_log(tmp_path / "log.jsonl"))
    assert abs(steps[0]["loss"] - 0.6931) < 0.02
    assert steps[-1]["loss"] < steps[0]["loss"]
