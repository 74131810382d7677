"""Tiny T5s with random weights, ours and transformers', for the tests of the model, the cache and the checkpoints."""

import torch
import transformers
from torch import nn

from minidpost.models.hf_config import t5_names
from minidpost.models.t5 import T5, T5Config

SHAPES = {
    # Flan and v1.1; heads × d_kv is 15 where d_model is 24.
    "gated-untied": T5Config(97, 24, 5, 40, 3, n_encoder_layers=2, n_decoder_layers=3, dropout=0.0),
    # What transformers 5 makes of Flan when it writes it; other buckets than the usual.
    "gated-tied": T5Config(
        89, 16, 6, 36, 4, n_encoder_layers=3, n_decoder_layers=1, tied=True, n_buckets=16, max_distance=50, dropout=0.0
    ),
    # v1.0.
    "relu-tied-scaled": T5Config(
        101, 20, 4, 48, 2, 1, 2, gated=False, tied=True, scaled=True, norm_eps=1e-5, dropout=0.0
    ),
}


def random_t5(config: T5Config, seed: int = 0) -> T5:
    """Ours, in eval mode, with weights of which none is neutral: norms differ from 1 and position biases matter."""
    torch.manual_seed(seed)
    model = T5(config).initialise().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(mean=1.0, std=0.3)
            elif "relative_bias" in name:
                weight.normal_()
    return model


def hf_config(config: T5Config) -> transformers.T5Config:
    """The same shape in transformers' words."""
    return transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_heads=config.n_heads,
        num_layers=config.n_encoder_layers,
        num_decoder_layers=config.n_decoder_layers,
        feed_forward_proj="gated-gelu" if config.gated else "relu",
        tie_word_embeddings=config.scaled,  # transformers 5 ties all heads; this only says whether the output is scaled
        relative_attention_num_buckets=config.n_buckets,
        relative_attention_max_distance=config.max_distance,
        layer_norm_epsilon=config.norm_eps,
        dropout_rate=config.dropout,
        pad_token_id=config.pad_id,
        eos_token_id=config.eos_id,
        decoder_start_token_id=config.start_id,
        attn_implementation="eager",
    )


def hf_twin(model: T5) -> transformers.T5ForConditionalGeneration:
    """transformers' model with the weights of ours, its head its own parameter if ours is; in eval mode."""
    twin = transformers.T5ForConditionalGeneration(hf_config(model.config)).eval()
    if not model.config.tied:
        twin.lm_head.weight = nn.Parameter(torch.empty_like(twin.shared.weight))
    weights, twin_weights = dict(model.named_parameters()), dict(twin.named_parameters())
    with torch.no_grad():
        for ours, theirs in t5_names(model.config):
            twin_weights.pop(theirs).copy_(weights[ours])
    assert not twin_weights, f"parameters without a twin: {sorted(twin_weights)}"
    return twin


def hf_logits(twin, source_BS, source_mask_BS, target_BT) -> torch.Tensor:
    """transformers' answer to what `T5.forward` is asked."""
    return twin(
        input_ids=source_BS,
        attention_mask=source_mask_BS.long(),
        decoder_input_ids=target_BT,
        decoder_attention_mask=torch.ones_like(target_BT),
    ).logits


def random_batch(config: T5Config, source_lengths: list[int], n_targets: int, seed: int = 1):
    """(source_BS, source_mask_BS, target_BT): rows of the given lengths, padded on the right, and decoder inputs."""
    generator = torch.Generator().manual_seed(seed)
    rows, longest = len(source_lengths), max(source_lengths)
    source_BS = torch.randint(2, config.vocab_size, (rows, longest), generator=generator)
    mask_BS = torch.arange(longest) < torch.tensor(source_lengths)[:, None]
    target_BT = torch.randint(2, config.vocab_size, (rows, n_targets), generator=generator)
    target_BT[:, 0] = config.start_id
    return source_BS.masked_fill(~mask_BS, config.pad_id), mask_BS, target_BT


def assert_same_model(found: T5, expected: T5) -> None:
    """Equal settings and equal weights, bit for bit."""
    assert found.config == expected.config
    expected_weights = dict(expected.named_parameters())
    for name, weight in found.named_parameters():
        assert weight.device.type == "cpu" and torch.equal(weight, expected_weights.pop(name)), name
    assert not expected_weights
