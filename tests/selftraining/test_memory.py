"""The estimate of the memory that a run needs; a run that cannot fit is refused before it begins."""

from dataclasses import replace

import pytest
import torch

from minidpost.errors import UserError
from minidpost.models.hf_config import read_config
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.weights import empty_model
from minidpost.selftraining import estimates
from minidpost.selftraining.estimates import available_bytes, check_memory, sampling_bytes, tensor_bytes, training_bytes
from minidpost.selftraining.presets import LLAMA, T5

CONFIG = LlamaConfig(1000, 64, 128, 4, n_heads=4, n_kv_heads=2, d_head=16)


def meta(config: LlamaConfig = CONFIG) -> Llama:
    return empty_model(config)


def test_training_needs_16_bytes_a_parameter_and_activations():
    model, preset = meta(), replace(LLAMA, micro_batch_tokens=1000, max_source=10, max_target=10)
    n_parameters = sum(p.numel() for p in model.parameters())
    a_layer, inputs, logits = 4 * 1000 * (640 + 512), 4 * 4 * 1000 * 64, 12 * 1000 * 1000
    assert training_bytes(model, preset) == 16 * n_parameters + inputs + a_layer + logits
    whole = replace(preset, activation_checkpointing=False)
    assert training_bytes(model, whole) == 16 * n_parameters + 4 * a_layer + logits


def test_sampling_needs_weights_cache_and_logits():
    preset = replace(LLAMA, slots=8, max_source=30, max_new_tokens=20)
    cache = Llama(CONFIG).bfloat16().new_cache(8 + estimates.PREFILL_BATCH, 30, 20)
    n_rows, n_layers, n_kv_heads, n_positions, d_head = 8 + 16, 4, 2, 30 + 20, 16
    keys_and_values = 2 * 2 * n_rows * n_layers * n_kv_heads * n_positions * d_head  # two bytes a number
    lengths_and_indices = 2 * 8 * n_rows
    cache_bytes = keys_and_values + lengths_and_indices
    assert tensor_bytes(cache) == cache_bytes
    n_parameters = sum(p.numel() for p in meta().parameters())
    assert sampling_bytes(meta(), preset, torch.bfloat16) == 2 * n_parameters + cache_bytes + 12 * 8 * 1000


@pytest.mark.parametrize("name", ["flan-t5-large", "Meta-Llama-3-8B"])
def test_published_shapes_are_estimated_on_the_meta_device(shared, name):
    preset = LLAMA if "Llama" in name else T5
    model = empty_model(read_config(shared / "configs" / name))
    n_parameters = sum(p.numel() for p in model.parameters())
    assert 16 * n_parameters < training_bytes(model, preset) < 80 * n_parameters
    assert 2 * n_parameters < sampling_bytes(model, preset, torch.bfloat16) < 16 * n_parameters


def test_too_little_memory_is_refused_in_one_line(monkeypatch):
    line = check_memory(meta(), LLAMA, dtype=torch.float32, device="cpu")
    assert "training" in line and "sampling" in line and "free on cpu" in line
    monkeypatch.setattr(estimates, "available_bytes", lambda device: 10**6)
    with pytest.raises(UserError, match=r"cpu has 0\.0 GB free.*--micro-batch-tokens") as refusal:
        check_memory(meta(), LLAMA, dtype=torch.float32, device="cpu")
    assert "\n" not in str(refusal.value)
    monkeypatch.setattr(estimates, "available_bytes", lambda device: None)
    assert "free" not in check_memory(meta(), LLAMA, dtype=torch.float32, device="cpu")


def test_free_memory_is_bounded_by_the_control_group(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:   3000 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(estimates, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(estimates, "CGROUP_LIMIT", tmp_path / "memory.max")
    assert available_bytes("cpu") == 3000 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes("cpu") == 3000 * 1024
    (tmp_path / "memory.max").write_text("2000000\n")
    assert available_bytes("cpu") == 2_000_000
    assert available_bytes("meta") is None
