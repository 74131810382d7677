"""Which precision training has on which device, and what is set once for a CUDA device."""

import pytest
import torch
from torch import nn

from minidpost import precision
from minidpost.precision import (
    autocast,
    cpu_multiplies_bf16,
    default_device,
    key_dtype,
    prepare_device,
    sampling_dtype,
    to_device,
    training_dtype,
)

LARGE = 5_000_000
LARGE_FOR_SAMPLING = 20_000_000
XEON = "processor\t: 0\nflags\t\t: fpu avx2 avx512f {} sse\nbugs\t\t: amx_bf16\n"


@pytest.fixture
def cpu_info(tmp_path, monkeypatch):
    """Writes what Linux would say of a processor with one more instruction set."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(precision, "CPU_INFO", path)

    def write(instructions: str) -> None:
        path.write_text(XEON.format(instructions))

    return write


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16", "amx_tile avx512_bf16"])
def test_large_models_are_computed_in_bf16_where_a_cpu_multiplies_it(cpu_info, instructions):
    cpu_info(instructions)
    assert cpu_multiplies_bf16()
    for choose, least in ((training_dtype, LARGE), (sampling_dtype, LARGE_FOR_SAMPLING)):
        assert choose("auto", "cpu", least) == torch.bfloat16
        assert choose("auto", "cpu", least - 1) == torch.float32
        assert choose("auto", "meta", least) == torch.float32
        assert choose("fp32", "cpu", least) == torch.float32


@pytest.mark.parametrize("instructions", ["", "avx512_bf16_of_another_kind", "amx_tile amx_int8", "avx512_vnni"])
def test_other_cpus_compute_in_fp32(cpu_info, instructions):
    cpu_info(instructions)
    assert not cpu_multiplies_bf16()
    for choose in (training_dtype, sampling_dtype):
        assert choose("auto", "cpu", 10**12) == torch.float32
        assert choose("bf16", "cpu", 1) == torch.bfloat16


def test_a_system_that_lists_no_instructions_computes_in_fp32(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "CPU_INFO", tmp_path / "none")
    assert training_dtype("auto", "cpu", 10**12) == sampling_dtype("auto", "cpu", 10**12) == torch.float32
    (tmp_path / "none").write_text("processor : 0\nFeatures : bf16\n")
    assert training_dtype("auto", "cpu", 10**12) == sampling_dtype("auto", "cpu", 10**12) == torch.float32


@pytest.mark.parametrize(("has_it", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_gpu_that_only_emulates_bf16_computes_in_fp32(monkeypatch, has_it, expected):
    def is_supported(including_emulation: bool = True) -> bool:
        return has_it or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    for choose in (training_dtype, sampling_dtype):
        assert choose("auto", "cuda", 1) == choose("auto", "cuda:1", 10**12) == expected
        assert choose("fp32", "cuda", 1) == torch.float32


def test_keys_are_fp32_beside_bf16_weights_on_a_cpu_alone():
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        expected = torch.float32 if dtype == torch.bfloat16 else dtype
        assert key_dtype(dtype, "cpu") == expected
        assert key_dtype(dtype, torch.device("cuda", 1)) == dtype


def test_cuda_is_the_default_where_there_is_one(monkeypatch):
    for has_it, expected in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_it=has_it: has_it)
        assert default_device() == expected


def test_autocast_is_in_the_precision_that_is_asked_for():
    linear = nn.Linear(2, 2)
    x_12 = torch.ones(1, 2)
    for dtype, expected in ((None, torch.float32), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        with autocast(torch.device("cpu"), dtype):
            assert linear(x_12).dtype == expected
    assert linear.weight.dtype == torch.float32


def test_a_gpu_reads_from_pinned_memory_alone(monkeypatch):
    """A copy of much else would wait; what lies on a device, or goes nowhere, is not pinned."""
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: copies.append((tensor, non_blocking)))
    for device in ("cuda", torch.device("cuda", 1), "cpu"):
        to_device(torch.zeros(1), device)
    to_device(torch.zeros(1, device="meta"), "cuda")
    assert [non_blocking for _, non_blocking in copies] == [True] * 4
    assert [tensor.item() for tensor, _ in copies[:3]] == [1, 1, 0]
    assert copies[3][0].is_meta


def test_cudnn_attention_is_off_for_cuda_alone(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", calls.append)
    prepare_device("cpu")
    assert calls == []
    prepare_device("cuda:1")
    assert calls == [False]
