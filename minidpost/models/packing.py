"""Packed tokens: a padded batch without its padding, for training.

Everything in a layer but attention looks at one token at a time, so that padding need not pass through it: of a step's
64 examples in one micro-batch more than half would be padding, as each row is as long as the longest. The tokens of all
rows stand one behind the other, (1, N, …). Attention finds the rows in them, or has them put into padded rows,
(B, T, …), see packed_attention.py:

    rows            a b c        tokens    a b c d e f g        position_N    0 1 2 3 6 7 8
                    d – –
                    e f g        (B = 3, T = 3, N = 7; position_N are places in the rows laid end to end, B · T)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidpost.precision import to_device


@dataclass(frozen=True)
class Packing:
    """Where each token of a padded batch stands.

    position_N are the tokens' places in the flattened (B · T), ascending; token_P says for each of those P = B · T
    places which token stands there, and any token where there is padding. Row b has the tokens from start_B[b] to
    start_B[b + 1] (int32, B + 1 of them).
    """

    position_N: Tensor
    token_P: Tensor
    start_B: Tensor
    n_rows: int

    def to(self, device: torch.device | str) -> "Packing":
        """The same on a device, which is not waited for."""
        return Packing(
            to_device(self.position_N, device),
            to_device(self.token_P, device),
            to_device(self.start_B, device),
            self.n_rows,
        )

    @property
    def longest(self) -> int:
        """T, the places of a row: its longest row's tokens or more."""
        return len(self.token_P) // self.n_rows

    @property
    def column_1N(self) -> Tensor:
        """The place of each token in its row, (1, N)."""
        return (self.position_N % self.longest)[None]

    def pack(self, x_BTD: Tensor) -> Tensor:
        """The tokens one behind the other: (B, T, …) to (1, N, …)."""
        x_ND: Tensor = _Pack.apply(x_BTD.flatten(0, 1), self)  # type: ignore[no-untyped-call]
        return x_ND[None]

    def unpack(self, x_1ND: Tensor) -> Tensor:
        """The tokens in padded rows: (1, N, …) to (B, T, …). What stands at padding means nothing."""
        x_PD: Tensor = _Unpack.apply(x_1ND.squeeze(0), self)  # type: ignore[no-untyped-call]
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
    start_B = F.pad(mask_BT.sum(1).cumsum(0), (1, 0)).int()
    return Packing(mask_P.nonzero()[:, 0], token_P, start_B, len(mask_BT))


class Rows(NamedTuple):
    """Which packed queries read which packed keys. All tensors are int32.

    Row b of the queries are the tokens from query_start_B[b] to query_start_B[b + 1]; B + 1 numbers. It reads row
    key_row_B[b] of the keys, which begin at key_start_Q likewise. The other way round, row q of the keys is read by
    rows reader_B[i] of the queries, for i from first_reader_Q[q] to first_reader_Q[q + 1]. `longest` are the tokens of
    the longest rows of queries and of keys, or more.
    """

    query_start_B: Tensor
    key_start_Q: Tensor
    key_row_B: Tensor
    reader_B: Tensor
    first_reader_Q: Tensor
    longest: tuple[int, int]


def rows_of(queries: Packing, keys: Packing, row_B: Tensor | None = None) -> Rows:
    """Each row of queries reads the row of keys that row_B names (None: the one of its own number).

    Three rows of queries that read rows 1, 0 and 1 have key_row_B = [1, 0, 1], reader_B = [1, 0, 2] and
    first_reader_Q = [0, 1, 3]: row 0 is read by the first of the readers, row 1 by the two others.
    """
    number_Q = torch.arange(keys.n_rows + 1, dtype=torch.int32, device=keys.start_B.device)
    if row_B is None:
        key_row_B = reader_B = number_Q[:-1]
        first_reader_Q = number_Q
    else:
        sorted_B, reader_B = row_B.int().sort(stable=True)
        key_row_B = row_B.int()
        first_reader_Q = torch.searchsorted(sorted_B, number_Q, out_int32=True)
        reader_B = reader_B.int()
    return Rows(queries.start_B, keys.start_B, key_row_B, reader_B, first_reader_Q, (queries.longest, keys.longest))


class PositionBias(NamedTuple):
    """T5's relative positions: to the score of key s for query t is added bias_HX[head, s − t + zero].

    That is table_EH[entry_X[s − t + zero], head], read once for all layers: bias_HX (fp32, contiguous, without
    gradient) has the numbers of neighbouring distances side by side. The gradient is the table's. There is a number for
    each distance within a row, X = 2 · zero + 1; entry_X is int32.
    """

    bias_HX: Tensor
    table_EH: Tensor
    entry_X: Tensor
    zero: int
