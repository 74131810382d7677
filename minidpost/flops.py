"""Floating-point operations of a run, by the paper's figure 1 (after Yuan et al. 2023, appendix E).

Training costs 6 a parameter and token, a forward pass 2. An encoder's parameters see source tokens, a decoder's target
tokens. Decoding costs 1.66 N + 2·n_layer·n_ctx·d a token; the paper prints a factor i inside that sum, which would make
the cost of one token grow with its position twice over, and is left out. The samples of a question share its prefill.
"""

from dataclasses import dataclass

from torch import nn

from minidpost.t5 import T5


@dataclass(frozen=True)
class Size:
    """What the formulas need of a model: parameters that see source and target tokens, layers, width."""

    n_encoder: int
    n_decoder: int
    n_encoder_layers: int
    n_decoder_layers: int
    width: int


def model_size(model: T5) -> Size:
    """Parameters without the input embedding; the output layer counts with the decoder, tied or not."""
    head = model.head.weight if model.head is not None else model.embedding.weight
    return Size(
        n_encoder=count(model.encoder),
        n_decoder=count(model.decoder) + head.numel(),
        n_encoder_layers=model.config.n_encoder_layers,
        n_decoder_layers=model.config.n_decoder_layers,
        width=model.config.d_model,
    )


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(size: Size, n_source: int, n_target: int) -> float:
    """One forward pass over so many tokens."""
    return 2.0 * (size.n_encoder * n_source + size.n_decoder * n_target)


def training_flops(size: Size, n_source: int, n_target: int) -> float:
    """Forward and backward."""
    return 3 * forward_flops(size, n_source, n_target)


def sampling_flops(size: Size, prompt_lengths: list[int], completion_lengths: list[int]) -> float:
    """Prefill of the prompts, each once, and cached decoding of the completions."""
    prefill = sum(n * (2 * size.n_encoder + 2 * size.n_encoder_layers * n * size.width) for n in prompt_lengths)
    context = 2 * size.n_decoder_layers * size.width
    return float(prefill + sum(n * (1.66 * size.n_decoder + context * n / 2) for n in completion_lengths))
