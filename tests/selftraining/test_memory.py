"""The memory, the disk and the hours that a run needs, estimated; what cannot fit is refused before it begins."""

import warnings
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minidpost import processes
from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.models import blocked_weights
from minidpost.models.hf_config import read_config
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.lora import add_adapters, n_adapter_parameters
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import empty_model
from minidpost.precision import autocast
from minidpost.sampling import sampler
from minidpost.selftraining import estimates
from minidpost.selftraining.estimates import (
    Plan,
    activation_bytes_a_token,
    available_bytes,
    check_disk,
    check_memory,
    disk_bytes,
    model_size,
    planned_stages,
    product_flops_per_second,
    run_flops,
    sampling_bytes,
    tensor_bytes,
    training_bytes,
    training_flops,
    warn_of_hours,
    written_hours,
)
from minidpost.selftraining.presets import LLAMA, Preset, n_parameters, preset_of
from minidpost.selftraining.presets import T5 as T5_PRESET
from minidpost.selftraining.run import Data, TokenizedData
from minidpost.storage import read_json
from minidpost.training import parallel
from minidpost.training.batching import TokenizedExample, collate
from minidpost.training.losses import LOGITS_AT_ONCE, log_probabilities

ROOT = Path(__file__).resolve().parents[2]

CONFIG = LlamaConfig(1000, 64, 128, 4, n_heads=4, n_kv_heads=2, d_head=16)


def meta(config: LlamaConfig = CONFIG) -> Llama:
    return empty_model(config)


HEAD = CONFIG.vocab_size * CONFIG.d_model  # numbers


def on_a_cpu(n_bytes: int, allocator: float = 1.12) -> int:
    """What comes and goes in a step, with the gaps that the allocator leaves, and what libraries take."""
    return int(allocator * n_bytes) + 10**8


def test_training_needs_16_bytes_a_parameter_and_activations():
    model, preset = meta(), replace(LLAMA, micro_batch_tokens=1000, max_source=10, max_target=10)
    n_parameters = sum(p.numel() for p in model.parameters())
    a_layer, inputs, logits = 4 * 1000 * (640 + 512), 4 * 4 * 1000 * 64, 8 * 1000 * 1000
    head_gradient = 4 * HEAD
    assert training_bytes(model, preset) == 16 * n_parameters + on_a_cpu(inputs + a_layer + logits) + head_gradient
    whole = replace(preset, activation_checkpointing=False)
    assert training_bytes(model, whole) == 16 * n_parameters + on_a_cpu(4 * a_layer + logits) + head_gradient


@pytest.mark.parametrize("preset", [LLAMA, replace(LLAMA, activation_checkpointing=False)])
def test_bf16_halves_the_hidden_units_and_adds_copies_of_weights(preset):
    model, n_tokens = meta(), preset.micro_batch_tokens
    n_layers_kept = 1 if preset.activation_checkpointing else 4
    n_parameters = sum(p.numel() for p in model.parameters())
    difference = training_bytes(model, preset) - training_bytes(model, preset, torch.bfloat16)
    # Four hidden units of the feed-forward take two bytes less, and so do six tensors of the model's width; two bytes a
    # parameter are copied, of the layers kept.
    a_token = 4 * 2 * CONFIG.d_ff + 6 * 2 * CONFIG.d_model
    saved = n_layers_kept * n_tokens * a_token - 2 * n_parameters * n_layers_kept // 4
    assert difference == pytest.approx(1.12 * saved - 2 * HEAD, abs=1)  # the head's gradient in bf16 before it is fp32


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_lora_needs_frozen_weights_and_16_bytes_an_adapter_parameter(dtype, size):
    model, preset = meta(), replace(LLAMA, micro_batch_tokens=1000, max_source=10, max_target=10, lora_rank=3)
    n_parameters = sum(p.numel() for p in model.parameters())
    # Of each of four layers: query and output, key and value, the three of the feed-forward.
    n_trained = 4 * 3 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert n_adapter_parameters(model, 3) == n_trained
    copies = 2 * n_trained if size == 2 else 0
    width_bytes = 30 if size == 4 else 21  # three quarters, as frozen matrices need no inputs for their gradients
    a_layer, inputs = 1000 * (width_bytes * 64 + 4 * size * 128 + 7 * 3 * size), 4 * size * 1000 * 64
    passing = inputs + a_layer + copies // 4 + 8 * 1000 * 1000
    expected = size * n_parameters + 16 * n_trained + on_a_cpu(passing, 1.45 if size == 4 else 1.12)
    assert training_bytes(model, preset, dtype) == expected
    assert disk_bytes(model, preset, "st") == 4 * 4 * (n_parameters + n_trained) + 2 * 12 * n_trained


def test_llama_3_8b_is_trained_with_lora_within_24_gb(shared):
    """A whole run with the defaults of a GPU: bf16, activation checkpointing."""
    config = read_config(shared / "configs" / "Meta-Llama-3-8B")
    model, preset = empty_model(config), replace(preset_of(config, "dpo-st"), lora_rank=16)
    assert preset.activation_checkpointing
    n_parameters = sum(p.numel() for p in model.parameters())
    needed = training_bytes(model, preset, torch.bfloat16, "cuda")
    assert 2 * n_parameters + 16 * n_adapter_parameters(model, 16) < needed < 24e9
    assert sampling_bytes(model, preset, torch.bfloat16, "cuda") < 24e9
    assert 2 * 12 * n_adapter_parameters(model, 16) < 1.1e9  # the saved states, of 193 GB without LoRA
    assert training_bytes(model, replace(preset, lora_rank=None), torch.bfloat16, "cuda") > 5 * needed


def saved_bytes(model: T5 | Llama, n_rows: int, dtype: torch.dtype, n_source: int = 20, n_target: int = 30) -> int:
    """What autograd keeps for the backward pass of rows of so many source and target tokens, weights left out."""
    model.train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    sizes = {}
    tensors = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        tensors.append(tensor)  # so that no other storage gets the same address
        return tensor

    examples = [TokenizedExample((row, *[3] * (n_source - 1)), (3,) * n_target) for row in range(n_rows)]
    batch = collate(model.config, examples, "cpu")
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast(torch.device("cpu"), dtype):
        log_probabilities(model, batch)
    return sum(sizes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "model",
    [
        T5(T5Config(100, 256, 32, 640, 8, 2, 2)),
        T5(T5Config(100, 256, 32, 1024, 8, 2, 2, gated=False)),
        Llama(LlamaConfig(100, 256, 640, 2, n_heads=8, n_kv_heads=4, d_head=32)),
    ],
    ids=["t5 1.1", "t5 1.0", "llama"],
)
def test_activations_are_estimated_near_what_autograd_keeps(model, dtype):
    preset = replace(T5_PRESET, max_source=20, max_target=30)
    model.initialise()
    ours = 2 * (20 + 30) * 8 * activation_bytes_a_token(model, preset, dtype, "cpu")
    theirs = saved_bytes(model, 12, dtype) - saved_bytes(model, 4, dtype)  # eight rows, without the weights' copies
    assert theirs < 1.1 * ours, "an estimate that is too low"
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_llama_that_drops_attention_weights_keeps_none(dtype):
    """Of long rows they would be most of what it keeps."""
    model = Llama(LlamaConfig(100, 256, 640, 2, n_heads=8, n_kv_heads=4, d_head=32)).initialise()
    model.dropout = 0.1
    preset = replace(LLAMA, max_source=200, max_target=300, sft_dropout=0.1)
    ours = 2 * (200 + 300) * 2 * activation_bytes_a_token(model, preset, dtype, "cpu")
    theirs = saved_bytes(model, 3, dtype, 200, 300) - saved_bytes(model, 1, dtype, 200, 300)
    assert theirs < 1.1 * ours, "an estimate that is too low"
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_activations_with_adapters_are_not_estimated_too_low(family, dtype):
    preset = replace(T5_PRESET, max_source=20, max_target=30, lora_rank=32)
    if family == "t5":
        model = T5(T5Config(100, 256, 32, 640, 8, 2, 2)).initialise()
    else:
        model = Llama(LlamaConfig(100, 256, 640, 2, n_heads=8, n_kv_heads=4, d_head=32)).initialise()
    model.to(preset.weights_dtype("cpu", dtype))
    add_adapters(model, rank=32, alpha=64.0, seed=0)
    ours = 2 * (20 + 30) * 8 * activation_bytes_a_token(model, preset, dtype, "cpu")
    theirs = saved_bytes(model, 12, dtype) - saved_bytes(model, 4, dtype)
    assert theirs < 1.1 * ours, "an estimate that is too low"
    assert ours < 1.7 * theirs  # the stream is bf16 where the weights are, which the estimate takes for fp32


def test_sampling_needs_weights_their_copies_cache_and_logits(monkeypatch):
    preset = replace(LLAMA, slots=8, max_source=30, max_new_tokens=20)
    cache = Llama(CONFIG).bfloat16().new_cache(8 + sampler.PREFILL_BATCH, 30, 20)
    n_rows, n_layers, n_kv_heads, n_positions, d_head = 8 + 16, 4, 2, 30 + 20, 16
    # Keys of four bytes on a CPU, two on a GPU; values of two.
    keys_and_values = (4 + 2) * n_rows * n_layers * n_kv_heads * n_positions * d_head
    lengths_and_indices = 2 * 8 * n_rows
    cache_bytes = keys_and_values + lengths_and_indices
    assert tensor_bytes(cache) == cache_bytes
    n_parameters = sum(p.numel() for p in meta().parameters())
    n_copied = n_parameters - 1000 * 64 - 9 * 64  # all but the embedding and the norms
    for has_copies in (False, True):
        monkeypatch.setattr(blocked_weights, "has_blocked_products", lambda dtype, has=has_copies: has)
        weights_bytes = 2 * (n_parameters + has_copies * n_copied)
        assert sampling_bytes(meta(), preset, torch.bfloat16) == weights_bytes + cache_bytes + 12 * 8 * 1000


def test_on_a_gpu_a_completion_has_room_for_one_token_more(monkeypatch):
    """Steps overlap there, so that a row is decoded once after its last token; lengths are whole; keys are bf16 too."""
    monkeypatch.setattr(blocked_weights, "has_blocked_products", lambda dtype: False)  # copies are a CPU's alone
    preset = replace(LLAMA, slots=8, max_source=30, max_new_tokens=20)
    on_cpu, on_gpu = (sampling_bytes(meta(), preset, torch.bfloat16, device) for device in ("cpu", "cuda"))
    numbers_a_position = 2 * (8 + sampler.PREFILL_BATCH) * 4 * 2 * 16
    assert on_cpu - on_gpu == (3 * (30 + 20) - 2 * (32 + 24)) * numbers_a_position


@pytest.mark.parametrize("name", ["flan-t5-large", "smollm2-135m"])
def test_sft_on_a_gpu_is_estimated_near_what_an_h200_took(shared, name):
    """Steps of 64 examples as one micro-batch, measured; the estimate is of as many tokens as they had on average."""
    measured = read_json(ROOT / "benchmarks" / "results" / "gpu.json")[f"sft/{name}/65536"]
    model = empty_model(read_config(shared / "configs" / name))
    preset = T5_PRESET if "t5" in name else replace(LLAMA, activation_checkpointing=False)
    preset = replace(preset, micro_batch_tokens=measured["tokens_a_step"], sft_examples_per_step=64)
    estimated = training_bytes(model, preset, torch.bfloat16, "cuda", has_dpo=False)
    assert 0.95 < estimated / (1e9 * measured["peak_gb"]) < 1.15


@pytest.mark.parametrize("name", ["flan-t5-large", "Meta-Llama-3-8B"])
def test_published_shapes_are_estimated_on_the_meta_device(shared, name):
    preset = LLAMA if "Llama" in name else T5_PRESET
    model = empty_model(read_config(shared / "configs" / name))
    n_parameters = sum(p.numel() for p in model.parameters())
    assert 16 * n_parameters < training_bytes(model, preset, torch.bfloat16, "cuda") < 80 * n_parameters
    assert 2 * n_parameters < sampling_bytes(model, preset, torch.bfloat16) < 16 * n_parameters


def test_too_little_memory_is_refused_in_one_line(monkeypatch):
    line = check_memory(meta(), LLAMA, dtype=torch.float32, device="cpu")
    assert "training" in line and "sampling" in line and "free on cpu" in line
    monkeypatch.setattr(estimates, "available_bytes", lambda device: 10**6)
    with pytest.raises(UserError, match=r"cpu has \d\.\d MB free.*--micro-batch-tokens") as refusal:
        check_memory(meta(), LLAMA, dtype=torch.float32, device="cpu")
    assert "\n" not in str(refusal.value)
    assert "--lora-rank" in str(refusal.value)
    with pytest.raises(UserError, match="cpu has") as refusal:
        check_memory(meta(), replace(LLAMA, lora_rank=4), dtype=torch.float32, device="cpu")
    assert "--lora-rank" not in str(refusal.value)
    monkeypatch.setattr(estimates, "available_bytes", lambda device: None)
    assert "free" not in check_memory(meta(), LLAMA, dtype=torch.float32, device="cpu")


def test_on_a_gpu_an_estimate_a_little_too_large_is_a_warning(monkeypatch):
    """It may be too high, and there the rehearsal measures what it is."""

    def check(device: str, fraction: float) -> str:
        needed = training_bytes(meta(), LLAMA, torch.bfloat16, device)
        monkeypatch.setattr(estimates, "available_bytes", lambda device: int(fraction * needed))
        return check_memory(meta(), LLAMA, dtype=torch.bfloat16, device=device, training_dtype=torch.bfloat16)

    with pytest.warns(UserWarning, match="^memory: training .* free on cuda: too much .* the rehearsal decides$"):
        assert "free on cuda" in check("cuda", 0.8)
    for device, fraction in (("cuda", 0.75), ("cpu", 0.99)):
        with pytest.raises(UserError, match=f"but {device} has .* free"):
            check(device, fraction)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check("cuda", 1.01)


def write_group(directory: Path, version: int, limit: str, used: int, of_files: int) -> None:
    """The files of a control group that has taken `used` bytes, a part of them for copies of files."""
    directory.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, content in zip(names, (limit, used), strict=True):
        (directory / name).write_text(f"{content}\n")
    numbers = f"inactive_file {of_files - 2000}\n{{0}}active_file 2000\n"
    if version == 2:
        (directory / "memory.stat").write_text(f"anon 800000\n{numbers.format('')}")
    else:  # without "total_" they are the group's own, but for those of the groups within
        (directory / "memory.stat").write_text(f"inactive_file 0\nactive_file 0\ntotal_{numbers.format('total_')}")


@pytest.fixture
def groups(tmp_path, monkeypatch) -> Path:
    """Where control groups lie, on a machine with 3,072,000 bytes free; this process is in job 7's step 0."""
    (tmp_path / "meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:   3000 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(processes, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(processes, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(processes, "CONTROL_GROUPS", tmp_path / "groups")
    assert available_bytes("cpu") == 3000 * 1024
    return tmp_path / "groups"


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_bounded_by_all_control_groups(groups, version):
    """A container's limit is the root's, Slurm's its job's or its step's: the least room counts."""
    lines = {1: "9:name=systemd:/x\n4:cpu,memory:/slurm/job_7/step_0\n0::/\n", 2: "0::/slurm/job_7/step_0\n"}
    processes.OWN_GROUPS.write_text(lines[version])
    assert available_bytes("cpu") == 3000 * 1024
    root = groups if version == 2 else groups / "memory"
    unlimited = "max" if version == 2 else "9223372036854771712"
    write_group(root / "slurm/job_7/step_0", version, unlimited, 1_500_000, 500_000)
    assert available_bytes("cpu") == 3000 * 1024
    write_group(root / "slurm/job_7", version, "2000000", 1_500_000, 500_000)
    assert available_bytes("cpu") == 1_000_000
    write_group(root / "slurm/job_8", version, "1000", 1000, 2000)  # somebody else's
    write_group(root, version, "3000000", 1_700_000, 500_000)
    assert available_bytes("cpu") == 1_000_000
    write_group(root, version, "2000000", 1_700_000, 500_000)
    assert available_bytes("cpu") == 800_000
    write_group(root / "slurm/job_7/step_0", version, "1000000", 1_500_000, 400_000)
    assert available_bytes("cpu") == 0


def test_the_limit_of_a_container_is_found_at_the_root(groups):
    """Whose path may be the host's."""
    processes.OWN_GROUPS.write_text("0::/docker/5f2a\n")
    groups.mkdir()
    (groups / "memory.max").write_text("2000000\n")
    assert available_bytes("cpu") == 2_000_000
    assert available_bytes("meta") is None


# -- disk -------------------------------------------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free_space(monkeypatch):
    """Sets the free bytes of every disk; gives the directories that were asked about."""
    asked = []

    def set_to(n_bytes: int) -> list[Path]:
        def disk_usage(path: Path) -> Usage:
            asked.append(path)
            return Usage(10**15, 0, n_bytes)

        monkeypatch.setattr(estimates.shutil, "disk_usage", disk_usage)
        return asked

    return set_to


@pytest.mark.parametrize(
    ("method", "changes", "n_models"),
    [
        ("dpo-st", {}, 7),  # the warm-up, three of DPO and three of SFT
        ("st", {}, 4),
        ("sft", {}, 1),
        ("dpo-st", {"iterations": 5, "warm_up": False}, 10),
    ],
)
def test_a_run_leaves_a_model_for_each_training(method, changes, n_models):
    n_parameters = sum(p.numel() for p in meta().parameters())
    needed = disk_bytes(meta(), replace(LLAMA, **changes), method)
    assert needed == 4 * n_models * n_parameters + 2 * 12 * n_parameters


@pytest.mark.parametrize(
    ("method", "keep", "n_models"),
    [("dpo-st", "best", 4), ("dpo-st", "last", 3), ("st", "best", 3), ("st", "last", 2), ("sft", "last", 1)],
)
def test_a_run_may_keep_fewer_models(method, keep, n_models):
    n_parameters = sum(p.numel() for p in meta().parameters())
    needed = disk_bytes(meta(), LLAMA, method, keep=keep, save_dtype=torch.bfloat16)
    assert needed == 2 * n_models * n_parameters + 2 * 12 * n_parameters


@pytest.mark.parametrize("is_small", [False, True])
def test_processes_share_weights_and_optimizer_but_not_activations(is_small, monkeypatch):
    """A small model is gathered as a whole, another one layer by layer: two of them at a time."""
    monkeypatch.setattr(parallel, "MIN_SPREAD_BY_LAYER", 10**9 if is_small else 0)
    model, preset = meta(), replace(LLAMA, micro_batch_tokens=1000, max_source=10, max_target=10)
    n_parameters = sum(p.numel() for p in model.parameters())
    n_layer = sum(p.numel() for p in model.stacks[0].layers[0].parameters())
    n_gathered = n_parameters if is_small else 2 * n_layer + n_parameters - 4 * n_layer
    activations = training_bytes(model, preset) - 16 * n_parameters
    expected = 16 * n_parameters // 4 + 4 * n_gathered + 4 * n_parameters + activations
    assert training_bytes(model, preset, n_ranks=4) == expected


def test_a_large_model_is_spread_over_gpus(shared):
    """Eight of 80 GB train Llama-3-8B, which one cannot; none ever holds all gradients."""
    config = read_config(shared / "configs" / "Meta-Llama-3-8B")
    model, preset = empty_model(config), preset_of(config, "dpo-st")
    one, eight = (training_bytes(model, preset, torch.bfloat16, "cuda", n_ranks) for n_ranks in (1, 8))
    assert one > 120e9
    assert 16e9 < eight < 40e9


def test_a_disk_that_is_too_small_is_refused_in_one_line(tmp_path, free_space):
    needed = disk_bytes(meta(), LLAMA, "dpo-st")
    asked = free_space(needed - 1)
    with pytest.raises(UserError, match=r"disk: 14\.4 MB needed .*two saved states.*--run-dir") as refusal:
        check_disk(meta(), LLAMA, method="dpo-st", run_dir=tmp_path / "runs" / "new")
    assert "\n" not in str(refusal.value) and asked == [tmp_path]  # the nearest that exists
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_hardly_large_enough_is_warned_about(tmp_path, free_space):
    needed = disk_bytes(meta(), LLAMA, "dpo-st")
    free_space(needed)
    with pytest.warns(UserWarning, match="hardly enough"):
        check_disk(meta(), LLAMA, method="dpo-st", run_dir=tmp_path)
    free_space(2 * needed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line = check_disk(meta(), LLAMA, method="dpo-st", run_dir=tmp_path)
    assert line.startswith("disk: ") and line.endswith(f" MB free in {tmp_path}")


def test_what_a_run_has_written_needs_no_room_again(tmp_path, free_space):
    needed = disk_bytes(meta(), LLAMA, "dpo-st")
    free_space(needed // 2)
    (tmp_path / "iteration-0" / "sft").mkdir(parents=True)
    (tmp_path / "iteration-0" / "sft" / "model.safetensors").write_bytes(bytes(needed // 2 + needed // 4))
    check_disk(meta(), LLAMA, method="dpo-st", run_dir=tmp_path)
    with pytest.raises(UserError, match="disk:"):
        check_disk(meta(), LLAMA, method="dpo-st", run_dir=tmp_path, fresh=True)  # the old run stays beside it


def test_models_that_were_removed_are_not_written_again(tmp_path, free_space):
    """Of a run that --keep last has shortened, only what is still to be trained needs room; at the end, nothing."""
    n_parameters = sum(p.numel() for p in meta().parameters())
    (tmp_path / "iteration-3" / "dpo").mkdir(parents=True)
    (tmp_path / "iteration-3" / "dpo" / "model.safetensors").write_bytes(bytes(4 * n_parameters))

    def check(n_trainings: int | None, keep: str = "all") -> str:
        return check_disk(meta(), LLAMA, method="dpo-st", run_dir=tmp_path, n_trainings=n_trainings, keep=keep)

    free_space(44 * n_parameters)
    with pytest.raises(UserError, match="disk:"):
        check(None)
    assert check(1).startswith(f"disk: {(4 + 24) * n_parameters / 1e6:.1f} MB (estimated) of ")
    assert check(0).startswith("disk: 0.0 MB (estimated) of ")
    assert check(2, keep="last").startswith(f"disk: {(2 * 4 + 24) * n_parameters / 1e6:.1f} MB")  # three at a time
    assert check(5, keep="last") == check(2, keep="last")


# -- a whole run ------------------------------------------------------------------------------------------------------


def plan(**changes) -> Plan:
    """Four labelled questions of 5 tokens with rationales of 10, and four more in the pool; two of dev."""
    labelled = [Example(f"question {i}", "1", "rationale") for i in range(4)]
    pool = [*labelled, *[Example(f"question {i}", "1") for i in range(4, 8)]]
    prompt_ids = {example.question: (i, 1, 2, 3, 4) for i, example in enumerate(pool)}
    gold = {e.question: TokenizedExample(prompt_ids[e.question], (7,) * 10) for e in labelled}
    fields = {
        "base": Path("weights/some-model"),
        "method": "dpo-st",
        "preset": replace(T5_PRESET, dpo_steps=6, dpo_pairs_per_step=2, sft_epochs=3),
        "data": Data(labelled, pool, pool[:2], {}, "mine"),
        "template": None,
        "tokens": TokenizedData(prompt_ids, gold, 0),
        "dtype": torch.float32,
        "training_dtype": torch.float32,
        "device": "cpu",
    }
    return Plan(**(fields | changes))


def test_a_warm_up_alone_costs_its_epochs_and_an_evaluation():
    size = model_size(meta())
    preset = replace(plan().preset, pass_at=1)
    warm_up = training_flops(size, 3 * 4 * 5, 3 * 4 * 10)
    evaluation = estimates.sampling_flops(size, [5, 5], [10, 10])
    assert run_flops(plan(method="sft", preset=preset), size) == pytest.approx(warm_up + evaluation)


def test_each_stage_costs_what_it_trains_on_and_samples():
    """Eight questions of 5 tokens, four of them labelled with 10; half of the eight get labels, and 3 pairs each."""
    size = model_size(meta())
    preset = replace(plan().preset, iterations=2, sft_epochs=1, samples=3, dpo_samples=5, pass_at=10, pass_questions=1)
    stages = planned_stages(plan(preset=preset), size)

    def training(n_sequences: int) -> float:
        return training_flops(size, 5 * n_sequences, 10 * n_sequences)

    def sampling(n_questions: int, n_samples: int) -> float:
        return estimates.sampling_flops(size, [5] * n_questions, [10] * (n_questions * n_samples))

    pass_at_10 = sampling(1, 10)
    flops = {
        "iteration-0/sft": training(4),
        "iteration-0/evaluation.json": sampling(2, 1) + pass_at_10,
        "iteration-1/samples-dpo.jsonl": sampling(8, 5),
        "iteration-1/pairs.jsonl": 0.0,
        "iteration-1/reference.safetensors": estimates.forward_flops(size, 2 * 12 * 5, 2 * 12 * 10),
        "iteration-1/dpo": training(2 * 6 * 2),
        "iteration-1/samples-sft.jsonl": sampling(8, 3),
        "iteration-1/pseudo-labels.jsonl": 0.0,
        "iteration-1/sft": training(4 + 4),
        "iteration-1/evaluation.json": 2 * (sampling(2, 1) + pass_at_10),  # f_θ' and f_θd
    }
    assert [*stages][: len(flops)] == [*flops] and len(stages) == 2 + 2 * 8
    assert {name: stages[name].flops for name in flops} == pytest.approx(flops)
    assert stages["iteration-2/sft"].flops == pytest.approx(training(4 + 2 * 4))
    assert run_flops(plan(preset=preset), size) == sum(stage.flops for stage in stages.values())
    sorts = {name.partition("/")[2]: stage.work for name, stage in stages.items()}
    assert [name for name, work in sorts.items() if work == "training"] == ["sft", "reference.safetensors", "dpo"]
    assert [name for name, work in sorts.items() if work is None] == ["pairs.jsonl", "pseudo-labels.jsonl"]
    without = planned_stages(plan(method="st", preset=replace(preset, warm_up=False)), size)
    assert [*without][:3] == [
        "iteration-0/evaluation.json", "iteration-1/samples-sft.jsonl", "iteration-1/pseudo-labels.jsonl",
    ]  # fmt: skip


def test_what_makes_a_run_longer_makes_its_estimate_larger():
    size, least = model_size(meta()), run_flops(plan(), model_size(meta()))
    assert run_flops(plan(method="st"), size) < least
    for name in ("iterations", "sft_epochs", "dpo_steps", "dpo_pairs_per_step", "samples", "dpo_samples", "pass_at"):
        longer = replace(plan().preset, **{name: 2 * vars(plan().preset)[name]})
        assert run_flops(plan(preset=longer), size) > least
    assert run_flops(plan(preset=replace(plan().preset, lora_rank=4)), size) < least
    checkpointing = replace(plan().preset, activation_checkpointing=True)
    assert least < run_flops(plan(preset=checkpointing), size) < 4 / 3 * least


def test_a_published_model_on_a_cpu_is_warned_of_its_hours(monkeypatch):
    large = empty_model(replace(CONFIG, vocab_size=10**6))
    asked = []

    def rate(dtype: torch.dtype) -> float:
        asked.append(dtype)
        stages = planned_stages(plan(), model_size(large)).values()
        training, sampling = (sum(s.flops for s in stages if s.work == work) for work in ("training", "inference"))
        return (training / 0.4 + sampling / 0.25) / 3600 / 250  # 250 hours

    monkeypatch.setattr(estimates, "product_flops_per_second", rate)
    with pytest.warns(
        UserWarning, match=r"some-model has 128 million .* a CPU: .* about 250 hours, .*bfloat16"
    ) as seen:
        warn_of_hours(plan(training_dtype=torch.bfloat16), large)
    assert len(seen) == 1 and "\n" not in str(seen[0].message) and asked == [torch.bfloat16]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_hours(plan(), meta())  # small
        warn_of_hours(plan(device="cuda"), large)
        warn_of_hours(plan(), large, planned_stages(plan(), model_size(large)).keys())  # finished
    assert len(asked) == 1


def test_of_a_run_that_goes_on_the_hours_are_those_of_the_rest(monkeypatch):
    large = empty_model(replace(CONFIG, vocab_size=10**6))
    *finished, last = planned_stages(plan(), model_size(large))
    flops = planned_stages(plan(), model_size(large))[last].flops
    monkeypatch.setattr(estimates, "product_flops_per_second", lambda dtype: flops / 0.25 / 3600 / 7)
    with pytest.warns(UserWarning, match=r"a CPU: the rest of the run takes about 7.0 hours, by an estimate"):
        warn_of_hours(plan(), large, finished)


def test_hours_are_written_with_two_digits():
    assert [written_hours(hours) for hours in (0.001, 1.234, 9.96, 123.4, 12345)] == [
        "0.1 hours", "1.2 hours", "10.0 hours", "120 hours", "12,000 hours",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rate_of_products_is_positive_and_finite(dtype):
    assert 0 < product_flops_per_second(dtype, seconds=0.0, width=8) < float("inf")


def test_on_a_gpu_slots_are_by_its_memory(monkeypatch):
    """As many as need a third of it, powers of two from 128 to 1,024; on a CPU the preset's number."""
    preset = replace(LLAMA, slots=64, max_source=200, max_new_tokens=300)
    config = LlamaConfig(32000, 2048, 5632, 22, n_heads=32, n_kv_heads=4, d_head=64)  # TinyLlama
    model = empty_model(config)

    def slots_with(gigabytes: float) -> int:
        properties = namedtuple("Properties", "total_memory")(int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return estimates.slots_for(model, preset, torch.bfloat16, "cuda")

    chosen = [slots_with(size) for size in (8, 16, 24, 48, 80, 140)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 64 and chosen[-1] == 1024 and len({*chosen}) > 3
    for size in (24, 48, 80):
        slots = slots_with(size)
        needed = [sampling_bytes(model, replace(preset, slots=n), torch.bfloat16, "cuda") for n in (slots, 2 * slots)]
        assert needed[0] <= size * 1e9 / 3 < needed[1]
    assert estimates.slots_for(model, preset, torch.bfloat16, "cpu") == 64
    # Of several processes all have as many as the one with the smallest GPU.
    of_small_gpu = slots_with(24)
    monkeypatch.setattr(estimates, "max_over_ranks", lambda number: [max(number, -24 * 10**9)])
    assert slots_with(140) == of_small_gpu < 1024


def test_a_micro_batch_is_no_larger_than_a_step_and_no_smaller_than_an_example():
    preset = replace(LLAMA, max_source=100, max_target=60, sft_examples_per_step=8, dpo_pairs_per_step=8)

    def largest(has_dpo: bool, n_ranks: int = 1, **changes: int) -> int:
        return estimates.largest_micro_batch(meta(), replace(preset, **changes), n_ranks, has_dpo=has_dpo)

    assert largest(False, micro_batch_tokens=10**6) == 8 * 160
    assert largest(False, micro_batch_tokens=1000) == 1000
    assert largest(False, micro_batch_tokens=1) == 160
    assert largest(True, micro_batch_tokens=10**6) == 16 * 160
    # All pairs of a question are in one micro-batch, each with two completions of its own.
    assert preset.pairs_per_question == 3
    assert largest(True, micro_batch_tokens=1) == 6 * 160
    assert largest(True, micro_batch_tokens=1, dpo_pairs_per_step=2) == 4 * 160
    # Of several processes each has its share of the examples and of the questions, which are three or more.
    assert largest(False, n_ranks=3, micro_batch_tokens=10**6) == 3 * 160
    assert largest(True, n_ranks=2, micro_batch_tokens=10**6) == 2 * 6 * 160
    assert largest(True, n_ranks=8, micro_batch_tokens=10**6) == 6 * 160

    t5 = empty_model(T5Config(30, 16, 8, 24, 2, 2, 2))  # its encoder reads a question once
    assert estimates.largest_micro_batch(t5, replace(preset, micro_batch_tokens=1)) == 100 + 6 * 60
    assert estimates.largest_micro_batch(t5, replace(preset, micro_batch_tokens=10**6)) == 8 * (100 + 2 * 60)


def test_dpo_needs_memory_for_its_reference_too_which_has_no_steps():
    """With LoRA and small steps its micro-batches, which no step bounds, take more than training's."""
    config = LlamaConfig(128256, 2048, 8192, 16, n_heads=32, n_kv_heads=8, d_head=64, tied=True)  # Llama-3.2-1B
    model = empty_model(config)
    preset = replace(LLAMA, max_source=256, max_target=384, lora_rank=16, micro_batch_tokens=65536)
    small = replace(preset, sft_examples_per_step=8, dpo_pairs_per_step=8)
    without, needed = (
        training_bytes(model, small, torch.bfloat16, "cuda", has_dpo=has_dpo) for has_dpo in (False, True)
    )
    weights = 2 * n_parameters(model)
    activations = 65536 * (2 * 3 * (2048 + 8192) + 4 * 2048)  # of the feed-forward, and the residual stream
    assert weights + activations < needed < weights + activations + 12 * LOGITS_AT_ONCE + 1
    assert without < 0.8 * needed
    fewer = training_bytes(model, replace(small, micro_batch_tokens=16384), torch.bfloat16, "cuda")
    assert fewer < 0.8 * needed  # 32,768 tokens of the reference
    # Steps of many examples need more than the reference.
    assert training_bytes(model, preset, torch.bfloat16, "cuda") > 1.2 * needed


def test_on_a_gpu_micro_batches_are_by_its_memory(monkeypatch):
    """As many tokens as need four fifths of it, never fewer than the preset's; on a CPU the preset's number."""
    config = T5Config(32128, 1024, 64, 2816, 16, 24, 24)  # Flan-T5-Large
    model = empty_model(config)

    def tokens_with(gigabytes: float, preset: Preset = T5_PRESET, device: str = "cuda") -> int:
        properties = namedtuple("Properties", "total_memory")(int(gigabytes * 1e9))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        return estimates.micro_batch_tokens_for(model, preset, torch.bfloat16, device)

    assert T5_PRESET.micro_batch_tokens == 16384
    chosen = [tokens_with(size) for size in (16, 40, 80, 140, 300)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 16384 and chosen[2] > 16384 and chosen[-1] == 65536
    for size in (80, 140):
        tokens = tokens_with(size)
        preset = replace(T5_PRESET, micro_batch_tokens=tokens)
        assert training_bytes(model, preset, torch.bfloat16, "cuda") <= 0.8 * size * 1e9
    # Activation checkpointing leaves room for more.
    assert tokens_with(80, replace(T5_PRESET, activation_checkpointing=True)) == 65536
    assert tokens_with(140, device="cpu") == 16384
    assert tokens_with(300, replace(T5_PRESET, micro_batch_tokens=10**6)) == 10**6
