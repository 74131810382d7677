"""What packed tokens attend to in training (packing.py): by our kernel on a GPU, in padded rows elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from minidpost.models.layers import Attendable, computed_in, warn_of_no_kernel
from minidpost.models.packing import Packing, PositionBias, Rows

Kernel = Callable[..., Tensor]  # packed_kernels.packed_attention


@dataclass(frozen=True)
class PackedAttention:
    """Attention of packed queries to packed keys by our kernel (a layers.Attendable, or t5.AttendablePrompt).

    Which queries see which keys is said by `rows`, and by `is_causal`: each sees itself and those before it. `dropout`
    is the probability with which a weight is dropped.
    """

    kernel: Kernel
    rows: Rows
    bias: PositionBias | None = None
    scale: float = 1.0
    is_causal: bool = False
    dropout: float = 0.0

    def attend(self, q_1NHK: Tensor, k_1MGK: Tensor | None, v_1MGK: Tensor | None) -> Tensor:
        """What each query reads, (1, N, H, K)."""
        assert k_1MGK is not None and v_1MGK is not None, "keys and values are in no cache here"
        # As autocast does for torch's attention: a bias that is added to queries, keys and values makes them fp32.
        # Not q_1NHK[0] and so on: the backward pass would copy the gradient of such a part into a tensor of zeros.
        q_NHK, k_MGK, v_MGK = (x.to(computed_in(x)).squeeze(0) for x in (q_1NHK, k_1MGK, v_1MGK))
        y_NHK = self.kernel(
            *(q_NHK, k_MGK, v_MGK, self.rows, self.bias),
            scale=self.scale,
            is_causal=self.is_causal,
            dropout=self.dropout,
        )
        return y_NHK[None]


@dataclass(frozen=True)
class AttentionInPaddedRows:
    """Attention whose queries, keys and values are packed: it is given padded rows, and what it reads is packed again.

    `attention` is a layers.Attendable (or t5.AttendablePrompt) for padded rows. Of cross-attention the keys have
    another packing than the queries.
    """

    attention: Attendable
    queries: Packing
    keys: Packing

    def attend(self, q_1NHK: Tensor, k_1MGK: Tensor | None, v_1MGK: Tensor | None) -> Tensor:
        """What each query reads, (1, N, H, K)."""
        assert k_1MGK is not None and v_1MGK is not None, "keys and values are in no cache here"
        q_BTHK = self.queries.unpack(q_1NHK)
        k_BSGK = self.keys.unpack(k_1MGK)
        v_BSGK = self.keys.unpack(v_1MGK)
        return self.queries.pack(self.attention.attend(q_BTHK, k_BSGK, v_BSGK))


def packed_kernel(weight: Tensor, width: int) -> Kernel | None:
    """Our kernel for a model with this weight and heads of this width, or None; see `kernel_for`."""
    return kernel_for(weight.device, computed_in(weight), width)


def suits_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether our kernel is for numbers of this precision in heads of this width, if it runs there."""
    return device.type == "cuda" and dtype == torch.bfloat16 and width >= 16 and width.bit_count() == 1


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, width: int) -> Kernel | None:
    """The kernel for numbers of this precision, or None; with a warning where it should run and does not.

    It is for bf16 on CUDA devices, where products of fp32, exactly, would gain nothing. It is tried once: see
    `try_kernel` and layers.decoding_kernel.
    """
    if not suits_kernel(device, dtype, width):
        return None
    try:
        from minidpost.models.packed_kernels import packed_attention  # it needs Triton, which CPUs do not have

        try_kernel(packed_attention, device, dtype, width)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, there is another way
        warn_of_no_kernel("training will be slower and take more memory", error, stacklevel=5)
        return None
    return packed_attention


def try_kernel(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """RuntimeError, or whatever the kernel raises, if a token that reads itself alone does not have a gradient of 1.

    It is asked for all that it can do, as that takes most of a GPU's shared memory and of what Triton must know: a bias
    with the gradient of its table, causal order, and dropout, though so rare that seed 1 drops nothing.
    """
    with torch.inference_mode(False), torch.enable_grad():  # the first pass may be one without gradients
        start_B = torch.tensor([0, 1], dtype=torch.int32, device=device)
        rows = Rows(start_B, start_B, start_B[:1], start_B[:1], start_B, (1, 1))
        table_EH = torch.zeros(32, 1, device=device, requires_grad=True)
        bias = PositionBias(torch.zeros(1, 1, device=device), table_EH, start_B[:1], 0)
        v_NHK = torch.ones(1, 1, width, dtype=dtype, device=device, requires_grad=True)
        q_NHK = v_NHK.detach()
        y_NHK = kernel(q_NHK, q_NHK, v_NHK, rows, bias, scale=1.0, is_causal=True, dropout=2.0**-20, seed=1)
        y_NHK.sum().backward()
    if v_NHK.grad is None or table_EH.grad is None or not bool((v_NHK.grad.to(torch.bfloat16) == 1).all()):
        raise RuntimeError("it does not give a gradient of 1 where a token reads itself alone")
