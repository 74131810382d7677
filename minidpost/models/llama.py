"""Llama (Touvron et al. 2023, arXiv 2302.13971; Llama-3: arXiv 2407.21783), for training and for cached decoding.

Ids in, logits out. Pre-norm residual layers with RMS norm, rotary positions in Hugging Face's mapping (a head's first
half rotates against its second), SwiGLU, and query heads that share keys and values in groups. Llama-3.1 stretches the
slow rotations (`RopeScaling`). Positions are per row, so a row's logits do not depend on its neighbours' lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpost.models.kvcache import KVCache, decoding_step
from minidpost.models.layers import Linear, RMSNorm, attention, linear


@dataclass(frozen=True)
class RopeScaling:
    """How rotations are slowed: "linear" all alike, "llama3" those that turn less than the other numbers say."""

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama; `n_heads * d_head` may differ from `d_model`. It has no start id: a prompt comes first."""

    vocab_size: int
    d_model: int
    d_ff: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_positions: int = 2048
    attention_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False
    bos_id: int = 1
    eos_id: int | tuple[int, ...] = 2

    @property
    def is_encoder_decoder(self) -> Literal[False]:
        """False: prompt and target are one sequence."""
        return False


class Attention(nn.Module):
    """Causal attention of grouped heads: each key and value head serves n_heads / n_kv_heads queries."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.d_head, bias = config.d_head, config.attention_bias
        self.query = Linear(config.d_model, config.n_heads * config.d_head, bias=bias)
        self.key = Linear(config.d_model, config.n_kv_heads * config.d_head, bias=bias)
        self.value = Linear(config.d_model, config.n_kv_heads * config.d_head, bias=bias)
        self.output = Linear(config.n_heads * config.d_head, config.d_model, bias=bias)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values: (…, D) to (…, H, K) and twice (…, G, K); cos and sin are (…, 1, K)."""
        q, k, v = (linear(x).unflatten(-1, (-1, self.d_head)) for linear in (self.query, self.key, self.value))
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        """Attention within rows, (B, T, H·K); without a mask each position sees itself and those before it."""
        q_BHTK, k_BGTK, v_BGTK = (x.transpose(1, 2) for x in (q_BTHK, k_BTGK, v_BTGK))
        is_grouped = q_BHTK.shape[1] != k_BGTK.shape[1]
        y_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, mask_B1TT, is_causal=mask_B1TT is None, enable_gqa=is_grouped
        )
        return y_BHTK.transpose(1, 2).flatten(2)

    def attend_one(self, q_BHK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_B11S: Tensor) -> Tensor:
        """Attention of one position a row, (B, H·K); the queries of a group stand where others have several times."""
        q_BGRK = q_BHK.unflatten(1, (k_BGSK.shape[1], -1))
        return attention(q_BGRK, k_BGSK, v_BGSK, bias_B11S, self.d_head**-0.5).flatten(1)


class FeedForward(nn.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Self-attention and feed-forward, each normed before and added back after."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        q, k, v = self.attention.project(self.attention_norm(x_BTD), cos_BT1K, sin_BT1K)
        return self.finish(x_BTD, self.attention.attend(q, k, v, mask_B1TT))

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """What follows attention: (…, D) and (…, H·K) to (…, D)."""
        x = x + self.attention.output(attended)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Stack(nn.Module):
    """All layers and the norm behind the last."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class Llama(nn.Module):
    """The decoder-only model: `model(ids_BT, mask_BT) -> logits_BTV`."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.stack = Stack(config)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        """What source tokens pass, and what target tokens do: the same."""
        return self.stack, self.stack

    @torch.no_grad()
    def initialise(self) -> "Llama":
        """Draw fresh weights from the global generator: fan-in scaled, what is added to the stream by depth too."""
        depth = (2 * self.config.n_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                scale = depth if name.endswith(("output.weight", "down.weight")) else 1.0
                weight.normal_(std=0.02 if weight is self.embedding.weight else scale * weight.shape[1] ** -0.5)
        return self

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """Logits for the token after each position, (B, T, V).

        mask_BT is bool, True = a token, for padding anywhere; without it every row begins at once, and what pads it
        stands behind its end, where no token can see it.
        """
        return self.logits(self.hidden(ids_BT, mask_BT))

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """What the output matrix turns into logits, (B, T, D)."""
        n_positions, mask_B1TT = ids_BT.shape[1], None
        position_BT = torch.arange(n_positions, device=ids_BT.device)[None]
        if mask_BT is not None:
            causal_TT = position_BT.T >= position_BT
            itself_TT = position_BT == position_BT.T  # so that a padded position, which nobody reads, sees something
            mask_B1TT = ((causal_TT & mask_BT[:, None]) | itself_TT)[:, None]
            position_BT = mask_BT.long().cumsum(1).sub(1).clamp(min=0)
        rotation = self.rotation(position_BT)
        x_BTD = self.embedding(ids_BT)
        for layer in self.stack.layers:
            x_BTD = layer(x_BTD, *rotation, mask_B1TT)
        return self.stack.norm(x_BTD)

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The output matrix, which may be the embedding's: (…, D) to (…, V)."""
        return linear(hidden_BTD, self.embedding.weight if self.head is None else self.head.weight)

    def rotation(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles at each position: (…) to twice (…, 1, K). Angles are fp32, as published."""
        angle = position[..., None].float() * frequencies(self.config, position.device)
        angle = torch.cat([angle, angle], dim=-1)[..., None, :]
        dtype = self.embedding.weight.dtype
        return angle.cos().to(dtype), angle.sin().to(dtype)

    @torch.inference_mode()
    def new_cache(self, rows: int, max_prompt: int, max_new: int) -> KVCache:
        """Room for `rows` sequences of at most `max_prompt` + `max_new` tokens."""
        self.eval()
        config, weight = self.config, self.embedding.weight
        size = max_prompt + max_new
        return KVCache(config.n_layers, rows, config.n_kv_heads, size, config.d_head, weight.dtype, weight.device)

    @torch.inference_mode()
    def prefill(self, cache: KVCache, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Start `rows` afresh on the prompts but for their last ids, which it gives: each row decodes its own first.

        The tokens of all prompts stand in one line, so that no padding is multiplied; attention alone sees rows.
        """
        device, rows = self.embedding.weight.device, list(rows)
        lengths = [len(prompt) - 1 for prompt in prompts]
        cache.set_lengths(rows, lengths)
        if any(lengths):
            ids_N = torch.tensor([token_id for prompt in prompts for token_id in prompt[:-1]], device=device)
            shape = (len(rows), max(lengths))
            place = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).nonzero().to(device).unbind(1)
            rotation, x_ND = self.rotation(place[1]), self.embedding(ids_N)
            for index, layer in enumerate(self.stack.layers):
                projected = layer.attention.project(layer.attention_norm(x_ND), *rotation)
                padded = [x.new_zeros(*shape, *x.shape[1:]).index_put_(place, x) for x in projected]
                cache.keys_LBHSK[index, rows, :, : shape[1]] = padded[1].transpose(1, 2)
                cache.values_LBHSK[index, rows, :, : shape[1]] = padded[2].transpose(1, 2)
                x_ND = layer.finish(x_ND, layer.attention.attend(*padded, None)[place])
        return [prompt[-1] for prompt in prompts]

    @decoding_step
    def decode(self, cache: KVCache, ids_B: Tensor) -> Tensor:
        """Feed one token to each of the cache's first B rows, at the row's own position; logits_BV of what follows."""
        n_rows = len(ids_B)
        bias_B11S, rotation, x_BD = cache.bias(n_rows), self.rotation(cache.length_B[:n_rows]), self.embedding(ids_B)
        for index, layer in enumerate(self.stack.layers):
            q_BHK, k_BGK, v_BGK = layer.attention.project(layer.attention_norm(x_BD), *rotation)
            k_BGSK, v_BGSK = cache.append(index, k_BGK[:, :, None], v_BGK[:, :, None])
            x_BD = layer.finish(x_BD, layer.attention.attend_one(q_BHK, k_BGSK, v_BGSK, bias_B11S))
        return self.logits(self.stack.norm(x_BD))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of a head by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


@cache
def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Radians a position of each of the K/2 rotations, fp32."""
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, config.d_head, 2).float() / config.d_head).to(device)
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # llama3: rotations slower than the original context are stretched, fast ones are not, and between it is blended
    turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequency / scaling.factor + share * frequency
