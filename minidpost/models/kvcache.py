"""The KV cache: keys and values of every layer, preallocated, with a length for each row.

Rows are independent: each stands at its own position, and any row can be replaced or copied at any step. Three classes:
`KVCache` holds the tokens that rows write one by one (all of Llama's, T5's targets), `SharedPromptCache` the prompts of
T5's cross-attention, each stored once for all rows that continue it, and `T5Cache` one of both.

A decoding step has three parts (see `decode` of the models). `cache.plan(n_rows)` says where the step writes and how
far it reads; the model's `step` is pure work on the device, and finds all it needs in the plan; `cache.advance(n_rows)`
counts the tokens that were written. The letters of the shapes are explained in layers.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minidpost.models.layers import attention, mask_bias
from minidpost.precision import key_dtype, to_device

# Fused attention of torch's on a GPU takes a mask as it is only where its lines begin at multiples of 8 numbers, and
# copies any other in every layer. (Ours takes any, but does not run everywhere, see layers.attention.)
MASK_MULTIPLE = 8


def whole_length(n_positions: int) -> int:
    """Up to a multiple of MASK_MULTIPLE."""
    return -(-n_positions // MASK_MULTIPLE) * MASK_MULTIPLE


@dataclass(frozen=True)
class StepPlan:
    """Where one decoding step writes, a token for each of its rows, and how far it reads."""

    row_B: Tensor  # 0 … B − 1: the rows of a step are the first ones of the cache
    position_B: Tensor  # where each row's new token goes: nothing after it is valid
    n_read: int  # positions that are read of every row: those of the longest one, and the new token's

    def n_valid(self) -> Tensor:
        """How many positions each row has, its new token's included, (B,): a step computes them once for all layers."""
        return self.position_B + 1


class KVCache:
    """Keys and values of `n_rows` sequences, each up to `max_tokens` long.

    Shapes: keys_LBGSK and values_LBGSK; length_B (device, long). `lengths` holds the same lengths on the host, so that
    finding the longest row costs no device-to-host transfer.
    """

    def __init__(
        self,
        *,
        n_layers: int,
        n_rows: int,
        n_heads: int,
        max_tokens: int,
        d_head: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        """Room for so many; `dtype` is that of the model's weights."""
        shape = (n_layers, n_rows, n_heads, max_tokens, d_head)
        self.keys_LBGSK = torch.zeros(shape, dtype=key_dtype(dtype, device), device=device)
        self.values_LBGSK = torch.zeros(shape, dtype=dtype, device=device)
        self.length_B = torch.zeros(n_rows, dtype=torch.long, device=device)
        self.row_B = torch.arange(n_rows, device=device)
        self.lengths = np.zeros(n_rows, dtype=np.int64)

    def longest(self, n_rows: int) -> int:
        """The greatest length among the first `n_rows` rows, in tokens."""
        return int(self.lengths[:n_rows].max())

    def plan(self, n_rows: int) -> StepPlan:
        """The next step of the first `n_rows` rows. Its tensors are views of the cache's own."""
        return StepPlan(self.row_B[:n_rows], self.length_B[:n_rows], self.longest(n_rows) + 1)

    def bias(self, plan: StepPlan) -> Tensor:
        """0 where a row has tokens or writes its next one, −inf after that, (B, 1, 1, S)."""
        position_S = torch.arange(plan.n_read, device=self.length_B.device)
        return mask_bias(position_S <= plan.position_B[:, None], self.keys_LBGSK.dtype)

    def write_prompts(self, layer: int, row_Q: Tensor, k_QTGK: Tensor, v_QTGK: Tensor) -> None:
        """Write the first T positions of some rows; the lengths are declared by `set_lengths`."""
        n_written = k_QTGK.shape[1]
        self.keys_LBGSK[layer, row_Q, :, :n_written] = k_QTGK.transpose(1, 2).to(self.keys_LBGSK.dtype)
        self.values_LBGSK[layer, row_Q, :, :n_written] = v_QTGK.transpose(1, 2)

    def append(self, layer: int, plan: StepPlan, k_B1GK: Tensor, v_B1GK: Tensor) -> tuple[Tensor, Tensor]:
        """Write one token to each row of the plan; the rows' keys and values, the new included, twice (B, G, S, K).

        Lengths do not change until `advance`, so that every layer of a step writes to the same position.
        """
        self.keys_LBGSK[layer, plan.row_B, :, plan.position_B] = k_B1GK[:, 0].to(self.keys_LBGSK.dtype)
        self.values_LBGSK[layer, plan.row_B, :, plan.position_B] = v_B1GK[:, 0]
        n_rows = len(k_B1GK)
        keys_BGSK = self.keys_LBGSK[layer, :n_rows, :, : plan.n_read]
        values_BGSK = self.values_LBGSK[layer, :n_rows, :, : plan.n_read]
        return keys_BGSK, values_BGSK

    def advance(self, n_rows: int) -> None:
        """Count the token just written to each of the first `n_rows` rows."""
        self.length_B[:n_rows] += 1
        self.lengths[:n_rows] += 1

    def set_lengths(self, row_ids: Sequence[int], lengths: Sequence[int]) -> None:
        """Declare how many positions of the rows are valid."""
        self.lengths[list(row_ids)] = lengths
        self.length_B[indices(row_ids, self.length_B.device)] = indices(lengths, self.length_B.device)

    @torch.inference_mode()
    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Overwrite each target row with its source row: keys, values and length."""
        # A single row is copied as a slice, which is several times faster than by indices.
        source: int | Tensor = source_ids[0]
        target: int | Tensor = target_ids[0]
        if len(source_ids) > 1:
            source = indices(source_ids, self.length_B.device)
            target = indices(target_ids, self.length_B.device)
        n_used = int(self.lengths[list(source_ids)].max())
        self.keys_LBGSK[:, target, :, :n_used] = self.keys_LBGSK[:, source, :, :n_used]
        self.values_LBGSK[:, target, :, :n_used] = self.values_LBGSK[:, source, :, :n_used]
        self.length_B[target] = self.length_B[source]
        self.lengths[list(target_ids)] = self.lengths[list(source_ids)]

    @torch.inference_mode()
    def clear(self) -> None:
        """Forget all rows; nothing is allocated anew."""
        self.lengths[:] = 0
        self.length_B.zero_()


def indices(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Whole numbers as a tensor on the device. A GPU is not waited for, as it is where a list is an index itself."""
    return to_device(torch.tensor(list(numbers)), device)


@dataclass
class CachedTokens:
    """One layer's tokens in a decoding step, as layers.Attendable: the new token is written, then all are read.

    The bias is `KVCache.bias` or `T5Cache.bias` of the same plan, (B, 1 or H, 1, S), and n_valid_B its `n_valid`;
    scores are multiplied by `scale`.
    """

    cache: KVCache
    layer: int
    plan: StepPlan
    bias_BH1S: Tensor
    n_valid_B: Tensor
    scale: float

    def attend(self, q_B1HK: Tensor, k_B1GK: Tensor, v_B1GK: Tensor) -> Tensor:
        """What each row's new position reads, (B, 1, H, K)."""
        k_BGSK, v_BGSK = self.cache.append(self.layer, self.plan, k_B1GK, v_B1GK)
        # The H / G heads that share keys and values stand where one row's several positions would.
        n_rows, n_groups, _, width = k_BGSK.shape
        q_BGRK = q_B1HK.reshape(n_rows, n_groups, -1, width)
        y_BGRK = attention(q_BGRK, k_BGSK, v_BGSK, self.bias_BH1S, self.n_valid_B, self.scale)
        return y_BGRK.reshape(q_B1HK.shape)


@dataclass(frozen=True)
class PromptPlan:
    """Which rows read which prompt: a table with a line for each prompt, and in it the rows that continue it.

    Lines that are shorter than the longest are filled with row 0: it asks there too, and what it gets is not used.
    """

    table_QR: Tensor  # ids of rows
    cell_of_row_B: Tensor  # where each row stands in the table, counted line by line
    length_Q: Tensor  # tokens of each prompt
    bias_Q11S: Tensor  # 0 for the tokens of a prompt, −inf after them

    def to(self, device: torch.device) -> "PromptPlan":
        """The same on a device, which is not waited for."""
        return PromptPlan(
            table_QR=to_device(self.table_QR, device),
            cell_of_row_B=to_device(self.cell_of_row_B, device),
            length_Q=to_device(self.length_Q, device),
            bias_Q11S=to_device(self.bias_Q11S, device),
        )

    def by_prompt(self, q_B1HK: Tensor) -> Tensor:
        """Put the queries of the rows into the table, (Q, H, R, K)."""
        q_NHK = q_B1HK[:, 0].index_select(0, self.table_QR.flatten())  # N = Q · R, the cells line by line
        q_QRHK = torch.unflatten(q_NHK, 0, self.table_QR.shape)
        return q_QRHK.transpose(1, 2)

    def by_row(self, y_QHRK: Tensor) -> Tensor:
        """Take from the table what belongs to each row, (B, 1, H, K)."""
        return y_QHRK.transpose(1, 2).flatten(0, 1).index_select(0, self.cell_of_row_B)[:, None]


class SharedPromptCache:
    """Keys and values of prompts, each stored once for all rows that continue it, and read once a step for all of them.

    `store` has a slot for each prompt, and `prompt_slot_of_row_B` says which slot a row reads. The prompts that a step
    reads are moved to the first slots, so that they are one slice.
    """

    def __init__(self, store: KVCache):
        self.store = store
        self.prompt_slot_of_row_B: NDArray[np.int64] = np.arange(len(store.lengths))
        self.latest_plan: PromptPlan | None = None  # until rows change

    def begin(self, row_ids: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Slots for the new prompts of the rows, which no longer read what they did before."""
        taken = np.delete(self.prompt_slot_of_row_B, list(row_ids))
        free = np.setdiff1d(np.arange(len(self.prompt_slot_of_row_B)), taken)
        slots: list[int] = free[: len(row_ids)].tolist()
        self.prompt_slot_of_row_B[list(row_ids)] = slots
        self.latest_plan = None
        self.store.set_lengths(slots, lengths)
        return slots

    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """From now on each target row continues the prompt of its source row."""
        self.prompt_slot_of_row_B[list(target_ids)] = self.prompt_slot_of_row_B[list(source_ids)]
        self.latest_plan = None

    def clear(self) -> None:
        """Forget all prompts."""
        self.store.clear()
        self.prompt_slot_of_row_B = np.arange(len(self.prompt_slot_of_row_B))
        self.latest_plan = None

    def plan(self, n_rows: int) -> PromptPlan:
        """How the first `n_rows` rows read their prompts; the same object until rows change."""
        if self.latest_plan is None or len(self.latest_plan.cell_of_row_B) != n_rows:
            self.latest_plan = self._arrange(n_rows).to(self.store.length_B.device)
        return self.latest_plan

    def _arrange(self, n_rows: int) -> PromptPlan:
        """The plan on the host, for which the prompts are moved to the first slots.

        Worked example: rows 0 1 2 3 continue the prompts a b a a, which lie in the slots 0 and 1.
        """
        self._move_to_front(np.unique(self.prompt_slot_of_row_B[:n_rows]))
        slot_B = self.prompt_slot_of_row_B[:n_rows]  # 0 1 0 0
        n_rows_Q = np.bincount(slot_B)  # 3 1: how many rows continue each prompt
        # A row's rank among the rows of its prompt is its place when rows are sorted by prompt (0 2 3 1), less the
        # place of its prompt's first row (0 for a, 3 for b): 0 0 1 2 for the rows 0 1 2 3.
        sorted_row_B = np.argsort(slot_B, kind="stable")
        first_place_Q = n_rows_Q.cumsum() - n_rows_Q
        rank_B = np.empty(n_rows, dtype=np.int64)
        rank_B[sorted_row_B] = np.arange(n_rows) - first_place_Q[slot_B[sorted_row_B]]
        table_QR = np.zeros((len(n_rows_Q), n_rows_Q.max()), dtype=np.int64)
        table_QR[slot_B, rank_B] = np.arange(n_rows)  # [[0, 2, 3], [1, 0, 0]]: a's rows, b's row and two fillers
        cell_of_row_B = slot_B * table_QR.shape[1] + rank_B  # 0 3 1 2
        # A slot in front that nobody reads may be empty: one token is let through, as a softmax needs something.
        length_Q = torch.from_numpy(self.store.lengths[: len(n_rows_Q)].clip(min=1))
        mask_QS = torch.arange(int(length_Q.max())) < length_Q[:, None]
        bias_Q11S = mask_bias(mask_QS, self.store.keys_LBGSK.dtype)
        return PromptPlan(torch.from_numpy(table_QR), torch.from_numpy(cell_of_row_B), length_Q, bias_Q11S)

    def _move_to_front(self, slots: NDArray[np.int64]) -> None:
        """Exchange prompts so that those in `slots` (sorted) come first; no more than an eighth of others among them.

        With a few others among them nothing is moved: reading them costs less.
        """
        n_slots = len(slots)
        if slots[-1] < n_slots + n_slots // 8:
            return
        outside = slots[slots >= n_slots]
        replaceable = np.setdiff1d(np.arange(n_slots), slots)
        self.store.copy_rows([*outside.tolist(), *replaceable.tolist()], [*replaceable.tolist(), *outside.tolist()])
        new_slot = np.arange(len(self.prompt_slot_of_row_B))
        new_slot[outside] = replaceable
        new_slot[replaceable] = outside
        self.prompt_slot_of_row_B = new_slot[self.prompt_slot_of_row_B]


@dataclass
class CachedPrompts:
    """One layer's prompts in a decoding step, as t5.AttendablePrompt; scores are multiplied by `scale`."""

    cache: SharedPromptCache
    layer: int
    plan: PromptPlan
    scale: float

    def attend(self, q_B1HK: Tensor, k_BSHK: Tensor | None = None, v_BSHK: Tensor | None = None) -> Tensor:
        """What each row reads from its prompt, (B, 1, H, K); keys and values have been in the cache since prefill."""
        n_prompts, longest = self.plan.bias_Q11S.shape[0], self.plan.bias_Q11S.shape[-1]
        k_QHSK = self.cache.store.keys_LBGSK[self.layer, :n_prompts, :, :longest]
        v_QHSK = self.cache.store.values_LBGSK[self.layer, :n_prompts, :, :longest]
        q_QHRK = self.plan.by_prompt(q_B1HK)
        y_QHRK = attention(q_QHRK, k_QHSK, v_QHSK, self.plan.bias_Q11S, self.plan.length_Q, self.scale)
        return self.plan.by_row(y_QHRK)


@dataclass(frozen=True)
class T5Plan:
    """One decoding step of T5: the rows' own tokens, and their prompts."""

    own: StepPlan
    prompts: PromptPlan


class T5Cache:
    """What decoding remembers of each row: its own tokens, and its prompt as the cross-attention sees it."""

    def __init__(self, own: KVCache, prompt: SharedPromptCache, bias_SH: Tensor):
        """`bias_SH` is the decoder's position bias by distance, 0 … max_new − 1, in the precision of the keys."""
        self.own = own
        self.prompt = prompt
        # Of each head a table with the greatest distance first, and after distance 0 as much −inf:
        #     b(max_new − 1) … b(2) b(1) b(0) −inf −inf … −inf
        self.bias_HX = torch.cat([bias_SH.flip(0).T, torch.full_like(bias_SH.T, -torch.inf)], dim=1)

    def set_bias(self, bias_SH: Tensor) -> None:
        """Put another position bias, of as many distances, where the one before lies: recorded steps read it there."""
        self.bias_HX[:, : len(bias_SH)] = bias_SH.flip(0).T

    def plan(self, n_rows: int) -> T5Plan:
        """The next step of the first `n_rows` rows."""
        return T5Plan(self.own.plan(n_rows), self.prompt.plan(n_rows))

    def bias(self, plan: StepPlan) -> Tensor:
        """Position bias of each row's own tokens and the next one, −inf after that, (B, H, 1, S).

        The bias of a row that writes to position p is a window of the table, one value for each position that is read:
        it begins at b(p) and runs over b(0), the new token's own, into the −inf. With max_new = 4 and three positions
        read, the table and the windows of two rows:

            b3 b2 b1 b0 −∞ −∞ −∞ −∞
                  b1 b0 −∞              p = 1
               b2 b1 b0                 p = 2
        """
        max_new = self.bias_HX.shape[1] // 2
        window_XHS = self.bias_HX.unfold(1, plan.n_read, 1).transpose(0, 1)  # a view: no window is made
        start_B = max_new - 1 - plan.position_B
        return window_XHS.index_select(0, start_B)[:, :, None]

    def advance(self, n_rows: int) -> None:
        """Count the token just written to each of the first `n_rows` rows."""
        self.own.advance(n_rows)

    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Make each target row an exact copy of its source row."""
        self.own.copy_rows(source_ids, target_ids)
        self.prompt.copy_rows(source_ids, target_ids)

    def clear(self) -> None:
        """Forget all rows; nothing is allocated anew."""
        self.own.clear()
        self.prompt.clear()
