"""Llama (Touvron et al. 2023, arXiv 2302.13971; Llama-3: arXiv 2407.21783), for training and for cached decoding.

Families of its kind are settings of the same model (`LLAMA_FAMILIES` in hf_config.py): Mistral (arXiv 2310.06825) is a
Llama with another name, Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115) have biases on queries, keys and values, Qwen3
(arXiv 2505.09388) an RMS norm over each head of the queries and keys instead. SmolLM2 and TinyLlama are Llamas by name
too. Attention is full in all of them: where a model has a sliding window (Mistral 0.1), sequences must fit in it.

Ids in, logits out. Pre-norm residual layers with RMS norm, rotary positions in Hugging Face's mapping (a head's first
half rotates against its second), SwiGLU, and query heads that share keys and values in groups. Llama-3.1 stretches the
slow rotations (`RopeScaling`). Positions are per row, so a row's logits do not depend on its neighbours' lengths.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpost.errors import UserError
from minidpost.models.dropped_attention import dropped_attention
from minidpost.models.kvcache import CachedTokens, KVCache, StepPlan, indices
from minidpost.models.layers import Attendable, LanguageModel, LayerStack, Linear, RMSNorm, computed_in, linears
from minidpost.models.packed_attention import AttentionInPaddedRows, PackedAttention, packed_kernel
from minidpost.models.packing import Packing, rows_of
from minidpost.precision import to_device


@dataclass(frozen=True)
class RopeScaling:
    """How rotations are slowed for longer contexts than a model was first trained on.

    "linear" divides all frequencies by the factor. "llama3" does so where a rotation makes fewer than
    low_frequency_factor turns within the original context, leaves those alone that make more than
    high_frequency_factor, and blends in between.
    """

    kind: str
    factor: float
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a Llama or of a model of its kind; `n_heads * d_head` may differ from `d_model`.

    It has no start id: a prompt comes first.
    """

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
    max_positions: int = 2048  # carried from and to config.json; nothing here consults it
    window: int | None = None  # positions of a sliding window: no longer sequences are computed, see `check_length`
    qkv_bias: bool = False  # of queries, keys and values
    output_bias: bool = False  # of the attention's output
    qk_norm: bool = False  # an RMS norm over each head of queries and keys, before they are turned
    mlp_bias: bool = False
    dropout: float = 0.0  # a probability; what a Llama is trained with unless its `dropout` is set
    tied: bool = False
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2
    family: str = "llama"  # config.json's model_type

    @property
    def is_encoder_decoder(self) -> Literal[False]:
        """False: prompt and target are one sequence."""
        return False

    def check_length(self, n_positions: int) -> None:
        """UserError for sequences longer than a sliding window: within it each position sees all before it."""
        if self.window is not None and n_positions > self.window:
            raise UserError(
                f"sequences of {n_positions:,} tokens are longer than this model's sliding window of {self.window:,}; "
                "longer ones are not supported: lower --max-new-tokens, or --max-source and --max-target"
            )


class Rotation(NamedTuple):
    """Cosines and sines of the angles by which queries and keys are turned at each position.

    The sines of a head's first half are negative: (a, b) becomes (a cos − b sin, b cos + a sin).
    """

    cos_BT1K: Tensor
    sin_BT1K: Tensor


@dataclass(frozen=True)
class CausalAttention:
    """Attention within a batch, in training: each position sees itself and those before it (a layers.Attendable).

    mask_B1TT is True where a query (next to last) may see a key (last); without it rows are taken to begin together.
    `dropout` is the probability with which a weight of the softmax is dropped.
    """

    mask_B1TT: Tensor | None = None
    dropout: float = 0.0

    def attend(self, q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor) -> Tensor:
        """What each query reads, (B, T, H, K)."""
        q_BHTK = q_BTHK.transpose(1, 2)
        k_BGTK = k_BTGK.transpose(1, 2)
        v_BGTK = v_BTGK.transpose(1, 2)
        if self.dropout and q_BTHK.is_cpu and q_BTHK.requires_grad:
            mask_B1TT = self.mask_B1TT
            if mask_B1TT is None:
                n_positions = q_BTHK.shape[1]
                mask_B1TT = torch.ones(1, 1, n_positions, n_positions, dtype=torch.bool).tril()
            scale = q_BTHK.shape[-1] ** -0.5
            y_BHTK = dropped_attention(q_BHTK, k_BGTK, v_BGTK, mask_B1TT, dropout=self.dropout, scale=scale)
        else:
            y_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BGTK,
                v_BGTK,
                self.mask_B1TT,
                dropout_p=self.dropout,
                is_causal=self.mask_B1TT is None,
                enable_gqa=q_BTHK.shape[2] != k_BTGK.shape[2],
            )
        return y_BHTK.transpose(1, 2)


@dataclass(frozen=True)
class PackedPrompts:
    """One layer's prompts in the prefill (a layers.Attendable): packed tokens are put into rows, cached, attended to.

    Packed token n belongs to position position_N[n] of prompt prompt_N[n], whose keys and values go to the cache's row
    row_Q[prompt_N[n]].
    """

    cache: KVCache
    layer: int
    row_Q: Tensor
    prompt_N: Tensor
    position_N: Tensor
    longest: int

    def unpack(self, x_1NHK: Tensor) -> Tensor:
        """A row for each prompt, padded with zeros on the right: (1, N, …) to (Q, T, …)."""
        x_QTHK = x_1NHK.new_zeros(len(self.row_Q), self.longest, *x_1NHK.shape[2:])
        return x_QTHK.index_put_((self.prompt_N, self.position_N), x_1NHK[0])

    def attend(self, q_1NHK: Tensor, k_1NGK: Tensor, v_1NGK: Tensor) -> Tensor:
        """What each packed token reads of its own prompt, (1, N, H, K)."""
        q_QTHK = self.unpack(q_1NHK)
        k_QTGK = self.unpack(k_1NGK)
        v_QTGK = self.unpack(v_1NGK)
        self.cache.write_prompts(self.layer, self.row_Q, k_QTGK, v_QTGK)
        # Padding comes after a prompt's tokens, where the causal order hides it from them.
        y_QTHK = CausalAttention().attend(q_QTHK, k_QTGK, v_QTGK)
        return y_QTHK[self.prompt_N, self.position_N][None]


class Attention(nn.Module):
    """Attention of grouped heads with rotary positions: each key and value head serves H / G query heads."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.d_head = config.d_head
        self.query = Linear(config.d_model, config.n_heads * config.d_head, bias=config.qkv_bias)
        self.key = Linear(config.d_model, config.n_kv_heads * config.d_head, bias=config.qkv_bias)
        self.value = Linear(config.d_model, config.n_kv_heads * config.d_head, bias=config.qkv_bias)
        self.output = Linear(config.n_heads * config.d_head, config.d_model, bias=config.output_bias)
        self.query_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(config.d_head, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BTD: Tensor, rotation: Rotation, own: Attendable) -> Tensor:
        """What the positions of x read of `own`, (B, T, D) to (B, T, D)."""
        projections = linears(x_BTD, self.query, self.key, self.value)
        q_BTHK, k_BTGK, v_BTGK = (y_BTO.unflatten(-1, (-1, self.d_head)) for y_BTO in projections)
        if self.query_norm is not None and self.key_norm is not None:
            q_BTHK = self.query_norm(q_BTHK)
            k_BTGK = self.key_norm(k_BTGK)
        # Only what is compared is turned: scores then depend on the distance of two positions.
        y_BTHK = own.attend(rotate(q_BTHK, rotation), rotate(k_BTGK, rotation), v_BTGK)
        y_BTD: Tensor = self.output(y_BTHK.flatten(2))
        return y_BTD


class FeedForward(nn.Module):
    """down(silu(gate x) · up x)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Each position by itself, (B, T, D) to (B, T, D)."""
        gate_BTF, up_BTF = linears(x_BTD, self.gate, self.up)
        y_BTD: Tensor = self.down(F.silu(gate_BTF) * up_BTF)
        return y_BTD


class Layer(nn.Module):
    """Self-attention and feed-forward, each normed before and added back after."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BTD: Tensor, rotation: Rotation, own: Attendable) -> Tensor:
        """One layer, (B, T, D) to (B, T, D); `own` is what its positions attend to."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rotation, own)
        x_BTD = x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))
        return x_BTD


class Stack(LayerStack):
    """All layers, and the norm that follows the last."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class Llama(LanguageModel):
    """The decoder-only model, Llama or of its kind: `model(ids_BT, mask_BT) -> logits_BTV`.

    `dropout`, in training mode, is the probability with which an attention weight is dropped: a Llama has no dropout
    elsewhere. It is the config's until it is set; setting it leaves the config as it is.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.stack = Stack(config)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        """The layers that source tokens pass, and those that target tokens pass: the same."""
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

    def forward(self, ids_BT: Tensor, mask_BT: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Logits for the token after each position, (B, T, V).

        mask_BT is bool, True = a token, for padding anywhere. Without it rows are right-padded: all begin at once, and
        padding comes after a row's end, where no token can see it. With the `packing` of right-padded rows only tokens
        are computed; logits at padding then mean nothing.
        """
        return self.logits(self.hidden(ids_BT, mask_BT, packing))

    def hidden(self, ids_BT: Tensor, mask_BT: Tensor | None = None, packing: Packing | None = None) -> Tensor:
        """Final hidden states, (B, T, D), which `logits` multiplies by the output matrix.

        The product right-pads and gives no mask: that branch is here for the contract `llama(ids_BT, mask_BT)`, for
        tests that compare with left-padded rows, and for users of the class.
        """
        self.config.check_length(ids_BT.shape[1])
        position_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device)[None]
        mask_B1TT = None
        if mask_BT is not None:
            causal_TT = position_BT.T >= position_BT
            # Padded positions see themselves, so that their softmax has something to see; nobody reads the result.
            itself_TT = position_BT == position_BT.T
            mask_B1TT = ((causal_TT & mask_BT[:, None]) | itself_TT)[:, None]
            position_BT = mask_BT.long().cumsum(1).sub(1).clamp(min=0)  # a row's first token is at position 0

        dropout = self.dropout if self.training else 0.0
        own: Attendable = CausalAttention(mask_B1TT, dropout)
        if packing is not None:
            ids_BT = packing.pack(ids_BT)
            position_BT = packing.column_1N
            kernel = packed_kernel(self.embedding.weight, self.config.d_head)
            if kernel is None:
                own = AttentionInPaddedRows(own, packing, packing)
            else:
                scale = self.config.d_head**-0.5
                own = PackedAttention(kernel, rows_of(packing, packing), scale=scale, is_causal=True, dropout=dropout)
        rotation = self.rotation(position_BT)
        x_BTD = self.embedding(ids_BT)  # (1, N, D) if packed
        for layer in self.stack.layers:
            x_BTD = self.stack.run(layer, x_BTD, rotation, own)
        hidden_BTD: Tensor = self.stack.norm(x_BTD)
        return hidden_BTD if packing is None else packing.unpack(hidden_BTD)

    def rotation(self, position_BT: Tensor) -> Rotation:
        """Cosines and sines of the angles at each position, (B, T) to twice (B, T, 1, K)."""
        # Angles are fp32, as published: in bf16 neighbouring positions far from 0 would have the same.
        angle_BTK = position_BT[..., None].float() * frequencies(self.config, position_BT.device)
        cos_BTK = angle_BTK.cos()
        sin_BTK = angle_BTK.sin()
        cos_BT1K = torch.cat([cos_BTK, cos_BTK], dim=-1)[..., None, :]  # one for each half of a head
        sin_BT1K = torch.cat([-sin_BTK, sin_BTK], dim=-1)[..., None, :]
        # That of the queries and keys: autocast's where that is at work, else the weights'.
        dtype = computed_in(self.embedding.weight)
        return Rotation(cos_BT1K.to(dtype), sin_BT1K.to(dtype))

    @torch.inference_mode()
    def new_cache(self, n_rows: int, max_prompt: int, max_new: int) -> KVCache:
        """Room for `n_rows` sequences of at most `max_prompt` + `max_new` tokens; eval mode begins."""
        self.config.check_length(max_prompt + max_new)
        self.eval()
        return KVCache(
            n_layers=self.config.n_layers,
            n_rows=n_rows,
            n_heads=self.config.n_kv_heads,
            max_tokens=max_prompt + max_new,
            d_head=self.config.d_head,
            dtype=self.embedding.weight.dtype,
            device=self.embedding.weight.device,
        )

    def refresh(self, cache: KVCache) -> None:
        """Bring an earlier cache up to the weights of now, of which it has no copy; eval mode begins."""
        self.eval()

    @torch.inference_mode()
    def prefill(self, cache: KVCache, row_ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Start the rows afresh on their prompts, of which the last ids are given back: each row decodes its own first.

        The prefill is packed: the tokens of all prompts pass the layers as one row of N tokens, so that no padding is
        multiplied. Attention alone puts them into rows.
        """
        lengths = [len(prompt) - 1 for prompt in prompts]
        longest = max(lengths, default=0)
        cache.set_lengths(row_ids, lengths)
        if longest:
            device = self.embedding.weight.device
            row_Q = indices(row_ids, device)
            ids_1N = indices([token_id for prompt in prompts for token_id in prompt[:-1]], device)[None]
            # Prompts of 2 and 3 tokens: prompt_N is 0 0 1 1 1, position_N is 0 1 0 1 2.
            is_token_QT = torch.arange(longest) < torch.tensor(lengths)[:, None]
            prompt_N, position_N = to_device(is_token_QT.nonzero(), device).unbind(1)

            rotation = self.rotation(position_N[None])
            x_1ND = self.embedding(ids_1N)
            for index, layer in enumerate(self.stack.layers):
                own = PackedPrompts(cache, index, row_Q, prompt_N, position_N, longest)
                x_1ND = layer(x_1ND, rotation, own)
        return [prompt[-1] for prompt in prompts]

    def decode(self, cache: KVCache, ids_B: Tensor) -> Tensor:
        """Feed one token to each of the cache's first B rows, at the row's own position; logits_BV of what follows."""
        n_rows = len(ids_B)
        with torch.inference_mode():
            logits_BV = self.step(cache, cache.plan(n_rows), ids_B)
            cache.advance(n_rows)
        return logits_BV

    def step(self, cache: KVCache, plan: StepPlan, ids_B: Tensor) -> Tensor:
        """The device's part of `decode`, which is the same operations for every plan of the same sizes; logits_BV."""
        bias_B11S = cache.bias(plan)
        n_valid_B = plan.n_valid()
        rotation = self.rotation(plan.position_B[:, None])
        scale = self.config.d_head**-0.5
        x_B1D = self.embedding(ids_B)[:, None]
        for index, layer in enumerate(self.stack.layers):
            own = CachedTokens(cache, index, plan, bias_B11S, n_valid_B, scale)
            x_B1D = layer(x_B1D, rotation, own)
        return self.logits(self.stack.norm(x_B1D))[:, 0]


def rotate(x_BTHK: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair of a head's numbers, (k, k + K/2) as Hugging Face pairs them, by the angle of its position."""
    first_half, second_half = x_BTHK.chunk(2, dim=-1)
    partner_BTHK = torch.cat([second_half, first_half], dim=-1)
    return x_BTHK * rotation.cos_BT1K + partner_BTHK * rotation.sin_BT1K


@cache
def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Radians by which each of the K/2 pairs turns from one position to the next, fp32."""
    exponent = torch.arange(0, config.d_head, 2).float() / config.d_head
    frequency = 1.0 / config.rope_theta ** exponent.to(device)
    scaling = config.rope_scaling
    return frequency if scaling is None else scaled_frequencies(frequency, scaling)


def scaled_frequencies(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """Rotary frequencies, in radians a position, as they are after scaling."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    # llama3: rotations that make few turns within the original context are slowed, fast ones are not, and those in
    # between are blended.
    n_turns = scaling.original_max_positions * frequency / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    unscaled_fraction = ((n_turns - low) / (high - low)).clamp(0, 1)
    return (1 - unscaled_fraction) * frequency / scaling.factor + unscaled_fraction * frequency
