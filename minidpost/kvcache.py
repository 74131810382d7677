"""Keys and values of every layer, preallocated, a length per row: rows are independent, any row can be replaced."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


class KVCache:
    """Attention memory of `rows` sequences, each up to `max_tokens` long.

    Shapes: keys_LBHSK and values_LBHSK, length_B (device, long). `lengths` holds the same lengths on the host, so that
    finding the longest row costs no device-to-host transfer.
    """

    def __init__(
        self, n_layers: int, rows: int, n_heads: int, max_tokens: int, d_head: int, dtype: torch.dtype, device: str
    ):
        shape = (n_layers, rows, n_heads, max_tokens, d_head)
        self.keys_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.length_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.row_B = torch.arange(rows, device=device)

    def longest(self, n_rows: int) -> int:
        """The greatest length among the first `n_rows` rows, in tokens."""
        return int(self.lengths[:n_rows].max())

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token (T = 1) behind each of the first B rows; give the keys and values in use, the new included.

        Lengths do not change until `advance`, so that every layer of a step writes to the same position.
        """
        n_rows = len(k_BHTK)
        row_B, position_B, used = self.row_B[:n_rows], self.length_B[:n_rows], self.longest(n_rows) + 1
        self.keys_LBHSK[layer, row_B, :, position_B] = k_BHTK[:, :, 0]
        self.values_LBHSK[layer, row_B, :, position_B] = v_BHTK[:, :, 0]
        return self.keys_LBHSK[layer, :n_rows, :, :used], self.values_LBHSK[layer, :n_rows, :, :used]

    def advance(self, n_rows: int) -> None:
        """Count the token just written to the first `n_rows` rows."""
        self.length_B[:n_rows] += 1
        self.lengths[:n_rows] += 1

    def set_lengths(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Declare how many positions of `rows` are valid."""
        self.lengths[list(rows)] = lengths
        self.length_B[list(rows)] = torch.tensor(lengths, device=self.length_B.device)

    @torch.inference_mode()
    def copy_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Overwrite each target row with its source row: keys, values and length."""
        sources, targets = list(sources), list(targets)
        used = int(self.lengths[sources].max())
        self.keys_LBHSK[:, targets, :, :used] = self.keys_LBHSK[:, sources, :, :used]
        self.values_LBHSK[:, targets, :, :used] = self.values_LBHSK[:, sources, :, :used]
        self.length_B[targets] = self.length_B[sources]
        self.lengths[targets] = self.lengths[sources]
