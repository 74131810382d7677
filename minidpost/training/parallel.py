"""One training on several processes: whose weights lie where (FSDP2), and which rows of a step each process takes.

No rank has the whole model. Each keeps a slice of every weight, of its gradient and of AdamW's moments; before a layer
is computed its weights are gathered from all ranks, afterwards they are let go, and its gradients are summed so that
each rank gets those of its slice (torch's `fully_shard`, one group a layer, the rest of the model another). A small
model is one group as a whole: a group's gathering and summing takes some milliseconds on CPUs, however small it is. A
rank computes its own rows of an optimizer step, and the sum over the ranks is what one process would have computed, to
rounding: the loss of a row is divided by the count of the whole step, so that nothing is averaged.

A gathering is done by all ranks together, so all must make the same number of forward and backward passes. One that has
no rows left computes some again with weight 0.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from minidpost.models.hf_config import Model
from minidpost.models.lora import fresh_values
from minidpost.models.weights import checked_files, open_tensors
from minidpost.processes import rank, rows_of_rank, world_size
from minidpost.training.batching import TokenizedExample, micro_batches

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.tensor import DTensor

MIN_SPREAD_BY_LAYER = 20_000_000  # [ours] parameters from which on each layer is a group of its own
MAX_WHOLE_GRADIENTS = 10**9  # [ours] parameters whose gradients a rank holds whole between micro-batches, in fp32


def load_spread(
    directory: Path,
    *,
    weights_dtype: torch.dtype = torch.float32,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    add: Callable[[Model], None] | None = None,
    adapter_seed: int = 0,
) -> Model:
    """This rank's slices of a model, which it reads from the disk itself; they are held in `weights_dtype`.

    `dtype` is the precision of forward passes; bf16 weights are gathered as such, which halves what travels, and
    gradients are summed in fp32. `add` gives the model its adapters while it has no memory yet.
    """
    model, files = checked_files(directory)
    model.to(weights_dtype)
    if add is not None:
        add(model)
    shard(model, device, dtype)
    model.to_empty(device=device)
    parameters = dict(model.named_parameters())
    # An adapted layer holds the frozen weight under the name that it had.
    with torch.no_grad():
        for path, our_names in files.items():
            with open_tensors(path) as tensors:
                for theirs, ours in our_names.items():
                    weight = parameters[ours]
                    local_part(weight).copy_(tensors.get_slice(theirs)[own_rows(len(weight))])
        for weight, values in fresh_values(model, adapter_seed):
            local_part(weight).copy_(values[own_rows(len(weight))])
    return model.eval()


def shard(model: Model, device: str, dtype: torch.dtype | None = None) -> None:
    """Spread a model's weights over all ranks, in place."""
    # Here and below, as they are slow to import, and one process alone does not need them.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

    precision = gathered_precision(device, dtype)
    # The type of device is given, as torch would take an accelerator where it sees one.
    all_ranks = init_device_mesh(torch.device(device).type, (world_size(),))
    if is_spread_by_layer(sum(weight.numel() for weight in model.parameters())):
        for stack in dict.fromkeys(model.stacks):
            for layer in stack.layers:
                fully_shard(layer, mesh=all_ranks, mp_policy=precision)
    fully_shard(model, mesh=all_ranks, mp_policy=precision)
    register_fsdp_forward_method(model, "label_log_probabilities")
    if precision.param_dtype is not None and model.embedding.weight.dtype == torch.float32:
        # As on one process, where autocast leaves the embedding alone, what layers add to is fp32.
        model.embedding.register_forward_hook(lambda _module, _ids, x_BTD: x_BTD.float())
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by the count of all ranks' rows already. A plain sum is asked for explicitly as well,
            # because gloo takes an average for a sum.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def gathered_precision(device: str, dtype: torch.dtype | None) -> "MixedPrecisionPolicy":
    """On GPUs weights are gathered in bf16 for forward passes in bf16, and gradients are summed in fp32.

    What layers are given stays as it is: what is multiplied in bf16, autocast decides, as on one process.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    on_gpu = torch.device(device).type == "cuda"
    return MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if on_gpu and dtype == torch.bfloat16 else None,
        reduce_dtype=torch.float32 if on_gpu else None,
        cast_forward_inputs=False,
    )


def is_spread_by_layer(n_parameters: int) -> bool:
    """Whether each layer of a model of this size is gathered by itself, or the whole model at once."""
    return n_parameters >= MIN_SPREAD_BY_LAYER


def own_rows(n_rows: int) -> slice:
    """Which rows of a tensor of `n_rows` lie on this rank."""
    return rows_of_rank(n_rows, rank())


def local_part(weight: Tensor) -> Tensor:
    """The slice of a spread tensor that lies on this rank; the whole of any other."""
    return weight.to_local() if is_spread(weight) else weight


def is_spread(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether each rank has a slice of a tensor."""
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def sums_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over the ranks: once a step is enough, in its last one."""
    if world_size() > 1:
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(now)


def let_go_of_weights(model: nn.Module) -> None:
    """Leave each rank its slices alone, as after a backward pass: a forward pass alone keeps some weights gathered."""
    if world_size() > 1:
        from torch.distributed.fsdp import FSDPModule

        if isinstance(model, FSDPModule):
            model.reshard()


# -- which rows -------------------------------------------------------------------------------------------------------


def own_micro_batches(
    model: Model,
    items: Sequence[Sequence[TokenizedExample]],
    max_tokens: int,
    device: torch.device,
    *,
    ends_step: bool = True,
) -> Iterator[tuple[list[int], float]]:
    """This rank's micro-batches of items 0 … n−1, each with the weight of its loss, 1.0.

    All ranks get equally many: where one has fewer, item 0 follows with weight 0.0. Gradients are summed over the ranks
    with the last one, so that they travel once. Until then a rank holds all of them: those of a large model are summed
    with each. Without `ends_step` the optimizer step has further items, and none of these micro-batches is its last.
    """
    n_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    keeps_whole_gradients = n_trained <= MAX_WHOLE_GRADIENTS
    of_ranks = [
        [[own[i] for i in batch] for batch in micro_batches(model.config, [items[i] for i in own], max_tokens, device)]
        for own in deal(items, world_size())
    ]
    n_rounds = max(len(batches) for batches in of_ranks)
    own = of_ranks[rank()]
    for index in range(n_rounds):
        sums_gradients(model, (ends_step and index == n_rounds - 1) or not keeps_whole_gradients)
        yield (own[index], 1.0) if index < len(own) else ([0], 0.0)


def deal(items: Sequence[Sequence[TokenizedExample]], n_ranks: int) -> list[list[int]]:
    """Which items each rank takes, so that all have like numbers of tokens and of items.

    As cards are dealt, the largest first, and back again: of seven items, ordered by size, two ranks get
    0 3 4 and 1 2 5 6. A single rank gets all, in their order.
    """
    if n_ranks == 1:
        return [[*range(len(items))]]
    sizes = [sum(example.n_tokens for example in item) for item in items]
    largest_first = sorted(range(len(items)), key=lambda i: sizes[i], reverse=True)
    dealt: list[list[int]] = [[] for _ in range(n_ranks)]
    for place, index in enumerate(largest_first):
        round_number, position = divmod(place, n_ranks)
        dealt[position if round_number % 2 == 0 else n_ranks - 1 - position].append(index)
    return dealt
