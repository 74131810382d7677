"""Packed tokens: a padded batch without its padding, for training on a GPU.

Everything in a layer but attention looks at one token at a time, so that padding need not pass through it: of a step's
micro-batch of 64 examples more than half are padding, as one is as long as the longest. The tokens of all rows stand
one behind the other, (1, N, …), and are put into padded rows, (B, T, …), for attention alone:

    rows            a b c        tokens    a b c d e f g        position_N    0 1 2 3 6 7 8
                    d – –
                    e f g        (B = 3, T = 3, N = 7; position_N are places in the rows laid end to end, B · T)

On a CPU micro-batches are small and have little padding; there rows stay padded.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidpost.models.layers import Attendable
from minidpost.precision import to_device


@dataclass(frozen=True)
class Packing:
    """Where each token of a padded batch stands.

    position_N are the tokens' places in the flattened (B · T), ascending; token_P says for each of those P = B · T
    places which token stands there, and any token where there is padding.
    """

    position_N: Tensor
    token_P: Tensor
    n_rows: int

    def to(self, device: torch.device | str) -> "Packing":
        """The same on a device, which is not waited for."""
        return Packing(to_device(self.position_N, device), to_device(self.token_P, device), self.n_rows)

    @property
    def column_1N(self) -> Tensor:
        """The place of each token in its row, (1, N)."""
        return (self.position_N % (len(self.token_P) // self.n_rows))[None]

    def pack(self, x_BTD: Tensor) -> Tensor:
        """The tokens one behind the other: (B, T, …) to (1, N, …)."""
        x_ND: Tensor = _Pack.apply(x_BTD.flatten(0, 1), self)  # type: ignore[no-untyped-call]
        return x_ND[None]

    def unpack(self, x_1ND: Tensor) -> Tensor:
        """The tokens in padded rows: (1, N, …) to (B, T, …). What stands at padding means nothing."""
        x_PD: Tensor = _Unpack.apply(x_1ND[0], self)  # type: ignore[no-untyped-call]
        x_BTD: Tensor = torch.unflatten(x_PD, 0, (self.n_rows, -1))
        return x_BTD


class _Pack(torch.autograd.Function):
    """A row of numbers for each place to one for each token.

    The gradient of what is left out is 0. (torch's own backward pass would add one number at a time, atomically.)
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x_PD.index_select(0, packing.position_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None]:
        grad_PD = grad_ND.new_zeros(len(ctx.packing.token_P), *grad_ND.shape[1:])
        return grad_PD.index_copy_(0, ctx.packing.position_N, grad_ND), None


class _Unpack(torch.autograd.Function):
    """A row of numbers for each token to one for each place.

    Nothing depends on padding, so that each token has its gradient from its own place alone.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x_ND.index_select(0, packing.token_P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        return grad_PD.index_select(0, ctx.packing.position_N), None


def packing_of(mask_BT: Tensor) -> Packing:
    """The packing of rows of which the mask is True where they have tokens. To be called on the CPU.

    (A GPU would be waited for: how many tokens there are is asked.)
    """
    mask_P = mask_BT.flatten()
    token_P = (mask_P.cumsum(0) - 1).clamp(min=0)
    return Packing(mask_P.nonzero()[:, 0], token_P, len(mask_BT))


@dataclass(frozen=True)
class PackedAttention:
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
