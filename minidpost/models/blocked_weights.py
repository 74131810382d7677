"""Matrices kept a second time in oneDNN's order, for decoding on a CPU.

A decoding step multiplies every matrix of the model by few rows. oneDNN, torch's library for products of bf16 numbers
on a CPU, reads a matrix in blocks that suit the processor's registers. From a matrix that lies row by row, as a
checkpoint's do, it makes these blocks anew in each product, which for few rows takes as long as multiplying. So while a
model decodes there is a copy of each large matrix that lies in blocks already: the same numbers are added in the same
order, in a third to nine tenths of the time (docs/speed.md). In fp32, for which torch takes MKL where nothing else is
asked for, oneDNN with blocks is faster as well; sums are rounded otherwise there, and a row's hardly depend on how many
rows are multiplied. Matrices that multiply the same rows (queries, keys and values) are copied into one.

torch gives its public functions no such order, but torch.compile uses it for weights that it takes to be frozen, by two
private operations. They are tried once, and where they are missing all is computed as without them.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

MIN_ENTRIES_FOR_BLOCKS = 2**16  # entries of a matrix from which on blocks are faster in fp32; in bf16 all are
# [ours] Copies are as large as the weights: those of larger models might not fit where the models themselves do. (It is
# a number and not the memory that is free, as a run must repeat, and in fp32 sums are rounded otherwise.)
MAX_ENTRIES_FOR_BLOCKS = 2_000_000_000

# Of the models that decode: how many times each of their matrices is kept, and the copies of those that have been
# multiplied by. (A tensor as a key is told apart by its identity.)
_decoding: Counter[Tensor] = Counter()
_copies: dict[tuple[Tensor, ...], Tensor] = {}


@contextmanager
def kept_in_blocks(weights: Sequence[Tensor]) -> Iterator[None]:
    """While this is open, `layers.linear` multiplies by copies of a model's matrices, which must not change meanwhile.

    A copy is made when a matrix is first multiplied by; 100 million entries take a tenth to a fifth of a second.
    """
    kept = copied(weights, weights[0].dtype, weights[0].device) if weights else []
    _decoding.update(kept)
    try:
        yield
    finally:
        _decoding.subtract(kept)
        ended = {weight_OD for weight_OD in kept if not _decoding[weight_OD]}
        for weight_OD in ended:
            del _decoding[weight_OD]
        for joined in [joined for joined in _copies if not ended.isdisjoint(joined)]:
            del _copies[joined]


def copied(weights: Sequence[Tensor], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Of the matrices that a model multiplies by, those that may be copied where it decodes in this precision there."""
    is_too_large = sum(weight_OD.numel() for weight_OD in weights) > MAX_ENTRIES_FOR_BLOCKS
    if torch.device(device).type != "cpu" or is_too_large or not has_blocked_products(dtype):
        return []
    return list(weights)


def copy_in_blocks(*weights: Tensor) -> Tensor | None:
    """The copy that `multiply` takes of one matrix or of several, one above the other; None where there is none."""
    if weights in _copies:
        return _copies[weights]
    n_entries = sum(weight_OD.numel() for weight_OD in weights)
    if n_entries < MIN_ENTRIES_FOR_BLOCKS or not all(weight_OD in _decoding for weight_OD in weights):
        return None
    _copies[weights] = in_blocks(torch.cat([weight_OD.detach() for weight_OD in weights]))
    return _copies[weights]


@cache
def has_blocked_products(dtype: torch.dtype) -> bool:
    """Whether torch has the two operations for this precision on this processor, which is tried on a small product."""
    x_ND = torch.ones(2, 16, dtype=dtype)
    weight_OD = torch.ones(16, 16, dtype=dtype)
    try:
        y_NO = multiply(x_ND, in_blocks(weight_OD))
    except (AttributeError, RuntimeError):  # not in this build of torch; not in this precision
        return False
    return bool((y_NO == 16).all())


def in_blocks(weight_OD: Tensor) -> Tensor:
    """A copy in oneDNN's order, which only `multiply` can read."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OD)
    return copy


def multiply(x_BTD: Tensor, copy_OD: Tensor) -> Tensor:
    """x weightᵀ of a copy that `in_blocks` made, (…, D) to (…, O); without gradients."""
    y_BTO: Tensor = torch.ops.mkldnn._linear_pointwise(x_BTD, copy_OD, None, "none", [], "")
    return y_BTO
