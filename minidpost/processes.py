"""The processes of a command that torchrun started, and what they tell each other; one where there is no torchrun.

    torchrun --nproc-per-node 8 train.py …

Each process, a rank of 0 … world − 1, runs the whole command. What they must agree on, rank 0 decides; what the disk
holds, rank 0 writes, and the others read: all machines see the same directories.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

Value = TypeVar("Value")


def rank() -> int:
    """This process's number among those of the command, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the command has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def other_rank() -> tuple[int, ...]:
    """Nothing on rank 0, the number on any other: what tells a rank's random numbers from those of one process."""
    return (rank(),) if rank() else ()


def started_by_torchrun() -> bool:
    """Whether this process is one of several; a single one needs no group."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: str) -> str:
    """The device of this process: of a machine's GPUs the one with its local number, where `device` names none."""
    if torch.device(device).type == "cuda" and torch.device(device).index is None and started_by_torchrun():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Join the other processes, where there are any, until the block ends: by nccl among GPUs, by gloo among CPUs."""
    if not started_by_torchrun():
        yield
        return
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def mesh(device: str) -> DeviceMesh:
    """All processes in one row. The type of device is given, as torch would take an accelerator where it sees one."""
    return init_device_mesh(torch.device(device).type, (world_size(),))


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in its place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def max_over_ranks(*numbers: int) -> list[int]:
    """For each number the largest that any rank has: how ranks come to one decision."""
    if world_size() == 1:
        return [*numbers]
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def from_rank_0(value: Value) -> Value:
    """What rank 0 has, on all ranks: any plain value."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if world_size() > 1:
        dist.barrier()
