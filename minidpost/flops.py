"""Floating-point operations of a run, by the paper's figure 1 (after Yuan et al. 2023, appendix E).

Training costs 6 a parameter and token, a forward pass 2. An encoder's parameters see source tokens, a decoder's target
tokens. Decoding costs 1.66 N + 2·n_layer·n_ctx·d a token; the paper prints a factor i inside that sum, which would make
the cost of one token grow with its position twice over, and is left out. The samples of a question share its prefill.
"""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Size:
    """What the formulas need of a model: parameters that a source and a target token pass, layers they pass, width."""

    n_source: int
    n_target: int
    n_source_layers: int
    n_target_layers: int
    width: int


def model_size(model: nn.Module) -> Size:
    """Parameters without the input embedding; the output layer counts with the target tokens, tied or not."""
    source, target = model.stacks
    head = model.head.weight if model.head is not None else model.embedding.weight
    return Size(
        n_source=count(source),
        n_target=count(target) + head.numel(),
        n_source_layers=len(source.layers),
        n_target_layers=len(target.layers),
        width=model.config.d_model,
    )


def count(module: nn.Module) -> int:
    """The number of parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def forward_flops(size: Size, n_source: int, n_target: int) -> float:
    """One forward pass over so many tokens."""
    return 2.0 * (size.n_source * n_source + size.n_target * n_target)


def training_flops(size: Size, n_source: int, n_target: int) -> float:
    """Forward and backward."""
    return 3 * forward_flops(size, n_source, n_target)


def sampling_flops(size: Size, prompt_lengths: list[int], completion_lengths: list[int]) -> float:
    """Prefill of the prompts, each once, and cached decoding of the completions."""
    prefill = sum(n * (2 * size.n_source + 2 * size.n_source_layers * n * size.width) for n in prompt_lengths)
    context = 2 * size.n_target_layers * size.width
    return float(prefill + sum(n * (1.66 * size.n_target + context * n / 2) for n in completion_lengths))
