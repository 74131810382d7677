"""The decoding kernel where there is no GPU: in Triton's interpreter, and what happens where it does not run."""

import sys
import warnings

import pytest
import torch
from interpreted import run_interpreted

from minidpost.models import layers
from minidpost.models.layers import attention, decoding_kernel, mask_bias

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def untried():
    """What was found out about the kernel is forgotten, before and after."""
    decoding_kernel.cache_clear()
    yield
    decoding_kernel.cache_clear()


@pytest.mark.slow
def test_the_kernel_equals_attention_in_the_interpreter():
    """All of decode_attention_cases.py."""
    run_interpreted("decode_attention_cases.py")


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("capability", "width"), [(80, 64), (86, 128), (90, 64), (90, 128), (90, 256)])
def test_the_kernel_compiles_for_gpus_that_are_not_here(capability, width, dtype, tmp_path, monkeypatch):
    """Which the interpreter does not show; and two programs or more fit on each multiprocessor of any of these GPUs."""
    pytest.importorskip("triton", minversion="3.7")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minidpost.models import decode_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = decode_attention._decode_attention
    n_positions = decode_attention.positions_at_once(width, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    constants = {"WIDTH": width, "BLOCK_R": decode_attention.QUERIES_AT_ONCE, "BLOCK_S": n_positions}
    # A pointer's name ends in _ptr; numbers are whole but for the scale. In memory columns are neighbours, and rows and
    # heads begin at multiples of 16 numbers, so that a thread copies 16 bytes at a time.
    constants |= {name: 1 for name in kernel.arg_names if name.endswith(("_stride_k", "bias_stride_s"))}
    signature = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in kernel.arg_names}
    signature |= {"n_valid_ptr": "*i64", "scale": "fp32"} | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(kernel.arg_names) if ("_ptr" in name or "_stride" in name)]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned if kernel.arg_names[i] not in constants},
    )
    options = {"num_warps": decode_attention.N_WARPS, "num_stages": decode_attention.N_STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "cp.async.cg" in compiled.asm["ptx"]  # the next blocks are on their way while one is at work
    assert len(compiled.asm["cubin"]) > 0
    assert compiled.metadata.shared <= (48 if width <= 128 else 96) * 1024


def test_without_a_gpu_the_kernel_is_none_with_one_warning():
    """Triton is there, but finds no device to launch on: whatever its first launch raises, decoding goes on."""
    pytest.importorskip("triton")
    with pytest.warns(UserWarning, match="no kernel for attention, decoding will be slower") as noted:
        assert [decoding_kernel(CPU, torch.float32, 64) for _ in range(3)] == [None] * 3
    assert len(noted) == 1


def test_without_triton_the_kernel_is_none_with_one_warning(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "minidpost.models.decode_attention", raising=False)
    with pytest.warns(UserWarning, match="ModuleNotFoundError.*triton") as noted:
        assert [decoding_kernel(CPU, torch.bfloat16, 64) for _ in range(3)] == [None] * 3
    assert len(noted) == 1


@pytest.mark.parametrize(("dtype", "width"), [(torch.float64, 64), (torch.float32, 8), (torch.bfloat16, 80)])
def test_what_does_not_suit_the_kernel_is_no_fault(dtype, width):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoding_kernel(CPU, dtype, width) is None


class OnGPU(torch.Tensor):
    """Says that it is on a CUDA device, as far as the choice of a kernel asks."""

    is_cuda = True


def test_the_kernel_is_taken_where_it_runs_and_no_gradient_is_wanted(monkeypatch):
    torch.manual_seed(0)
    q_BGRK = torch.randn(2, 3, 2, 16)
    k_BGSK, v_BGSK = torch.randn(2, 2, 3, 9, 16)
    n_valid_B = torch.tensor([9, 4])
    inputs = (k_BGSK, v_BGSK, mask_bias(torch.arange(9) < n_valid_B[:, None], torch.float32), n_valid_B, 0.25)
    plain_BGRK = attention(q_BGRK, *inputs)
    asked = []

    def kernel_of(*kind):
        asked.append(kind)
        return (lambda *arguments: arguments) if is_there else None

    monkeypatch.setattr(layers, "decoding_kernel", kernel_of)
    on_gpu_BGRK = q_BGRK.as_subclass(OnGPU)
    for is_there, with_gradients in ((True, False), (False, False), (True, True)):
        with torch.set_grad_enabled(with_gradients):
            y = attention(on_gpu_BGRK, *inputs)
        if is_there and not with_gradients:
            assert all(got is given for got, given in zip(y, (on_gpu_BGRK, *inputs), strict=True))
        else:
            assert torch.equal(y.as_subclass(torch.Tensor), plain_BGRK)
    assert asked == [(CPU, torch.float32, 16)] * 2
    attention(q_BGRK, *inputs)
    assert len(asked) == 2  # on a CPU nobody asks


def test_a_lack_of_memory_is_not_taken_for_a_kernel_that_does_not_run(monkeypatch, out_of_memory):
    """The sampler mends it with fewer rows; afterwards the kernel is tried again."""
    monkeypatch.setattr(torch, "zeros", out_of_memory)
    pytest.importorskip("triton")
    with pytest.raises(torch.OutOfMemoryError):
        decoding_kernel(CPU, torch.float32, 64)
    assert decoding_kernel.cache_info().currsize == 0
