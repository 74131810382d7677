"""The kernels of packed attention where there is no GPU: interpreted, compiled, and where they do not run."""

import warnings

import pytest
import torch
from interpreted import run_interpreted

from minidpost.models import llama, packed_attention
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.packed_attention import PackedAttention, kernel_for, packed_kernel
from minidpost.models.packing import packing_of, rows_of


@pytest.fixture(autouse=True)
def untried():
    """What was found out about the kernel is forgotten, before and after."""
    kernel_for.cache_clear()
    yield
    kernel_for.cache_clear()


@pytest.mark.slow
def test_the_kernels_equal_attention_in_the_interpreter():
    """All of packed_kernels_cases.py."""
    run_interpreted("packed_kernels_cases.py")


@pytest.mark.parametrize("kernel", ["forward", "backward of queries", "backward of keys"])
@pytest.mark.parametrize(
    ("capability", "width", "is_t5"), [(80, 64, True), (86, 128, False), (86, 128, True), (90, 64, True)]
)
def test_the_kernels_compile_for_gpus_that_are_not_here(kernel, capability, width, is_t5, tmp_path, monkeypatch):
    """Which the interpreter does not show; and they fit into the shared memory of any of these GPUs."""
    pytest.importorskip("triton", minversion="3.7")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from minidpost.models import packed_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = {
        "forward": packed_kernels._forward,
        "backward of queries": packed_kernels._backward_of_queries,
        "backward of keys": packed_kernels._backward_of_keys,
    }[kernel]
    constants = {"HEADS": 16, "KEY_HEADS": 16 if is_t5 else 4, "IS_CAUSAL": True, "HAS_DROPOUT": True}
    constants |= {"WIDTH": width, "BLOCK": packed_kernels.BLOCK, "ENTRIES": 32}
    if not is_t5:
        constants |= dict.fromkeys(("bias_ptr", "entry_ptr", "grad_table_ptr"))
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {name: "*bf16" if name.endswith("_ptr") else "i32" for name in function.arg_names}
    of_fp32 = {"bias_ptr", "log_total_ptr", "delta_ptr", "grad_table_ptr"}
    of_int32 = {"query_start_ptr", "key_start_ptr", "key_row_ptr", "reader_ptr", "first_reader_ptr", "entry_ptr"}
    signature |= dict.fromkeys(of_fp32 & set(signature), "*fp32") | {"scale": "fp32", "kept": "fp32"}
    signature |= dict.fromkeys(of_int32 & set(signature), "*i32") | dict.fromkeys(constants, "constexpr")
    aligned = [i for i, name in enumerate(function.arg_names) if signature[name].startswith("*")]
    source = ASTSource(
        function,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": 4 if width <= 64 else 8, "num_stages": packed_kernels.N_STAGES}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert len(compiled.asm["cubin"]) > 0
    assert ("wgmma" if capability >= 90 else "mma.sync") in compiled.asm["ptx"]  # products are tensor cores'
    assert compiled.metadata.shared <= 99 * 1024


def test_on_a_cpu_and_for_what_does_not_suit_the_kernel_is_none_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert packed_kernel(torch.zeros(1), 64) is None
        for dtype, width in ((torch.float32, 64), (torch.bfloat16, 80), (torch.bfloat16, 8)):
            assert kernel_for(torch.device("cuda"), dtype, width) is None


def test_where_it_does_not_run_the_kernel_is_none_with_one_warning():
    """Here there is no such device: whatever its first launch raises, training goes on."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.warns(UserWarning, match="no kernel for attention, training will be slower") as noted:
        assert [kernel_for(torch.device("cuda"), torch.bfloat16, 64) for _ in range(3)] == [None] * 3
    assert len(noted) == 1


def test_the_kernel_is_chosen_by_the_precision_of_autocast(monkeypatch):
    asked = []
    monkeypatch.setattr(packed_attention, "kernel_for", lambda *kind: asked.append(kind))
    weight = torch.zeros(1)
    packed_kernel(weight, 64)
    with torch.autocast("cpu", torch.bfloat16):
        packed_kernel(weight, 32)
    cpu = torch.device("cpu")
    assert asked == [(cpu, torch.float32, 64), (cpu, torch.bfloat16, 32)]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_under_autocast_the_kernel_is_given_the_precision_that_it_was_chosen_for(qk_norm, monkeypatch):
    """Where queries, keys and values have a bias too (Qwen2.5), which is fp32, as is a sum with it."""
    given = []

    def kernel(q_NHK, k_MGK, v_MGK, *arguments, **keywords):
        given.append((q_NHK.dtype, k_MGK.dtype, v_MGK.dtype))
        return q_NHK

    monkeypatch.setattr(llama, "packed_kernel", lambda weight, width: kernel)
    config = LlamaConfig(50, 24, 40, 1, n_heads=4, n_kv_heads=2, d_head=16, qkv_bias=True, qk_norm=qk_norm)
    model = Llama(config).initialise()
    packing = packing_of(torch.ones(1, 3, dtype=torch.bool))
    ids_BT = torch.tensor([[1, 2, 3]])
    model.hidden(ids_BT, packing=packing)
    with torch.autocast("cpu", torch.bfloat16):
        model.hidden(ids_BT, packing=packing).sum().backward()
    assert given == [(torch.float32,) * 3, (torch.bfloat16,) * 3]
    assert model.stack.layers[0].attention.query.bias.grad.abs().max() > 0


def test_the_gradient_of_packed_tokens_is_not_copied():
    """As that of x[0] would be, into a tensor of zeros: once for each of queries, keys and values of a layer."""

    def kernel(q_NHK, k_NHK, v_NHK, *arguments, **keywords):
        return q_NHK * k_NHK + v_NHK

    packing = packing_of(torch.ones(1, 3, dtype=torch.bool))
    tensors = [torch.randn(1, 3, 2, 4, requires_grad=True) for _ in range(3)]
    read_1NHK = PackedAttention(kernel, rows_of(packing, packing)).attend(*tensors)
    with torch.profiler.profile() as profiled:
        packing.unpack(read_1NHK).sum().backward()
    operations = {event.key for event in profiled.key_averages()}
    assert "aten::mul" in operations
    assert not operations & {"aten::zeros", "aten::copy_", "aten::select_backward"}
    assert torch.equal(tensors[0].grad, tensors[1])
