"""T5 (Raffel et al. 2020, arXiv 1910.10683): v1.0, v1.1 and Flan, for training and for cached decoding.

Ids in, logits out. Pre-norm residual layers with RMS norm, no biases, no 1/sqrt(d) in attention, and one table of
relative-position biases for the encoder and one for the decoder, each shared by all layers of its stack. v1.0 has a
ReLU feed-forward and an output tied to the embedding (and scaled by d_model^-1/2); v1.1 and Flan a gated GELU (tanh
form) and a head of their own. Run it in fp32 or bf16: fp16 overflows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpost.models.dropout import drop
from minidpost.models.kvcache import (
    CachedPrompts,
    CachedTokens,
    KVCache,
    SharedPromptCache,
    T5Cache,
    T5Plan,
    indices,
    whole_length,
)
from minidpost.models.layers import Attendable, LanguageModel, LayerStack, Linear, RMSNorm, linears, mask_bias
from minidpost.models.packed_attention import AttentionInPaddedRows, PackedAttention, packed_kernel
from minidpost.models.packing import Packing, PositionBias, rows_of


@dataclass(frozen=True)
class T5Config:
    """The shape of a T5; `n_heads * d_kv` may differ from `d_model`, and the two depths from each other."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    n_heads: int
    n_encoder_layers: int
    n_decoder_layers: int
    gated: bool = True  # feed-forward: gated GELU, else ReLU
    tied: bool = False  # the output matrix is the embedding's
    scaled: bool = False  # hidden states are multiplied by d_model^-1/2 before the output matrix
    n_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.1  # a probability; what a T5 is trained with unless its `dropout` is set
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0

    @property
    def family(self) -> Literal["t5"]:
        """The model_type of config.json, which the versions share."""
        return "t5"

    @property
    def is_encoder_decoder(self) -> Literal[True]:
        """True: an encoder reads the prompt, and the decoder begins each target with `start_id`."""
        return True


class AttendablePrompt(Protocol):
    """What cross-attention may attend to, as layers.Attendable, but for where keys and values come from.

    In training they are those of the encoder's output, which the layer has just computed. In decoding they are None:
    the prefill has put them into the cache.
    """

    def attend(self, q_BTHK: Tensor, k_BSHK: Tensor | None, v_BSHK: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class FullAttention:
    """Attention within a batch, in training and in the encoder: softmax(q kᵀ + bias) v over all positions.

    The bias (broadcastable to (B, H, T, S)) holds T5's position bias, and −inf where a query must not look. `dropout`
    is the probability with which a weight is dropped. Where several target rows share a source row, row_B says which
    source row each of them reads; keys and values are then given for the source rows alone, (Q, S, H, K).
    """

    bias_BHTS: Tensor
    dropout: float
    row_B: Tensor | None = None

    def attend(self, q_BTHK: Tensor, k_BSHK: Tensor | None, v_BSHK: Tensor | None) -> Tensor:
        """What each query reads, (B, T, H, K)."""
        assert k_BSHK is not None and v_BSHK is not None, "keys and values are in no cache here"
        q_BHTK = q_BTHK.transpose(1, 2)
        k_BHSK = k_BSHK.transpose(1, 2)
        v_BHSK = v_BSHK.transpose(1, 2)
        if self.row_B is not None:
            k_BHSK = k_BHSK.index_select(0, self.row_B)
            v_BHSK = v_BHSK.index_select(0, self.row_B)
        if q_BHTK.is_cpu and q_BHTK.requires_grad:
            # On a CPU no fused kernel trains a bias, and what torch puts in its place is slower than these products.
            weight_BHTS = (q_BHTK @ k_BHSK.mT + self.bias_BHTS).softmax(-1)
            y_BHTK = drop(weight_BHTS, self.dropout) @ v_BHSK
        else:
            bias_BHTS = self.bias_BHTS.to(q_BHTK.dtype)
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, bias_BHTS, self.dropout, scale=1.0)
        return y_BHTK.transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention whose scores are not scaled: T5's initialisation absorbs the factor 1/√K."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.n_heads * config.d_kv
        self.n_heads = config.n_heads
        self.query = Linear(config.d_model, inner, bias=False)
        self.key = Linear(config.d_model, inner, bias=False)
        self.value = Linear(config.d_model, inner, bias=False)
        self.output = Linear(inner, config.d_model, bias=False)

    def heads(self, x_BTD: Tensor, *layers: Linear) -> list[Tensor]:
        """What each of the layers makes of x, head by head, (B, T, H, K)."""
        return [y_BTO.unflatten(-1, (self.n_heads, -1)) for y_BTO in linears(x_BTD, *layers)]

    def keys_values(self, x_BSD: Tensor) -> list[Tensor]:
        """Keys and values, each (B, S, H, K)."""
        return self.heads(x_BSD, self.key, self.value)


class SelfAttention(Attention):
    """Attention whose queries, keys and values are all made of x."""

    def forward(self, x_BTD: Tensor, own: Attendable) -> Tensor:
        """What the positions of x read of `own`, (B, T, D) to (B, T, D)."""
        k_BTHK, v_BTHK, q_BTHK = self.heads(x_BTD, self.key, self.value, self.query)
        y_BTHK = own.attend(q_BTHK, k_BTHK, v_BTHK)
        y_BTD: Tensor = self.output(y_BTHK.flatten(2))
        return y_BTD


class CrossAttention(Attention):
    """Attention from x to the encoder's output.

    Without that (in decoding) the prefill has put its keys and values into the cache, which `prompt` reads.
    """

    def forward(self, x_BTD: Tensor, prompt: AttendablePrompt, encoded_QSD: Tensor | None) -> Tensor:
        """What the positions of x read of their prompt, (B, T, D) to (B, T, D)."""
        k_QSHK: Tensor | None = None
        v_QSHK: Tensor | None = None
        if encoded_QSD is not None:
            k_QSHK, v_QSHK = self.keys_values(encoded_QSD)
        (q_BTHK,) = self.heads(x_BTD, self.query)
        y_BTHK = prompt.attend(q_BTHK, k_QSHK, v_QSHK)
        y_BTD: Tensor = self.output(y_BTHK.flatten(2))
        return y_BTD


class FeedForward(nn.Module):
    """down(gelu(gate x) · up x) when gated, down(relu(up x)) otherwise."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=False) if config.gated else None
        self.up = Linear(config.d_model, config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_BTD: Tensor, dropout: float) -> Tensor:
        """Each position by itself, (B, T, D) to (B, T, D)."""
        if self.gate is None:
            hidden_BTF = F.relu(self.up(x_BTD))
        else:
            up_BTF, gate_BTF = linears(x_BTD, self.up, self.gate)
            hidden_BTF = F.gelu(gate_BTF, approximate="tanh") * up_BTF
        y_BTD: Tensor = self.down(drop(hidden_BTF, dropout))
        return y_BTD


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normed before and added back after."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = SelfAttention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x_BSD: Tensor, own: Attendable, dropout: float) -> Tensor:
        """One layer, (B, S, D) to (B, S, D); `own` are the source positions themselves."""
        x_BSD = x_BSD + drop(self.attention(self.attention_norm(x_BSD), own), dropout)
        x_BSD = x_BSD + drop(self.feed_forward(self.feed_forward_norm(x_BSD), dropout), dropout)
        return x_BSD


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the encoder's output, feed-forward."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.self_attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attention = SelfAttention(config)
        self.cross_attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.cross_attention = CrossAttention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BTD: Tensor,
        own: Attendable,
        prompt: AttendablePrompt,
        encoded_QSD: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """One layer, (B, T, D) to (B, T, D); `own` are the target positions.

        In decoding encoded_QSD is None, and there is no dropout.
        """
        x_BTD = x_BTD + drop(self.self_attention(self.self_attention_norm(x_BTD), own), dropout)
        read_BTD = self.cross_attention(self.cross_attention_norm(x_BTD), prompt, encoded_QSD)
        x_BTD = x_BTD + drop(read_BTD, dropout)
        x_BTD = x_BTD + drop(self.feed_forward(self.feed_forward_norm(x_BTD), dropout), dropout)
        return x_BTD


class Stack(LayerStack):
    """Layers of one kind, their shared relative-position biases, and the norm that follows the last."""

    def __init__(self, config: T5Config, layer_type: type[EncoderLayer] | type[DecoderLayer], n_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(layer_type(config) for _ in range(n_layers))
        self.relative_bias = nn.Embedding(config.n_buckets, config.n_heads)
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class T5(LanguageModel):
    """The encoder-decoder: `model(source_BS, source_mask_BS, target_BT) -> logits_BTV`.

    `dropout`, in training mode, is the probability with which an embedding, a hidden unit, an attention weight or a
    layer's addition is dropped. It is the config's until it is set; setting it leaves the config as it is.
    """

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, EncoderLayer, config.n_encoder_layers)
        self.decoder = Stack(config, DecoderLayer, config.n_decoder_layers)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self) -> "T5":
        """Draw fresh weights from the global generator: fan-in scaled, queries also by d_kv^-1/2, as scores are not."""
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif name == "embedding.weight":
                weight.normal_()
            else:
                n_inputs = self.config.d_model if "relative_bias" in name else weight.shape[1]
                weight.normal_(std=(n_inputs * (self.config.d_kv if "query" in name else 1)) ** -0.5)
        return self

    @property
    def stacks(self) -> tuple[Stack, Stack]:
        """The layers that source tokens pass, and those that target tokens pass."""
        return self.encoder, self.decoder

    def forward(
        self,
        source_QS: Tensor,
        source_mask_QS: Tensor,
        target_BT: Tensor,
        row_B: Tensor | None = None,
        packings: tuple[Packing, Packing] | None = None,
    ) -> Tensor:
        """Logits for the token after each decoder input, (B, T, V).

        source_QS are ids and source_mask_QS is True where they are tokens; target_BT are the decoder's input ids, from
        the start id on (right-padding needs no mask: the decoder looks back only). row_B says which source row each
        target row reads, so that the targets of one prompt share its encoding (None: one each, Q = B). With the
        `packings` of the sources and of the targets only tokens are computed; logits at padding then mean nothing.
        """
        return self.logits(self.hidden(source_QS, source_mask_QS, target_BT, row_B, packings))

    def hidden(
        self,
        source_QS: Tensor,
        source_mask_QS: Tensor,
        target_BT: Tensor,
        row_B: Tensor | None = None,
        packings: tuple[Packing, Packing] | None = None,
    ) -> Tensor:
        """Final hidden states, (B, T, D), which `logits` multiplies by the output matrix; arguments as `forward`'s."""
        dropout = self.dropout if self.training else 0.0
        sources, targets = packings or (None, None)
        encoded_QSD = self.encode(source_QS, source_mask_QS, dropout, sources)  # (1, M, D) if packed

        # A target position sees itself and those before it, with a bias that depends on the distance alone; and all
        # tokens of its source, without position bias: cross-attention has none.
        own: Attendable
        prompt: AttendablePrompt
        kernel = packed_kernel(self.embedding.weight, self.config.d_kv) if packings else None
        if targets is not None and sources is not None and kernel is not None:
            bias = self.relative_positions(self.decoder, targets.longest)
            own = PackedAttention(kernel, rows_of(targets, targets), bias, is_causal=True, dropout=dropout)
            prompt = PackedAttention(kernel, rows_of(targets, sources, row_B), dropout=dropout)
        else:
            position_T = torch.arange(target_BT.shape[1], device=target_BT.device)
            distance_TT = position_T[:, None] - position_T
            bias_1HTT = self.position_bias(distance_TT).permute(2, 0, 1)[None]
            own = FullAttention(bias_1HTT.masked_fill(distance_TT < 0, -math.inf), dropout)
            source_bias_Q11S = mask_bias(source_mask_QS, encoded_QSD.dtype)
            source_bias_B11S = source_bias_Q11S if row_B is None else source_bias_Q11S.index_select(0, row_B)
            prompt = FullAttention(source_bias_B11S, dropout, row_B)
            if targets is not None and sources is not None:
                own = AttentionInPaddedRows(own, targets, targets)
                prompt = AttentionInPaddedRows(prompt, targets, sources)

        if targets is not None:
            target_BT = targets.pack(target_BT)
        x_BTD = drop(self.embedding(target_BT), dropout)  # (1, N, D) if packed
        for layer in self.decoder.layers:
            x_BTD = self.decoder.run(layer, x_BTD, own, prompt, encoded_QSD, dropout)
        x_BTD = self.finish(x_BTD, dropout)
        return x_BTD if targets is None else targets.unpack(x_BTD)

    def encode(
        self, source_BS: Tensor, source_mask_BS: Tensor, dropout: float = 0.0, packing: Packing | None = None
    ) -> Tensor:
        """The encoder's output, (B, S, D); with a packing (1, N, D)."""
        # Every source token sees every other, in both directions; the stack's one table serves all its layers.
        own: Attendable
        kernel = packed_kernel(self.embedding.weight, self.config.d_kv) if packing else None
        if packing is not None and kernel is not None:
            bias = self.relative_positions(self.encoder, packing.longest)
            own = PackedAttention(kernel, rows_of(packing, packing), bias, dropout=dropout)
        else:
            position_S = torch.arange(source_BS.shape[1], device=source_BS.device)
            offset_SS = position_S[None, :] - position_S[:, None]
            bucket_SS = relative_bucket(offset_SS, True, self.config.n_buckets, self.config.max_distance)
            bias_1HSS = self.encoder.relative_bias(bucket_SS).permute(2, 0, 1)[None]
            bias_BHSS = bias_1HSS.masked_fill(~source_mask_BS[:, None, None, :], -math.inf)
            own = FullAttention(bias_BHSS, dropout)
            if packing is not None:
                own = AttentionInPaddedRows(own, packing, packing)

        if packing is not None:
            source_BS = packing.pack(source_BS)
        x_BSD = drop(self.embedding(source_BS), dropout)
        for layer in self.encoder.layers:
            x_BSD = self.encoder.run(layer, x_BSD, own, dropout)
        return drop(self.encoder.norm(x_BSD), dropout)

    def finish(self, x_BTD: Tensor, dropout: float = 0.0) -> Tensor:
        """From the last decoder layer to the final hidden states, (B, T, D)."""
        x_BTD = drop(self.decoder.norm(x_BTD), dropout)
        # v1.0 shares one matrix between input and output; as an output it is too large by √D.
        return x_BTD * self.config.d_model**-0.5 if self.config.scaled else x_BTD

    def relative_positions(self, stack: Stack, longest: int) -> PositionBias:
        """The biases of a stack for all distances in rows of up to `longest` tokens."""
        offset_X = torch.arange(1 - longest, longest, device=self.embedding.weight.device)
        is_encoder = stack is self.encoder
        bucket_X = relative_bucket(offset_X, is_encoder, self.config.n_buckets, self.config.max_distance)
        table_EH = stack.relative_bias.weight
        bias_HX = table_EH.detach().T.index_select(1, bucket_X).float()
        return PositionBias(bias_HX, table_EH, bucket_X.int(), longest - 1)

    def position_bias(self, distance_TS: Tensor) -> Tensor:
        """The decoder's bias for looking so many tokens back (below 0 as at 0): (…) to (…, H)."""
        bucket_TS = relative_bucket(-distance_TS, False, self.config.n_buckets, self.config.max_distance)
        bias_TSH: Tensor = self.decoder.relative_bias(bucket_TS)
        return bias_TSH

    @torch.inference_mode()
    def new_cache(self, n_rows: int, max_prompt: int, max_new: int) -> T5Cache:
        """Room for `n_rows` sequences of at most `max_prompt` source and `max_new` target tokens; eval mode begins."""
        self.eval()
        weight = self.embedding.weight
        own = self._kv_cache(n_rows, max_new)
        prompts = self._kv_cache(n_rows, max_prompt)
        bias_SH = self.position_bias(torch.arange(max_new, device=weight.device))
        return T5Cache(own, SharedPromptCache(prompts), bias_SH.to(own.keys_LBGSK.dtype))

    @torch.inference_mode()
    def refresh(self, cache: T5Cache) -> None:
        """Bring an earlier cache up to the weights of now, of whose position bias it has a copy; eval mode begins."""
        self.eval()
        max_new = cache.bias_HX.shape[1] // 2
        cache.set_bias(self.position_bias(torch.arange(max_new, device=cache.bias_HX.device)))

    def _kv_cache(self, n_rows: int, max_tokens: int) -> KVCache:
        """Keys and values of all decoder layers."""
        return KVCache(
            n_layers=self.config.n_decoder_layers,
            n_rows=n_rows,
            n_heads=self.config.n_heads,
            max_tokens=max_tokens,
            d_head=self.config.d_kv,
            dtype=self.embedding.weight.dtype,
            device=self.embedding.weight.device,
        )

    @torch.inference_mode()
    def prefill(self, cache: T5Cache, row_ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Encode the prompts together and start the rows afresh on them; the id that each row decodes first."""
        device = self.embedding.weight.device
        lengths = [len(prompt) for prompt in prompts]
        longest = padded_length(max(lengths), cache.prompt.store.keys_LBGSK.shape[3], device)
        padded = [token_id for prompt in prompts for token_id in (*prompt, *[0] * (longest - len(prompt)))]
        source_QS = indices(padded, device).view(len(prompts), longest)
        mask_QS = torch.arange(longest, device=device) < indices(lengths, device)[:, None]
        encoded_QSD = self.encode(source_QS, mask_QS)

        # Every step will read the keys and values of the encoder's output: they are computed once, here.
        slot_Q = indices(cache.prompt.begin(row_ids, lengths), device)
        for index, layer in enumerate(self.decoder.layers):
            assert isinstance(layer, DecoderLayer)
            k_QSHK, v_QSHK = layer.cross_attention.keys_values(encoded_QSD)
            cache.prompt.store.write_prompts(index, slot_Q, k_QSHK, v_QSHK)
        cache.own.set_lengths(row_ids, [0] * len(row_ids))
        return [self.config.start_id] * len(row_ids)

    def decode(self, cache: T5Cache, ids_B: Tensor) -> Tensor:
        """Feed one token to each of the cache's first B rows, at the row's own position; logits_BV of what follows."""
        n_rows = len(ids_B)
        with torch.inference_mode():
            logits_BV = self.step(cache, cache.plan(n_rows), ids_B)
            cache.advance(n_rows)
        return logits_BV

    def step(self, cache: T5Cache, plan: T5Plan, ids_B: Tensor) -> Tensor:
        """The device's part of `decode`, which is the same operations for every plan of the same sizes; logits_BV."""
        bias_BH1S = cache.bias(plan.own)
        n_valid_B = plan.own.n_valid()
        x_B1D = self.embedding(ids_B)[:, None]
        for index, layer in enumerate(self.decoder.layers):
            own = CachedTokens(cache.own, index, plan.own, bias_BH1S, n_valid_B, scale=1.0)
            prompt = CachedPrompts(cache.prompt, index, plan.prompts, scale=1.0)
            x_B1D = layer(x_B1D, own, prompt)
        return self.logits(self.finish(x_B1D))[:, 0]


def padded_length(longest: int, room: int, device: torch.device) -> int:
    """What prompts are padded to: on a GPU to a length that suits its masks, where the cache has room for that."""
    return min(whole_length(longest), room) if device.type == "cuda" else longest


def relative_bucket(offset_TS: Tensor, bidirectional: bool, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each key-minus-query offset: exact for short distances, logarithmic up to `max_distance`."""
    bucket_TS = torch.zeros_like(offset_TS)
    if bidirectional:
        # One half of the buckets is for keys before the query, the other for those after it.
        n_buckets //= 2
        bucket_TS = (offset_TS > 0).long() * n_buckets
        distance_TS = offset_TS.abs()
    else:
        distance_TS = (-offset_TS).clamp(min=0)
    # Half of what is left has a bucket for each distance; the rest grow by a constant factor.
    n_exact = n_buckets // 2
    # fp32 on purpose: the published models were trained with the buckets that fp32 rounding gives.
    log_distance_TS = torch.log(distance_TS.clamp(min=1).float() / n_exact)
    fraction_TS = log_distance_TS / math.log(max_distance / n_exact)
    far_TS = (n_exact + (fraction_TS * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return bucket_TS + torch.where(distance_TS < n_exact, distance_TS, far_TS)
