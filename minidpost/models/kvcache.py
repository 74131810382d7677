"""Keys and values of every layer, preallocated, a length per row: rows are independent, any row can be replaced.

And the three operations that decoding, with its one position a row, does otherwise than training on a CPU.
"""

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minidpost.models.layers import attention, mask_bias

POSITIONS = 64  # to a multiple of which a fixed step's positions are rounded up


class StepRunner(Protocol):
    """Another way to take steps than to call them; see graphs."""

    def run(self, step: Callable[[Any, Tensor], Tensor], cache: Any, ids_B: Tensor) -> Tensor: ...


def decoding_step(decode: Callable[[Any, Any, Tensor], Tensor]) -> Callable[[Any, Any, Tensor], Tensor]:
    """A model's `decode(cache, ids_B)` that also leaves itself to the cache's runner and counts the tokens written."""

    @wraps(decode)
    @torch.inference_mode()
    def step(model: Any, cache: Any, ids_B: Tensor) -> Tensor:
        device_work = partial(decode, model)
        logits_BV = cache.runner.run(device_work, cache, ids_B) if cache.runner else device_work(cache, ids_B)
        cache.advance(len(ids_B))
        return logits_BV

    return step


class KVCache:
    """Attention memory of `rows` sequences, each up to `max_tokens` long.

    Shapes: keys_LBHSK and values_LBHSK, length_B (device, long). `lengths` holds the same lengths on the host, so that
    finding the longest row costs no device-to-host transfer.
    """

    runner: StepRunner | None = None  # how steps are taken, where they are not just called

    def __init__(
        self,
        n_layers: int,
        rows: int,
        n_heads: int,
        max_tokens: int,
        d_head: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        shape = (n_layers, rows, n_heads, max_tokens, d_head)
        self.keys_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LBHSK = torch.zeros(shape, dtype=dtype, device=device)
        self.length_B = torch.zeros(rows, dtype=torch.long, device=device)
        self.lengths = np.zeros(rows, dtype=np.int64)
        self.row_B = torch.arange(rows, device=device)
        self.n_fixed = 0  # positions that a fixed step reads; 0 where a step reads those in use

    def longest(self, n_rows: int) -> int:
        """The greatest length among the first `n_rows` rows, in tokens."""
        return int(self.lengths[:n_rows].max())

    def n_read(self, n_rows: int) -> int:
        """How many positions a step of the first rows reads: those in use and the next, or as many as are fixed."""
        return self.n_fixed or self.longest(n_rows) + 1

    def fix(self, n_rows: int) -> tuple[int, int]:
        """Round the next step's sizes up, rows to a power of two; (rows, positions).

        What the rows behind write lies behind their tokens, where the next one would: nobody reads it.
        """
        self.n_fixed = rounded(self.longest(n_rows) + 1, self.keys_LBHSK.shape[3])
        return min(power_of_two(n_rows), len(self.lengths)), self.n_fixed

    def release(self) -> None:
        """A step reads the positions in use again."""
        self.n_fixed = 0

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget all rows; nothing is allocated anew."""
        self.lengths[:] = 0
        self.length_B.zero_()

    def bias(self, n_rows: int) -> Tensor:
        """0 where each of the first rows has tokens or writes its next one, −inf behind, (B, 1, 1, S)."""
        slot_S = torch.arange(self.n_read(n_rows), device=self.length_B.device)
        return mask_bias(slot_S <= self.length_B[:n_rows, None], self.keys_LBHSK.dtype)

    def append(self, layer: int, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token (T = 1) behind each of the first B rows; give the keys and values in use, the new included.

        Lengths do not change until `advance`, so that every layer of a step writes to the same position.
        """
        n_rows = len(k_BHTK)
        row_B, position_B, used = self.row_B[:n_rows], self.length_B[:n_rows], self.n_read(n_rows)
        if self.n_fixed:  # a row behind those at work may be full
            position_B = position_B.clamp(max=self.keys_LBHSK.shape[3] - 1)
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
        # A single row is copied as a slice, which is several times faster than by a list of one.
        sources, targets = (list(rows) if len(rows) > 1 else rows[0] for rows in (sources, targets))
        used = int(self.lengths[sources].max())
        self.keys_LBHSK[:, targets, :, :used] = self.keys_LBHSK[:, sources, :, :used]
        self.values_LBHSK[:, targets, :, :used] = self.values_LBHSK[:, sources, :, :used]
        self.length_B[targets] = self.length_B[sources]
        self.lengths[targets] = self.lengths[sources]


def rounded(n_positions: int, most: int) -> int:
    """Up to a multiple of POSITIONS, but not above `most`."""
    return min(-(-n_positions // POSITIONS) * POSITIONS, most)


def power_of_two(number: int) -> int:
    """The least that is not below a number."""
    return 1 << (number - 1).bit_length()


class SharedPromptCache:
    """Keys and values of prompts, each kept once for all rows that continue it, and read once a step for all of them.

    A row's prompt lies at `place_B[row]`. Those that a step reads are kept at the front, so that they are one slice.
    """

    def __init__(self, *shape, **options):
        self.store = KVCache(*shape, **options)
        self.place_B = np.arange(len(self.store.lengths))
        self.arranged_for = 0  # rows; 0 when `arranged` no longer holds
        self.fixed_for = 0  # rows, likewise, of which the others are there to fill a fixed step
        self.fixed: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, rows: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Places for the new prompts of `rows`, which forget what they had."""
        others = np.delete(self.place_B, list(rows))
        places = np.setdiff1d(np.arange(len(self.place_B)), others)[: len(rows)]
        self.place_B[list(rows)], self.arranged_for = places, 0
        self.store.set_lengths(places.tolist(), lengths)
        return places.tolist()

    def copy_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """From now on each target row continues the prompt of its source row."""
        self.place_B[list(targets)], self.arranged_for = self.place_B[list(sources)], 0

    def attend(self, layer: int, q_BH1K: Tensor, scale: float) -> Tensor:
        """What the first B rows read from their prompts, (B, H, 1, K)."""
        table_PR, position_B, bias_P11S = self.arrangement(len(q_BH1K))
        n_prompts, longest = bias_P11S.shape[0], bias_P11S.shape[-1]
        keys_PHSK = self.store.keys_LBHSK[layer, :n_prompts, :, :longest]
        values_PHSK = self.store.values_LBHSK[layer, :n_prompts, :, :longest]
        q_PRHK = q_BH1K[:, :, 0].index_select(0, table_PR.flatten()).unflatten(0, table_PR.shape)
        y_PHRK = attention(q_PRHK.transpose(1, 2), keys_PHSK, values_PHSK, bias_P11S, scale)
        return y_PHRK.transpose(1, 2).flatten(0, 1).index_select(0, position_B)[:, :, None]

    def arrangement(self, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """How the first `n_rows` rows read the prompts at the front, which it brings there.

        table_PR: the rows of each prompt, as many columns as the most have; position_B: where a row stands in it,
        flattened; bias_P11S: 0 for a prompt's tokens, −inf behind. Remembered until rows change.
        """
        if self.arranged_for == n_rows:
            return self.arranged
        self.arranged = tuple(x.to(self.store.length_B.device) for x in self._arrange(n_rows))
        self.arranged_for, self.fixed_for = n_rows, 0
        return self.arranged

    def _arrange(self, n_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """What `arrangement` gives, on the host."""
        self.bring_forward(np.unique(self.place_B[:n_rows]))
        place_B, order_B = self.place_B[:n_rows], np.argsort(self.place_B[:n_rows], kind="stable")
        count_P = np.bincount(place_B)
        rank_B = np.empty(n_rows, dtype=np.int64)
        rank_B[order_B] = np.arange(n_rows) - (count_P.cumsum() - count_P)[place_B[order_B]]
        table_PR = np.zeros((len(count_P), count_P.max()), dtype=np.int64)
        table_PR[place_B, rank_B] = np.arange(n_rows)
        length_P = torch.from_numpy(self.store.lengths[: len(count_P)].clip(min=1))
        bias_P11S = mask_bias(torch.arange(int(length_P.max())) < length_P[:, None], self.store.keys_LBHSK.dtype)
        position_B = torch.from_numpy(place_B * table_PR.shape[1] + rank_B)
        return torch.from_numpy(table_PR), position_B, bias_P11S

    def fix(self, n_rows: int, rows: int) -> tuple[int, int, int]:
        """Arrange the first `n_rows` rows and as many others as make `rows`, sizes rounded up; (P, R, S).

        The tensors of one shape stay where they are.
        """
        if self.arranged_for != rows or self.fixed_for != n_rows:
            table_PR, position_B, bias_P11S = self._arrange(n_rows)
            n_prompts, n_columns, longest = *table_PR.shape, bias_P11S.shape[-1]
            _, n_places, _, n_positions, _ = self.store.keys_LBHSK.shape
            # Columns never become fewer: a prompt whose samples end one by one is no new shape each time.
            most = max([power_of_two(n_columns), *(columns for _, _, columns, _ in self.fixed)])
            shape = min(power_of_two(n_prompts), n_places), most, rounded(longest, n_positions)
            others = shape[0] - n_prompts
            table_PR = F.pad(table_PR, (0, most - n_columns, 0, others))
            position_B = F.pad(position_B // n_columns * most + position_B % n_columns, (0, rows - n_rows))
            bias_P11S = F.pad(bias_P11S, (0, shape[2] - longest), value=-torch.inf)
            bias_P11S = torch.cat([bias_P11S, bias_P11S.new_zeros(others, *bias_P11S.shape[1:])])
            self.arranged = self._settled((rows, *shape), (table_PR, position_B, bias_P11S))
            self.arranged_for, self.fixed_for = rows, n_rows
        return *self.arranged[0].shape, self.arranged[2].shape[-1]

    def _settled(self, shape: tuple[int, ...], arranged: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The same in the tensors that this shape has on the device."""
        if shape not in self.fixed:
            self.fixed[shape] = tuple(torch.empty_like(x, device=self.store.length_B.device) for x in arranged)
        for target, source in zip(self.fixed[shape], arranged, strict=True):
            target.copy_(source)
        return self.fixed[shape]

    def release(self) -> None:
        """A step has its true sizes again."""
        self.arranged_for = 0

    def clear(self) -> None:
        """Forget all prompts."""
        self.store.clear()
        self.place_B = np.arange(len(self.place_B))
        self.arranged_for = 0

    def bring_forward(self, read: np.ndarray) -> None:
        """Exchange prompts if those that are read are scattered; a few others among them cost less than moving."""
        n_read = len(read)
        if read[-1] < n_read + n_read // 8:
            return
        behind = read[read >= n_read]
        others = np.setdiff1d(np.arange(n_read), read)
        self.store.copy_rows([*behind, *others], [*others, *behind])
        place = np.arange(len(self.place_B))
        place[behind], place[others] = others, behind
        self.place_B = place[self.place_B]


class T5Cache:
    """What decoding remembers of each row: its own tokens, and its prompt as the cross-attention sees it."""

    runner: StepRunner | None = None

    def __init__(self, own: KVCache, prompt: SharedPromptCache, bias_SH: Tensor):
        """bias_SH is the decoder's position bias by distance, 0 … max_new − 1."""
        self.own, self.prompt = own, prompt
        self.bias_HN = torch.cat([bias_SH.flip(0).T, torch.full_like(bias_SH.T, -torch.inf)], dim=1)

    def bias(self, n_rows: int) -> Tensor:
        """Position bias of each of the first rows' own tokens and the next one, −inf behind, (B, H, 1, S)."""
        max_new = self.bias_HN.shape[1] // 2
        window_XHS = self.bias_HN.unfold(1, self.own.n_read(n_rows), 1).transpose(0, 1)
        start_B = (max_new - 1 - self.own.length_B[:n_rows]).clamp(min=0)  # below 0 in a full row, which is not at work
        return window_XHS.index_select(0, start_B)[:, :, None]

    def advance(self, n_rows: int) -> None:
        """Count the token just written to the first rows."""
        self.own.advance(n_rows)

    def fix(self, n_rows: int) -> tuple[int, ...]:
        """Round the next step's sizes up: (rows, positions, prompts, rows a prompt, prompt positions)."""
        rows, n_positions = self.own.fix(n_rows)
        return rows, n_positions, *self.prompt.fix(n_rows, rows)

    def release(self) -> None:
        """A step has its true sizes again."""
        self.own.release()
        self.prompt.release()

    def clear(self) -> None:
        """Forget all rows; nothing is allocated anew."""
        self.own.clear()
        self.prompt.clear()

    @torch.inference_mode()
    def copy_rows(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Make each target row an exact copy of its source row."""
        self.own.copy_rows(sources, targets)
        self.prompt.copy_rows(sources, targets)
