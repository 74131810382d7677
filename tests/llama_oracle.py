"""Tiny Llamas and their like with random weights, ours and transformers', for the tests of model and checkpoints."""

import torch
import transformers

from minidpost.models.hf_config import llama_names, write_llama
from minidpost.models.llama import Llama, LlamaConfig, RopeScaling

LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_positions=64)
HF_CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "mistral": transformers.MistralForCausalLM,
}
QWEN = {"norm_eps": 1e-6, "rope_theta": 1e6, "max_positions": 4096, "bos_id": None, "eos_id": 3}
LLAMA_SHAPES = {
    "plain": LlamaConfig(97, 32, 48, 2, n_heads=4, n_kv_heads=4, d_head=8, norm_eps=1e-6, max_positions=4096),
    "grouped": LlamaConfig(89, 24, 40, 3, n_heads=6, n_kv_heads=2, d_head=10, tied=True, max_positions=4096),
    "one-kv-head-biases": LlamaConfig(
        97,
        21,
        36,
        2,
        n_heads=3,
        n_kv_heads=1,
        d_head=6,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        max_positions=4096,
    ),
    "llama3-rope": LlamaConfig(
        97, 32, 48, 2, n_heads=4, n_kv_heads=2, d_head=16, rope_theta=5e5, rope_scaling=LLAMA3, max_positions=4096
    ),
    "linear-rope": LlamaConfig(
        97, 32, 48, 2, n_heads=4, n_kv_heads=2, d_head=8, rope_scaling=RopeScaling("linear", 4.0), eos_id=(2, 5, 9)
    ),
    "smollm2": LlamaConfig(
        97, 36, 56, 3, n_heads=9, n_kv_heads=3, d_head=4, rope_theta=1e5, tied=True, max_positions=8192
    ),
    "qwen2": LlamaConfig(
        97, 28, 48, 2, n_heads=7, n_kv_heads=1, d_head=4, qkv_bias=True, tied=True, family="qwen2", **QWEN
    ),
    "qwen2-untied": LlamaConfig(
        97, 24, 40, 3, n_heads=6, n_kv_heads=2, d_head=4, qkv_bias=True, family="qwen2", **QWEN
    ),
    "qwen3": LlamaConfig(
        97, 20, 36, 2, n_heads=6, n_kv_heads=2, d_head=10, qk_norm=True, tied=True, family="qwen3", **QWEN
    ),
    "qwen3-untied": LlamaConfig(
        97, 24, 40, 3, n_heads=3, n_kv_heads=3, d_head=16, qk_norm=True, family="qwen3", **(QWEN | {"eos_id": (7, 5)})
    ),
    "mistral": LlamaConfig(
        97, 32, 48, 2, n_heads=4, n_kv_heads=2, d_head=16, rope_theta=1e6, max_positions=4096, family="mistral"
    ),
    "mistral-tied": LlamaConfig(
        97, 30, 44, 2, n_heads=5, n_kv_heads=1, d_head=6, tied=True, eos_id=(2, 4), max_positions=4096, family="mistral"
    ),
}


def random_llama(config: LlamaConfig, seed: int = 0) -> Llama:
    """Ours, in eval mode, with weights of which none is neutral: norms differ from 1 and biases from 0."""
    torch.manual_seed(seed)
    model = Llama(config).initialise().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.normal_(mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
        model.embedding.weight.normal_()
    return model


def hf_llama(model: Llama) -> transformers.PreTrainedModel:
    """transformers' model of the same family with the weights of ours, in eval mode."""
    config = transformers.AutoConfig.for_model(**write_llama(model.config))
    twin = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert type(twin) is HF_CLASSES[model.config.family]
    weights, twin_weights = dict(model.named_parameters()), dict(twin.named_parameters())
    with torch.no_grad():
        for ours, theirs in llama_names(model.config):
            twin_weights.pop(theirs).copy_(weights[ours])
    assert not twin_weights, f"parameters without a twin: {sorted(twin_weights)}"
    return twin


def ragged(lengths: list[int], vocab_size: int, seed: int = 1) -> list[list[int]]:
    """Rows of ids of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask with the padding in front, as transformers wants them for decoding."""
    longest = max(map(len, rows))
    ids_BT = torch.tensor([[*[0] * (longest - len(row)), *row] for row in rows])
    mask_BT = torch.tensor([[*[0] * (longest - len(row)), *[1] * len(row)] for row in rows])
    return ids_BT, mask_BT.bool()
