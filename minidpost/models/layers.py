"""Linear, RMSNorm and attention as decoding wants them: few rows, one position each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGE_MATRIX = 2**17  # entries
FEW_ROWS = 128


def mask_bias(mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True and −inf elsewhere, (B, 1, 1, S)."""
    bias_BS = torch.zeros(mask_BS.shape, dtype=dtype, device=mask_BS.device).masked_fill_(~mask_BS, -torch.inf)
    return bias_BS[:, None, None]


def attention(q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_BHTS: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale + bias) v for few queries a row; (B, G, R, K)."""
    if q_BGRK.device.type != "cpu":
        return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, bias_BHTS, scale=scale)
    # The fused kernel is made for many queries; for one a row, plain products take a fifth less time on a CPU.
    weight_BGRS = torch.matmul(q_BGRK * scale if scale != 1.0 else q_BGRK, k_BGSK.mT).add_(bias_BHTS).softmax(-1)
    return torch.matmul(weight_BGRS, v_BGSK)


def linear(x: Tensor, weight_NK: Tensor) -> Tensor:
    """x weightᵀ, (…, K) to (…, N).

    For few rows and a large matrix on a CPU it is computed the other way round, as the threads of the library then
    share the matrix and need not copy it first: a fifth to a half less time.
    """
    few = weight_NK.numel() >= LARGE_MATRIX and x.numel() <= FEW_ROWS * x.shape[-1]
    if few and x.device.type == "cpu" and not torch.is_grad_enabled():
        return torch.mm(weight_NK, x.flatten(0, -2).T).T.unflatten(0, x.shape[:-1])
    return F.linear(x, weight_NK)


class Linear(nn.Linear):
    """torch's, but for its speed with few rows."""

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.RMSNorm):
    """torch's, but on a CPU without gradients in three passes over x, where that one takes six."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype == torch.bfloat16 or torch.is_grad_enabled():
            return super().forward(x)
        size = x.shape[-1]
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(size * self.eps).rsqrt_()
        return (x * scale).mul_(self.weight * size**0.5)
