"""Every number of the method, tagged with where it is from; flags.py makes a flag of train.py of each.

[paper] the text or appendix of arXiv 2407.18248; [code] the published code, where the text is silent; [ours] a choice
of ours, with its reason.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from minidpost.models.hf_config import Config, read_config
from minidpost.models.llama import LlamaConfig
from minidpost.models.t5 import T5Config
from minidpost.models.weights import empty_model
from minidpost.precision import forward_dtype
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.methods import METHODS, Method
from minidpost.training.dpo import DPOSettings
from minidpost.training.optim import Schedule
from minidpost.training.sft import SFTSettings


@dataclass(frozen=True)
class Preset:
    """The hyperparameters of a run; lengths in tokens, steps in optimizer steps. None: no such limit, or as it says."""

    # the loop
    iterations: int = 3  # [paper]
    patience: int | None = None  # [code] there every iteration is made; the paper's "until convergence" would be 1
    warm_up: bool = True  # [paper] Algorithms 1 and 2, line 1
    # SFT
    sft_epochs: int = 8  # [paper]
    sft_examples_per_step: int = 96  # [paper]
    sft_learning_rate: float = 3e-4  # [paper]
    sft_dropout: float | None = None  # [code] None: the model's own, from its config.json, which is 0.1 for T5
    # DPO
    dpo_steps: int = 150  # [paper]
    dpo_max_epochs: int = 4  # [ours] at most so many epochs, however few the pairs are; the log says when it bites
    dpo_pairs_per_step: int = 96  # [paper]
    dpo_learning_rate: float = 7e-7  # [paper]
    beta: float = 0.1  # [paper]
    # both
    learning_rate_warmup: float = 0.1  # [paper] fraction of the steps; [ours] the first step's rate is not 0, see optim
    learning_rate_floor: float = 0.1  # [code] fraction of the peak
    weight_decay: float = 0.01  # [paper]
    max_grad_norm: float = 1.0  # [paper]
    max_source: int = 200  # [paper] longer training examples are dropped and counted; the published code cuts them
    max_target: int = 300  # [paper]
    # LoRA, which the paper does not use; learning rates are those of `for_lora`
    lora_rank: int | None = None  # [ours] None: all weights are trained
    lora_alpha: float | None = None  # [ours] None: twice the rank, so that adapters count double whatever the rank is
    # sampling
    samples: int = 3  # [paper] K of the main results
    dpo_samples: int = 5  # [paper]
    temperature: float = 0.7  # [paper]
    top_k: int = 0  # [paper] its text names none; the published code silently used a library's default of 50
    top_p: float = 1.0  # [paper] its text names none
    max_new_tokens: int = 300  # [paper]
    # selection
    max_similarity: float = 0.7  # [paper] section 4.2: rationales of a higher Jaccard similarity are near-duplicates
    pairs_per_question: int = 3  # [code]
    label_percentile: float | None = 90  # [code] pseudo-labels of a question: at most this percentile of the counts
    label_cap: int | None = None  # [code] and at most so many
    # evaluation
    pass_at: int = 10  # [paper] figure 6: the largest k of pass@k, and the samples for each question
    pass_questions: int | None = None  # [paper] figure 6: of dev; None: all
    test_questions: int | None = None  # [paper] of each test set; None: all
    # memory and speed; results change by rounding alone, and SFT's by which units dropout hits
    micro_batch_tokens: int = 16384  # [ours]
    activation_checkpointing: bool = False  # [ours] less memory for a third more time
    slots: int = 64  # [ours]

    def sft(self, seed: int, dtype: torch.dtype | None = None) -> SFTSettings:
        """The settings of supervised fine-tuning; `dtype` is the precision of forward passes."""
        return SFTSettings(
            epochs=self.sft_epochs,
            examples_per_step=self.sft_examples_per_step,
            schedule=self.schedule(self.sft_learning_rate),
            dropout=self.sft_dropout,
            micro_batch_tokens=self.micro_batch_tokens,
            activation_checkpointing=self.activation_checkpointing,
            seed=seed,
            dtype=dtype,
        )

    def dpo(self, n_pairs: int, seed: int, dtype: torch.dtype | None = None) -> DPOSettings:
        """The settings of DPO on `n_pairs` preference pairs; `dtype` is the precision of forward passes."""
        steps_per_epoch = -(-n_pairs // self.dpo_pairs_per_step)  # rounded up
        return DPOSettings(
            steps=min(self.dpo_steps, self.dpo_max_epochs * steps_per_epoch),
            pairs_per_step=self.dpo_pairs_per_step,
            schedule=self.schedule(self.dpo_learning_rate),
            beta=self.beta,
            micro_batch_tokens=self.micro_batch_tokens,
            activation_checkpointing=self.activation_checkpointing,
            seed=seed,
            dtype=dtype,
        )

    @property
    def freezes_weights(self) -> bool:
        """Whether adapters are trained (LoRA) instead of the model's own weights."""
        return self.lora_rank is not None

    def iterations_of(self, method: Method) -> int:
        """The iterations after the warm-up that a method makes."""
        return self.iterations if method.iterates else 0

    def tunes_by_dpo(self, method: Method) -> bool:
        """Whether a run by a method has an iteration that tunes by DPO."""
        return method.has_dpo and self.iterations_of(method) > 0

    def weights_dtype(self, device: str, dtype: torch.dtype | None = None) -> torch.dtype:
        """The precision in which training holds a model's own weights.

        That is fp32 where they are trained. Where they are frozen (LoRA) it is that of forward passes, for which
        `dtype` is what it is for `precision.autocast`: bf16 weights take half the memory, and no copy to be multiplied.
        """
        return forward_dtype(torch.device(device), dtype) if self.freezes_weights else torch.float32

    def schedule(self, learning_rate: float) -> Schedule:
        """The optimizer's settings with this peak learning rate."""
        return Schedule(
            learning_rate=learning_rate,
            warmup=self.learning_rate_warmup,
            floor=self.learning_rate_floor,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )

    def sampling(self, seed: int) -> SamplingSettings:
        """The settings of sampling."""
        return SamplingSettings(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=self.max_new_tokens,
            slots=self.slots,
            seed=seed,
        )


T5 = Preset()

# A decoder-only model sees the prompt and the completion as one sequence. Values without a tag are [paper], which has
# models of 7B and 8B parameters.
LLAMA = replace(
    T5,
    sft_epochs=2,
    sft_examples_per_step=128,
    sft_learning_rate=2e-5,
    sft_dropout=0.1,  # [code] of attention's weights, whatever config.json says
    dpo_steps=100,
    dpo_pairs_per_step=128,
    dpo_learning_rate=3e-7,
    learning_rate_warmup=0.03,  # [paper] the published code has 0.1
    max_source=256,
    max_target=384,
    samples=10,
    micro_batch_tokens=8192,  # [ours]
    activation_checkpointing=True,  # [ours]
)

# [ours] Smaller decoder-only models need larger steps than the paper's 7B, and more of them: with 128 examples a step
# SmolLM2-135M has too few on a small labelled set. SFT's learning rate for it was chosen on GSM8K's dev questions: with
# 1e-3 it answers 15.2 % of them, with 3e-4 12.8 and with 1e-4 8.6 (benchmarks/results/smollm2.md); higher ones
# were not tried. DPO's learning rate is the paper's for T5, the model of its that is nearest in size: 5e-6 was far too
# high, samples were then 2.9 % correct that had been 10.4 % (smollm2-first.md). MEDIUM_LLAMA's and SMALL_LLAMA's values
# lie between those and the paper's for 7B, and have not been tried on models of their sizes.
MEDIUM_LLAMA = replace(  # 700M to 4B: Llama-3.2-1B and -3B, TinyLlama, SmolLM2-1.7B, Qwen2.5-1.5B
    LLAMA,
    sft_epochs=3,
    sft_examples_per_step=64,
    sft_learning_rate=5e-5,
    dpo_pairs_per_step=64,
    dpo_learning_rate=7e-7,
)
SMALL_LLAMA = replace(  # 250M to 700M: SmolLM2-360M, Qwen2.5-0.5B, Qwen3-0.6B
    LLAMA,
    sft_epochs=3,
    sft_examples_per_step=64,
    sft_learning_rate=3e-4,
    dpo_pairs_per_step=64,
    dpo_learning_rate=7e-7,
    activation_checkpointing=False,
)
SMALLEST_LLAMA = replace(SMALL_LLAMA, sft_learning_rate=1e-3)  # 20M to 250M: SmolLM2-135M

# [ours] throughout, chosen on fresh questions (benchmarks/results/effect.md) so that the default run shows the method
# within eight minutes on two cores: models of less than a million weights need a higher learning rate than those of
# hundreds of millions, and fewer steps; a larger β keeps them closer to the reference, without which DPO on a few
# hundred pairs makes them worse; and the more questions there are to make pairs of, the more the DPO step pays, so that
# two iterations with many questions are better than three with few.
TINY_T5 = replace(
    T5,
    iterations=2,
    sft_epochs=10,
    sft_examples_per_step=16,
    sft_learning_rate=2e-3,
    dpo_steps=45,
    dpo_pairs_per_step=32,
    dpo_learning_rate=7e-5,
    beta=1.0,
    max_source=640,
    max_target=640,
    micro_batch_tokens=2048,
    max_new_tokens=160,
    slots=256,
)
TINY_LLAMA = replace(TINY_T5, sft_epochs=16)  # it learns more slowly: dev 26.0 % after 16 epochs, 20.5 after 10

# [ours] Adapters need a higher learning rate than the weights that they are added to: about ten times as high, as
# Schulman et al. found ("LoRA Without Regret", 2025) for other data, with α = 32; that has not been measured here. The
# bound is for the tiny models: 6e-3 was the best of 2e-3, 6e-3, 2e-2 and 6e-2 for tiny-t5 with rank 16, by the loss of
# SFT after two epochs of 300 examples, on one seed.
LORA_LEARNING_RATE_FACTOR = 10
LORA_MAX_LEARNING_RATE = 6e-3


def for_lora(preset: Preset) -> Preset:
    """A preset with the learning rates that LoRA begins from; the rank is still to be chosen."""

    def rate_of_adapters(learning_rate: float) -> float:
        return min(LORA_LEARNING_RATE_FACTOR * learning_rate, LORA_MAX_LEARNING_RATE)

    return replace(
        preset,
        sft_learning_rate=rate_of_adapters(preset.sft_learning_rate),
        dpo_learning_rate=rate_of_adapters(preset.dpo_learning_rate),
    )


# The preset of a model: the first row of its family with at least as many parameters.
PRESETS: dict[type[Config], list[tuple[float, Preset]]] = {
    T5Config: [
        (20e6, TINY_T5),
        (2e9, T5),
        (float("inf"), replace(T5, activation_checkpointing=True)),  # flan-t5-xl
    ],
    LlamaConfig: [
        (20e6, TINY_LLAMA),
        (250e6, SMALLEST_LLAMA),
        (700e6, SMALL_LLAMA),
        (4e9, MEDIUM_LLAMA),
        (float("inf"), LLAMA),
    ],
}


def preset_for(directory: str | Path, method: str) -> Preset:
    """The settings of a method with the model in this directory, whatever the directory is called.

    UserError: no config.json there, or one of a family that is not known.
    """
    return preset_of(read_config(directory), method)


def preset_of(config: Config, method: str) -> Preset:
    """The settings of a method with a model of this shape: by its family and its number of parameters."""
    size = n_parameters(empty_model(config))
    preset = next(preset for largest, preset in PRESETS[type(config)] if size <= largest)
    return replace(preset, **METHODS[method].settings)


def n_parameters(module: nn.Module) -> int:
    """The number of a model's parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())
