"""LoRA (Hu et al. 2021, arXiv 2106.09685): a frozen model learns through low-rank adapters on its linear layers.

y = W x becomes y = W x + α/M · B (A x): W is frozen, A (M, D) and B (O, M) are trained, M being the rank. All linear
layers of attention and feed-forward have an adapter; embeddings, norms, biases and the head stay as they are. A is
drawn as peft does it, B is zero, so that a model with fresh adapters gives what it gave without them, bit for bit: the
reference of DPO is the model before its first step, that is with its adapters off.

The frozen weights may be bf16; the adapters are fp32. After a training they are merged into fp32 weights, so that
nothing else knows of them, and are written under peft's names too. Departures from the paper: it adapts the queries and
values of attention alone, and its A is normally distributed.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidpost.models.hf_config import Model, mapping_for
from minidpost.models.layers import Linear
from minidpost.models.weights import (
    ADAPTER_CONFIG,
    WritableTensor,
    checked_files,
    in_memory,
    open_tensors,
    read_tensor,
    write_directory,
    write_safetensors,
)
from minidpost.processes import rank, whole
from minidpost.storage import write_json

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's names


class LoRALinear(Linear):
    """A linear layer with frozen weight and bias, and an adapter that is trained."""

    def __init__(self, frozen: Linear, rank: int, alpha: float):
        """Take over the parameters of `frozen`, not copies of them. The adapter is zero."""
        has_bias = frozen.bias is not None
        super().__init__(frozen.in_features, frozen.out_features, bias=has_bias, device="meta")  # no memory
        self.weight = frozen.weight
        self.bias = frozen.bias
        self.alpha = alpha
        device = frozen.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, frozen.in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(frozen.out_features, rank, dtype=torch.float32, device=device))

    @property
    def rank(self) -> int:
        """M."""
        return self.lora_A.shape[0]

    @property
    def scale(self) -> float:
        """α/M."""
        return self.alpha / self.rank

    def forward(self, x_BTD: Tensor) -> Tensor:
        """W x + bias + α/M · B (A x), (…, D) to (…, O)."""
        y_BTO = super().forward(x_BTD)
        # Like W's, these products are made in the precision of x, or in autocast's.
        low_BTM = F.linear(x_BTD, self.lora_A.to(x_BTD.dtype))
        added_BTO = F.linear(low_BTM, self.lora_B.to(low_BTM.dtype))
        return torch.add(y_BTO, added_BTO, alpha=self.scale)

    def delta(self) -> Tensor:
        """What the adapter adds to the weight, α/M · B A, (O, D) in fp32."""
        return self.scale * (whole(self.lora_B.detach()) @ whole(self.lora_A.detach()))


def adapted_layers(model: Model) -> list[tuple[str, Linear]]:
    """The linear layers that have an adapter, or get one, by their dotted names: all but the head."""
    modules = model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, Linear) and name != "head"]


def n_adapter_parameters(model: Model, rank: int) -> int:
    """The parameters of all adapters of this rank, which `model` need not have; it may be on the meta device."""
    return sum(rank * (layer.in_features + layer.out_features) for _, layer in adapted_layers(model))


def highest_rank(model: Model) -> int:
    """The rank above which adapters save nothing and can do no more: the smaller side of the largest adapted matrix."""
    return max(min(layer.in_features, layer.out_features) for _, layer in adapted_layers(model))


def add_adapters(model: Model, *, rank: int, alpha: float, seed: int) -> None:
    """Freeze a model and give it fresh adapters, which alone are trained from now on.

    ValueError where the model has adapters already.
    """
    model.requires_grad_(False)
    for name, layer in adapted_layers(model):
        if isinstance(layer, LoRALinear):
            raise ValueError(f"{name} has an adapter already")
        model.set_submodule(name, LoRALinear(layer, rank, alpha))
    with torch.no_grad():
        for weight, values in fresh_values(model, seed):
            weight.copy_(values)


def fresh_values(model: Model, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """The parameters of all adapters, each with its first values, which depend on the seed alone.

    A is Kaiming-uniform as in peft, that is uniform within ±1/√D; B is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in adapters(model).values():
        a_MD = torch.empty(layer.rank, layer.in_features, dtype=torch.float32)
        nn.init.kaiming_uniform_(a_MD, a=5**0.5, generator=generator)
        yield layer.lora_A, a_MD
        yield layer.lora_B, torch.zeros(layer.out_features, layer.rank)


def adapters(model: Model) -> dict[str, LoRALinear]:
    """The layers of a model that have an adapter, by their dotted names."""
    return {name: layer for name, layer in adapted_layers(model) if isinstance(layer, LoRALinear)}


def save_adapters(model: Model, directory: Path, start: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json as peft reads them; `start` is the frozen model's place.

    `PeftModel.from_pretrained(transformers' model of start, directory)` is then the model that was trained.
    """
    their_names = dict(mapping_for(model.config).names(model.config))
    layers = adapters(model)
    tensors = {}
    targets = set()
    for name, layer in layers.items():
        theirs = their_names[f"{name}.weight"].removesuffix(".weight")
        tensors[f"base_model.model.{theirs}.lora_A.weight"] = whole(layer.lora_A.detach())
        tensors[f"base_model.model.{theirs}.lora_B.weight"] = whole(layer.lora_B.detach())
        targets.add(theirs.rpartition(".")[2])
    if rank() > 0:
        return
    any_layer = next(iter(layers.values()))
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(in_memory(tensors), directory / ADAPTER_WEIGHTS)
    content = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        "base_model_name_or_path": str(start),
        "r": any_layer.rank,
        "lora_alpha": any_layer.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(directory / ADAPTER_CONFIG, content)


def save_merged(
    model: Model,
    directory: Path,
    *,
    start: Path,
    tokenizer_files: Sequence[Path],
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the model in the directory `start` with the adapters of `model` added, as `save_model` would write it.

    The weights are read from `start` once more and added in fp32, whatever the precision of the frozen ones: next to
    a bf16 weight most of what an adapter adds would be rounded away. One tensor at a time is held in memory.
    """
    write_directory(
        directory,
        model.config,
        merged_tensors(model, start, dtype),
        dtype=dtype,
        tokenizer_files=tokenizer_files,
        template=template,
    )


def merged_tensors(model: Model, start: Path, dtype: torch.dtype) -> list[WritableTensor]:
    """The tensors of the directory `start`, by their names, with the adapters of `model` added in fp32 on the CPU."""
    layers = adapters(model)
    parameters = dict(model.named_parameters())

    def to_write(path: Path, theirs: str, ours: str) -> WritableTensor:
        owner, _, last = ours.rpartition(".")

        def values() -> Tensor:
            # What an adapter adds may have to be gathered from all ranks; what it is added to rank 0 alone reads.
            delta = layers[owner].delta().cpu() if owner in layers and last == "weight" else torch.zeros(())
            if rank() > 0:
                return delta
            with open_tensors(path) as tensors:
                return read_tensor(tensors, path, theirs).float() + delta

        return WritableTensor(theirs, tuple(parameters[ours].shape), dtype, values)

    _, files = checked_files(start)
    return [to_write(path, theirs, ours) for path, names in files.items() for theirs, ours in names.items()]
