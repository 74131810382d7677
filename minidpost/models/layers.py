"""What both families are made of: linear layers, RMS norm, attention of few queries, and what a layer attends to.

Three of these operations are torch's own, computed in another way where decoding on a CPU is faster for it: there a
step has few rows, and each row has one position. The log-probabilities of labels are computed in another way where
training on a CPU is faster for it.

Letters of the shapes, here and in the other files of this folder: B rows, T new or target positions, S source or
cached positions, N items of a flattened or selected dimension (packed tokens, positions with a label), Q distinct
prompts, R queries that share keys, D model width, F feed-forward width, H heads, G key and value heads, K head width,
V vocabulary, L layers, O outputs of a matrix, M rank of an adapter (lora.py) or packed source tokens beside N targets,
P places of padded rows laid end to end (packing.py), X entries of the table of position biases (kvcache.py).
"""

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from minidpost.models.blocked_weights import copy_in_blocks, kept_in_blocks, multiply

MIN_ENTRIES_FOR_SWAP = 2**17  # entries of a matrix from which on the swapped product is faster, see `linear`
MAX_ROWS_FOR_SWAP = 128
LOGITS_IN_CACHE = 2**19  # [ours] numbers: 2 MiB in fp32


class Attendable(Protocol):
    """What a layer may attend to: in training the positions of a batch, in decoding a cache.

    q_BTHK are the queries of the new positions, k_BTGK and v_BTGK their keys and values (G = H but for Llama's grouped
    heads). Given back is what each query reads, y_BTHK.
    """

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor: ...


def mask_bias(mask_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where the mask is True and −inf elsewhere, (B, 1, 1, S)."""
    bias_BS = torch.zeros(mask_BS.shape, dtype=dtype, device=mask_BS.device).masked_fill_(~mask_BS, -torch.inf)
    return bias_BS[:, None, None]


class AttentionOfFewQueries(Protocol):
    """What decode_attention.decode_attention is; arguments as those of `attention`."""

    def __call__(
        self, q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_BG1S: Tensor, n_valid_B: Tensor, scale: float, /
    ) -> Tensor: ...


def attention(
    q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_BG1S: Tensor, n_valid_B: Tensor, scale: float
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v for few queries a row, (B, G, R, K).

    Each of the G heads of keys and values is read by R queries. The bias is anything that broadcasts to (B, G, 1, S),
    in the precision of the keys, which may be higher than that of queries and values (precision.key_dtype). It is −inf
    from a row's n_valid on, so that those positions need not be read; our kernel on CUDA devices does not read them.
    """
    dtype = q_BGRK.dtype
    if q_BGRK.is_cuda and not torch.is_grad_enabled():
        kernel = decoding_kernel(k_BGSK.device, k_BGSK.dtype, k_BGSK.shape[-1])
        if kernel is not None:
            return kernel(q_BGRK, k_BGSK, v_BGSK, bias_BG1S, n_valid_B, scale)
    q_BGRK = q_BGRK.to(k_BGSK.dtype)
    if q_BGRK.device.type != "cpu":
        # For few queries plain products take a third less time on a GPU too, but they round scores to bf16 before the
        # softmax, which the fused kernel does not (benchmarks/results/gpu.md).
        return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, bias_BG1S, scale=scale).to(dtype)
    # The fused kernel is made for many queries; for one a row, plain products take a fifth less time on a CPU.
    if scale != 1.0:
        q_BGRK = q_BGRK * scale
    weight_BGRS = torch.matmul(q_BGRK, k_BGSK.mT).add_(bias_BG1S).softmax(-1)
    # Products of three dimensions, one for each of the B · G heads: with bf16 values faster than matmul's of four.
    y_NRK = torch.bmm(weight_BGRS.to(v_BGSK.dtype).flatten(0, 1), v_BGSK.flatten(0, 1))
    return y_NRK.view(q_BGRK.shape).to(dtype)


@cache
def decoding_kernel(device: torch.device, dtype: torch.dtype, width: int) -> AttentionOfFewQueries | None:
    """Our kernel for keys of this precision and heads of this width, or None; with a warning where it does not run.

    It is tried once, on a single position, which compiles it too: Triton may be missing (torch has it on Linux alone),
    find no C compiler for the code that launches kernels, or not know a GPU as old as this one.
    """
    is_suitable = dtype in (torch.bfloat16, torch.float32) and width >= 16 and width.bit_count() == 1
    if not is_suitable:
        return None
    try:
        from minidpost.models.decode_attention import decode_attention  # it needs Triton, which CPUs do not have

        # Laid out as a cache is, so that what is compiled here is what decoding needs.
        k_BGSK = torch.zeros(1, 1, 64, width, dtype=dtype, device=device)
        bias_BG1S = torch.zeros(1, 1, 1, 64, dtype=dtype, device=device)
        n_valid_B = torch.ones(1, dtype=torch.long, device=device)
        ones_BGSK = torch.ones_like(k_BGSK)
        y_BGRK = decode_attention(k_BGSK[:, :, :1], k_BGSK, ones_BGSK, bias_BG1S, n_valid_B, 1.0)
        if not bool((y_BGRK == 1).all()):
            raise RuntimeError("it does not give 1 where all values are 1")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, there is another way
        warn_of_no_kernel("decoding will be slower", error, stacklevel=4)
        return None
    return decode_attention


def warn_of_no_kernel(effect: str, error: Exception, stacklevel: int) -> None:
    """One line: what follows, and why a kernel of ours does not run."""
    reason = str(error).strip().splitlines()
    text = f"no kernel for attention, {effect} ({type(error).__name__}: {reason[0] if reason else ''})"
    warnings.warn(text, stacklevel=stacklevel)


def computed_in(x: Tensor) -> torch.dtype:
    """The precision that products of x are computed in: autocast's where that is at work, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def linear(x_BTD: Tensor, weight_OD: Tensor) -> Tensor:
    """x weightᵀ, (…, D) to (…, O).

    While a model decodes on a CPU its large matrices have copies that are multiplied faster (blocked_weights.py). Where
    they have none, for few rows and a large matrix the product is computed as (weight xᵀ)ᵀ: the threads of the library
    then share the matrix and need not copy it first, which takes a fifth to a half less time.
    """
    if x_BTD.device.type == "cpu" and not torch.is_grad_enabled():
        copy_OD = copy_in_blocks(weight_OD)
        if copy_OD is not None:
            return multiply(x_BTD, copy_OD)
        has_few_rows = x_BTD.numel() <= MAX_ROWS_FOR_SWAP * x_BTD.shape[-1]
        if has_few_rows and weight_OD.numel() >= MIN_ENTRIES_FOR_SWAP:
            y_ON = torch.mm(weight_OD, x_BTD.flatten(0, -2).T)
            return torch.unflatten(y_ON.T, 0, x_BTD.shape[:-1])
    return F.linear(x_BTD, weight_OD)


class Linear(nn.Linear):
    """torch's Linear, with the faster product for few rows (see `linear`)."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x weightᵀ + bias, (…, D) to (…, O)."""
        y_BTO = linear(x_BTD, self.weight)
        return y_BTO if self.bias is None else y_BTO + self.bias


def linears(x_BTD: Tensor, *layers: Linear) -> list[Tensor]:
    """What each of several layers makes of the same x, (…, D) to (…, O); one product where they are copied together."""
    is_decoding = x_BTD.device.type == "cpu" and not torch.is_grad_enabled()
    if is_decoding and all(type(layer) is Linear for layer in layers):  # an adapter (lora.py) adds something
        copy_OD = copy_in_blocks(*[layer.weight for layer in layers])
        if copy_OD is not None:
            products = multiply(x_BTD, copy_OD).split([layer.out_features for layer in layers], dim=-1)
            pairs = zip(products, layers, strict=True)
            return [y_BTO if layer.bias is None else y_BTO + layer.bias for y_BTO, layer in pairs]
    return [layer(x_BTD) for layer in layers]


class RMSNorm(nn.RMSNorm):
    """torch's RMSNorm, x / √(mean(x²) + eps) · weight; without gradients on a CPU in three passes over x, not six.

    Under autocast it is computed in the precision of x and given in autocast's, to which the linear layers after it
    would cast it each for itself. (Spread over GPUs, training/parallel.py, the weight may be bf16 where x is fp32.)
    """

    def forward(self, x_BTD: Tensor) -> Tensor:
        """x / rms(x) · weight over the last dimension, (…, D)."""
        if x_BTD.device.type != "cpu" or x_BTD.dtype == torch.bfloat16 or torch.is_grad_enabled():
            # Of one precision, as torch has a kernel for that alone. (Queries and keys are bf16 under autocast.)
            dtype = torch.promote_types(self.weight.dtype, x_BTD.dtype)
            y_BTD = F.rms_norm(x_BTD.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps)
            return y_BTD.to(computed_in(y_BTD))
        # x · weight · √D / √(Σx² + D·eps) is the same number.
        width = x_BTD.shape[-1]
        eps = torch.finfo(x_BTD.dtype).eps if self.eps is None else self.eps
        norm_BT1 = torch.linalg.vector_norm(x_BTD, dim=-1, keepdim=True)
        scale_BT1 = norm_BT1.square_().add_(width * eps).rsqrt_()
        scaled_BTD: Tensor = x_BTD * scale_BT1
        return scaled_BTD.mul_(self.weight * width**0.5)


def token_log_probabilities(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """log f(y_t | x, y_<t) of each label in nats, (N,), computed in at least fp32."""
    if logits_NV.is_cpu:
        result_N: Tensor = _TokenLogProbabilities.apply(logits_NV, label_N)  # type: ignore[no-untyped-call]
        return result_N
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    return -F.cross_entropy(logits_NV.to(dtype), label_N, reduction="none")


class _TokenLogProbabilities(torch.autograd.Function):
    """logit_y − log Σ exp(logit), a few positions at a time, which stay in the processor's cache.

    Besides the logits and their gradient nothing of their size is kept or written. cross_entropy writes their
    log-softmax, and in the backward pass the gradient of that, most of which is zeros: it takes four times as long.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, label_N: Tensor) -> Tensor:
        """The log-probabilities; log Σ exp(logit) is kept for the backward pass."""
        dtype = torch.promote_types(logits_NV.dtype, torch.float32)
        log_total_N = torch.empty(len(logits_NV), dtype=dtype)
        for rows in position_groups(logits_NV):
            group_NV = logits_NV[rows].to(dtype)
            highest_N1 = group_NV.amax(-1, keepdim=True)
            log_total_N[rows] = (group_NV - highest_N1).exp_().sum(-1).log_().add_(highest_N1[:, 0])
        ctx.save_for_backward(logits_NV, label_N, log_total_N)
        return logits_NV.gather(1, label_N[:, None])[:, 0].to(dtype) - log_total_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        """Of a logit: 1 for the label's and 0 for others, less the token's probability."""
        logits_NV, label_N, log_total_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        for rows in position_groups(logits_NV):
            grad_N1 = grad_N[rows, None]
            group_grad_NV = (logits_NV[rows] - log_total_N[rows, None]).exp_().mul_(-grad_N1)
            grad_NV[rows] = group_grad_NV.scatter_add_(1, label_N[rows, None], grad_N1)
        return grad_NV, None


def position_groups(logits_NV: Tensor) -> Iterator[slice]:
    """The positions that `_TokenLogProbabilities` computes at a time: one or more."""
    n_positions, vocab_size = logits_NV.shape
    n_at_once = max(1, LOGITS_IN_CACHE // vocab_size)
    for start in range(0, n_positions, n_at_once):
        yield slice(start, start + n_at_once)


class LanguageModel(nn.Module):
    """What T5 and Llama have in common: hidden states, logits, and the log-probabilities that both are trained by."""

    embedding: nn.Embedding
    head: Linear | None  # the output matrix; None where it is the embedding's

    def hidden(self, *args: Any, **kwargs: Any) -> Tensor:
        """Final hidden states, (B, T, D), of what the family takes as inputs."""
        raise NotImplementedError

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The output matrix: (…, D) to (…, V)."""
        return linear(hidden_BTD, self.output_matrix)

    @property
    def output_matrix(self) -> Tensor:
        """(V, D); T5 v1.0 and many Llamas have one matrix for input and output."""
        return self.embedding.weight if self.head is None else self.head.weight

    def decoding(self) -> AbstractContextManager[None]:
        """To be open while the model decodes and its weights do not change: products on a CPU are faster."""
        return kept_in_blocks(self.matrices())

    def matrices(self) -> list[Tensor]:
        """All matrices that hidden states are multiplied by, each once."""
        matrices: list[Tensor] = [module.weight for module in self.modules() if isinstance(module, Linear)]
        return matrices if self.head is not None else [*matrices, self.output_matrix]

    def label_log_probabilities(
        self, inputs: tuple[Any, ...], *, label_N: Tensor, position_N: Tensor, positions_at_once: int
    ) -> Tensor:
        """log f of the label at each of N positions of the flattened (B·T), in nats, (N,): all that training needs.

        It is one method, so that a model whose weights are spread over processes (training/parallel.py) gathers them
        once for it. Logits exist for `positions_at_once` at a time: those of a whole batch would outweigh the model.
        """
        # Only the N positions that have a label go through the output matrix, not the padding, and not Llama's prompts.
        hidden_ND = self.hidden(*inputs).flatten(0, 1)[position_N]
        if len(label_N) <= positions_at_once:
            return self._of_positions(hidden_ND, label_N)
        # Each chunk's logits are freed once its log-probabilities are known; the backward pass computes them again.
        chunks = zip(hidden_ND.split(positions_at_once), label_N.split(positions_at_once), strict=True)
        return torch.cat([checkpoint(self._of_positions, *chunk, use_reentrant=False) for chunk in chunks])

    def _of_positions(self, hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        """The log-probability of the label at each of N positions, (N,)."""
        return token_log_probabilities(self.logits(hidden_ND), label_N)


class LayerStack(nn.Module):
    """Layers of one kind, and how they are run when gradients are wanted.

    With `checkpoint_activations` only each layer's inputs are kept for the backward pass, and the rest is computed a
    second time (activation checkpointing): a third more time for a fraction of the memory. Results are the same, as
    dropout is repeated too.
    """

    layers: nn.ModuleList
    norm: RMSNorm

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint_activations = False

    def run(self, layer: nn.Module, *inputs: object) -> Tensor:
        """`layer(*inputs)`, a hidden state of the shape of the first input."""
        y_BTD: Tensor
        if self.checkpoint_activations:
            y_BTD = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            y_BTD = layer(*inputs)
        return y_BTD
