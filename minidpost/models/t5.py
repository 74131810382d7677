"""T5 (Raffel et al. 2020, arXiv 1910.10683): v1.0, v1.1 and Flan, for training and for cached decoding.

Ids in, logits out. Pre-norm residual layers with RMS norm, no biases, no 1/sqrt(d) in attention, and one table of
relative-position biases for the encoder and one for the decoder, each shared by all layers of its stack. v1.0 has a
ReLU feed-forward and an output tied to the embedding (and scaled by d_model^-1/2); v1.1 and Flan a gated GELU (tanh
form) and a head of their own. Run it in fp32 or bf16: fp16 overflows.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpost.models.kvcache import KVCache, SharedPromptCache, T5Cache, decoding_step
from minidpost.models.layers import Linear, RMSNorm, attention, linear, mask_bias


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
    gated: bool = True
    tied: bool = False
    scaled: bool = False
    n_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    dropout: float = 0.1
    pad_id: int = 0
    eos_id: int = 1
    start_id: int = 0

    @property
    def is_encoder_decoder(self) -> Literal[True]:
        """True: an encoder reads the prompt, and the decoder begins each target with `start_id`."""
        return True


class Attention(nn.Module):
    """Multi-head attention whose scores are not scaled: T5's initialisation absorbs the factor."""

    def __init__(self, config: T5Config):
        super().__init__()
        inner = config.n_heads * config.d_kv
        self.n_heads, self.dropout = config.n_heads, config.dropout
        self.query = Linear(config.d_model, inner, bias=False)
        self.key = Linear(config.d_model, inner, bias=False)
        self.value = Linear(config.d_model, inner, bias=False)
        self.output = Linear(inner, config.d_model, bias=False)

    def split(self, x_BTE: Tensor) -> Tensor:
        """Split the last dimension into heads: (B, T, H·K) to (B, H, T, K)."""
        return x_BTE.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def keys_values(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, H, S, K)."""
        return self.split(self.key(x_BSD)), self.split(self.value(x_BSD))

    def attend(self, q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_BHTS: Tensor) -> Tensor:
        """What each query reads, (B, H, T, K); the bias (broadcastable) is −inf where it must not look."""
        p = self.dropout * self.training
        if q_BHTK.is_cpu and q_BHTK.requires_grad:  # no kernel there trains a bias; its substitute is slower
            return F.dropout((q_BHTK @ k_BHSK.mT + bias_BHTS).softmax(-1), p) @ v_BHSK
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, bias_BHTS.to(q_BHTK.dtype), p, scale=1.0)

    def forward(self, x_BTD: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """Attention from x, of which `attend` takes the queries."""
        return self.output(attend(self.split(self.query(x_BTD))).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """down(gelu(gate x) · up x) when gated, down(relu(up x)) otherwise."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=False) if config.gated else None
        self.up = Linear(config.d_model, config.d_ff, bias=False)
        self.down = Linear(config.d_ff, config.d_model, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        up_BTF = self.up(x_BTD)
        hidden_BTF = F.relu(up_BTF) if self.gate is None else F.gelu(self.gate(x_BTD), approximate="tanh") * up_BTF
        return self.down(self.dropout(hidden_BTF))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each normed before and added back after."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BSD: Tensor, bias_BHSS: Tensor) -> Tensor:
        h_BSD = self.attention_norm(x_BSD)
        memory = *self.attention.keys_values(h_BSD), bias_BHSS
        x_BSD = x_BSD + self.dropout(self.attention(h_BSD, lambda q_BHSK: self.attention.attend(q_BHSK, *memory)))
        return x_BSD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BSD)))


class DecoderLayer(nn.Module):
    """Self-attention, cross-attention to the encoder's output, feed-forward."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.self_attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.self_attention = Attention(config)
        self.cross_attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.cross_attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.d_model, config.norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTD: Tensor, attend_own: Callable, attend_prompt: Callable) -> Tensor:
        """`attend_own` takes queries, keys and values of the new positions, `attend_prompt` queries alone."""
        h_BTD = self.self_attention_norm(x_BTD)
        k_BHTK, v_BHTK = self.self_attention.keys_values(h_BTD)
        x_BTD = x_BTD + self.dropout(self.self_attention(h_BTD, lambda q_BHTK: attend_own(q_BHTK, k_BHTK, v_BHTK)))
        x_BTD = x_BTD + self.dropout(self.cross_attention(self.cross_attention_norm(x_BTD), attend_prompt))
        return x_BTD + self.dropout(self.feed_forward(self.feed_forward_norm(x_BTD)))


class Stack(nn.Module):
    """Layers of one kind, their shared relative-position biases, and the norm behind the last."""

    def __init__(self, config: T5Config, layer_type: type[nn.Module], n_layers: int):
        super().__init__()
        self.layers = nn.ModuleList(layer_type(config) for _ in range(n_layers))
        self.relative_bias = nn.Embedding(config.n_buckets, config.n_heads)
        self.norm = RMSNorm(config.d_model, config.norm_eps)


class T5(nn.Module):
    """The encoder-decoder: `model(source_BS, source_mask_BS, target_BT) -> logits_BTV`."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Stack(config, EncoderLayer, config.n_encoder_layers)
        self.decoder = Stack(config, DecoderLayer, config.n_decoder_layers)
        self.head = None if config.tied else Linear(config.d_model, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)

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
        """What source tokens pass, and what target tokens do."""
        return self.encoder, self.decoder

    def forward(self, source_QS, source_mask_QS, target_BT, row_B=None) -> Tensor:
        """Logits for the token after each decoder input, (B, T, V).

        source_QS ids; source_mask_QS bool, True = a token; target_BT the decoder's input ids, from the start id on
        (padding behind needs no mask); row_B the source row that each target row reads (None: one each, Q = B).
        """
        return self.logits(self.hidden(source_QS, source_mask_QS, target_BT, row_B))

    def hidden(self, source_QS, source_mask_QS, target_BT, row_B=None) -> Tensor:
        """What the output matrix turns into logits, (B, T, D); row_B says which source row each target row reads."""
        encoded_QSD = self.encode(source_QS, source_mask_QS)
        position_T = torch.arange(target_BT.shape[1], device=target_BT.device)
        distance_TT = position_T[:, None] - position_T
        bias_1HTT = self.position_bias(distance_TT).permute(2, 0, 1)[None].masked_fill(distance_TT < 0, -math.inf)
        own = (lambda x_Q: x_Q) if row_B is None else (lambda x_Q: x_Q.index_select(0, row_B))
        cross_bias_B11S = own(mask_bias(source_mask_QS, encoded_QSD.dtype))
        x_BTD = self.dropout(self.embedding(target_BT))
        for layer in self.decoder.layers:
            k_BHSK, v_BHSK = map(own, layer.cross_attention.keys_values(encoded_QSD))
            attend_own = partial(layer.self_attention.attend, bias_BHTS=bias_1HTT)
            prompt = {"k_BHSK": k_BHSK, "v_BHSK": v_BHSK, "bias_BHTS": cross_bias_B11S}
            x_BTD = layer(x_BTD, attend_own, partial(layer.cross_attention.attend, **prompt))
        return self.finished(x_BTD)

    def encode(self, source_BS: Tensor, source_mask_BS: Tensor) -> Tensor:
        """The encoder's output, (B, S, D)."""
        config, position_S = self.config, torch.arange(source_BS.shape[1], device=source_BS.device)
        distance_SS = position_S[None, :] - position_S[:, None]
        bucket_SS = relative_bucket(distance_SS, True, config.n_buckets, config.max_distance)
        bias_1HSS = self.encoder.relative_bias(bucket_SS).permute(2, 0, 1)[None]
        bias_BHSS = bias_1HSS.masked_fill(~source_mask_BS[:, None, None, :], -math.inf)
        x_BSD = self.dropout(self.embedding(source_BS))
        for layer in self.encoder.layers:
            x_BSD = layer(x_BSD, bias_BHSS)
        return self.dropout(self.encoder.norm(x_BSD))

    def finished(self, x_BTD: Tensor) -> Tensor:
        """From the last decoder layer to what the output matrix takes."""
        x_BTD = self.dropout(self.decoder.norm(x_BTD))
        return x_BTD * self.config.d_model**-0.5 if self.config.scaled else x_BTD

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """The output matrix, which v1.0 shares with the embedding: (…, D) to (…, V)."""
        return linear(hidden_BTD, self.embedding.weight if self.head is None else self.head.weight)

    def position_bias(self, distance: Tensor) -> Tensor:
        """The decoder's bias for looking `distance` tokens back (below 0 as at 0): (…) to (…, H)."""
        config = self.config
        return self.decoder.relative_bias(relative_bucket(-distance, False, config.n_buckets, config.max_distance))

    @torch.inference_mode()
    def new_cache(self, rows: int, max_prompt: int, max_new: int) -> T5Cache:
        """Room for `rows` sequences of at most `max_prompt` source and `max_new` target tokens; dropout ends here."""
        self.eval()
        config, weight = self.config, self.embedding.weight
        own, prompt = (
            kind(config.n_decoder_layers, rows, config.n_heads, size, config.d_kv, weight.dtype, weight.device)
            for kind, size in ((KVCache, max_new), (SharedPromptCache, max_prompt))
        )
        return T5Cache(own, prompt, self.position_bias(torch.arange(max_new, device=weight.device)))

    @torch.inference_mode()
    def prefill(self, cache: T5Cache, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Encode the prompts together, start `rows` afresh on them, and give the id that each row decodes first."""
        device, lengths = self.embedding.weight.device, [len(prompt) for prompt in prompts]
        longest, rows = max(lengths), list(rows)
        source_BS = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
        mask_BS = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
        encoded_BSD = self.encode(source_BS, mask_BS)
        places, store = cache.prompt.begin(rows, lengths), cache.prompt.store
        for index, layer in enumerate(self.decoder.layers):
            k_BHSK, v_BHSK = layer.cross_attention.keys_values(encoded_BSD)
            store.keys_LBHSK[index, places, :, :longest] = k_BHSK
            store.values_LBHSK[index, places, :, :longest] = v_BHSK
        cache.own.set_lengths(rows, [0] * len(rows))
        return [self.config.start_id] * len(rows)

    @decoding_step
    def decode(self, cache: T5Cache, ids_B: Tensor) -> Tensor:
        """Feed one token to each of the cache's first B rows, at the row's own position; logits_BV of what follows."""
        bias_BH1S = cache.bias(len(ids_B))

        def attend_own(layer: int, q_BH1K: Tensor, k_BH1K: Tensor, v_BH1K: Tensor) -> Tensor:
            k_BHSK, v_BHSK = cache.own.append(layer, k_BH1K, v_BH1K)
            return attention(q_BH1K, k_BHSK, v_BHSK, bias_BH1S, scale=1.0)

        x_B1D = self.embedding(ids_B)[:, None]
        for index, layer in enumerate(self.decoder.layers):
            x_B1D = layer(x_B1D, partial(attend_own, index), partial(cache.prompt.attend, index, scale=1.0))
        return self.logits(self.finished(x_B1D))[:, 0]


def relative_bucket(offset: Tensor, bidirectional: bool, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each key-minus-query offset: exact for short distances, logarithmic up to `max_distance`."""
    bucket = torch.zeros_like(offset)
    if bidirectional:
        n_buckets //= 2
        bucket = (offset > 0).long() * n_buckets
        distance = offset.abs()
    else:
        distance = (-offset).clamp(min=0)
    n_exact = n_buckets // 2
    # fp32 on purpose: the published models were trained with the buckets that fp32 rounding gives.
    share = torch.log(distance.clamp(min=1).float() / n_exact) / math.log(max_distance / n_exact)
    far = (n_exact + (share * (n_buckets - n_exact)).long()).clamp(max=n_buckets - 1)
    return bucket + torch.where(distance < n_exact, distance, far)
