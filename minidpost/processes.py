"""The processes of a command that torchrun started, and what they tell each other; one where there is no torchrun.

    torchrun --nproc-per-node 8 train.py …

Each process, a rank of 0 … world − 1, runs the whole command. What they must agree on, rank 0 decides; what the disk
holds, rank 0 writes, and the others read: all machines see the same directories. A rank that fails ends them all, and
the first to fail is the only one that says why.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minidpost.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

Value = TypeVar("Value")

# The longest that ranks wait for one: while a large model is written, or the last chunk is sampled. One that has died
# is noticed at once.
PATIENCE = timedelta(hours=6)
MEMORY = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")  # a line for each tree of control groups: number, controllers, path
CONTROL_GROUPS = Path("/sys/fs/cgroup")
VARIABLES = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE
SECONDS_BETWEEN_COUNTS = 1.0  # in which the counts of other ranks may be out of date
PIECE_BYTES = 2**22  # of what is handed in; the store refuses values from twice this size on


def rank() -> int:
    """This process's number among those of the command, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the command has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def processes_of_machine() -> int:
    """How many processes of the command share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if started_by_torchrun() else 1


def available_memory() -> int:
    """Bytes that the processes of this machine could still take: of its memory, and of a container's or job's limit."""
    if MEMORY.is_file():
        free = 1024 * numbers_in(MEMORY, ":")["MemAvailable"]
    else:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *room_in_groups()])


def room_in_groups() -> Iterator[int]:
    """Bytes that are left in each control group around this process that has a limit: a job's, a container's."""
    if not OWN_GROUPS.is_file():
        return
    for line in os.fsdecode(OWN_GROUPS.read_bytes()).splitlines():
        _, controllers, path = line.split(":", 2)
        # In a container the path may be the host's, of which nothing but the root is seen.
        own = Path(path.lstrip("/"))
        for group in (own, *own.parents):
            if not controllers:  # version 2, which has one tree
                yield from room_in_group(CONTROL_GROUPS / group, "memory.max", "memory.current")
            elif "memory" in controllers.split(","):  # version 1; "total_" is with the groups within
                of_version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
                yield from room_in_group(CONTROL_GROUPS / "memory" / group, *of_version_1)


def room_in_group(group: Path, limit_name: str, used_name: str, prefix: str = "") -> Iterator[int]:
    """The bytes that are left in one control group, or nothing where it has no limit.

    Copies of files count as left: they are let go of when memory is needed. `prefix` is of their names in memory.stat.
    """
    limit = (group / limit_name).read_text(encoding="ascii").strip() if (group / limit_name).is_file() else "max"
    if limit == "max":
        return
    used = 0
    if (group / used_name).is_file():
        of_files = numbers_in(group / "memory.stat", " ")
        used = int((group / used_name).read_text(encoding="ascii"))
        used -= of_files[f"{prefix}inactive_file"] + of_files[f"{prefix}active_file"]
    yield max(0, int(limit) - used)


def numbers_in(path: Path, separator: str) -> dict[str, int]:
    """The first number of each line of one of the system's files, by what stands before it."""
    numbers = {}
    for line in path.read_text(encoding="ascii").splitlines():
        name, _, rest = line.partition(separator)
        if rest.split():
            numbers[name] = int(rest.split()[0])
    return numbers


def other_rank() -> tuple[int, ...]:
    """Nothing on rank 0, the number on any other: what tells a rank's random numbers from those of one process."""
    return (rank(),) if rank() else ()


def started_by_torchrun() -> bool:
    """Whether this process is one of several; a single one needs no group."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def own_device(device: str) -> str:
    """The device of this process: the GPU that `process_group` gave it, where `device` names none."""
    if torch.device(device).type == "cuda" and torch.device(device).index is None and started_by_torchrun():
        return f"cuda:{torch.cuda.current_device()}"
    return device


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes, where there are any, until the block ends: by nccl among GPUs, by gloo among CPUs.

    A process that fails does not leave the group, but has to end. UserError where a launcher has not told it its place.
    """
    if not started_by_torchrun():
        yield
        return
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set: torchrun sets all of them; "
            "for one process unset WORLD_SIZE"
        )
    if torch.cuda.is_available():
        # Each process may be shown one GPU alone, which then is number 0 of each.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group("cpu:gloo,cuda:nccl", timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    yield
    # Not after an error: nccl would wait for the other ranks, which may be waiting for this one.
    dist.destroy_process_group()


# -- one value for all ------------------------------------------------------------------------------------------------


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, in its place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which each rank has a slice, gathered on all of them; any other as it is.

    On a CPU nothing is held beside the result: each rank sends its rows to their place. What torch does there
    (`full_tensor`) takes the result's size once or one and a half times more.
    """
    if world_size() == 1:
        return tensor
    from torch.distributed.tensor import DTensor, Shard  # here, as it is slow to import

    if not isinstance(tensor, DTensor):
        return tensor
    if not tensor.is_cpu or tuple(tensor.placements) != (Shard(0),):
        return tensor.full_tensor()
    gathered = torch.empty(tensor.shape, dtype=tensor.dtype)
    for source in range(world_size()):
        rows = gathered[rows_of_rank(len(gathered), source)]
        if source == rank():
            rows.copy_(tensor.to_local())
        if len(rows) > 0:
            dist.broadcast(rows, src=source)
    return gathered


def rows_of_rank(n_rows: int, number: int) -> slice:
    """Which rows of a tensor lie on a rank: equal parts, of which the last may be shorter or empty."""
    per_rank = -(-n_rows // world_size())
    return slice(min(number * per_rank, n_rows), min((number + 1) * per_rank, n_rows))


def max_over_ranks(*numbers: int) -> list[int]:
    """For each number the largest that any rank has: how ranks come to one decision."""
    if world_size() == 1:
        return [*numbers]
    largest = torch.tensor(numbers, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def from_rank_0(value: Value) -> Value:
    """What rank 0 has, on all ranks: any plain value."""
    if world_size() == 1:
        return value
    values: list[Value] = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def on_rank_0(work: Callable[[], Value]) -> Value:
    """What a function gives on rank 0, where alone it is called, on all ranks: how they use a disk.

    An error of it ends rank 0, and thereby the others.
    """
    value: Any = work() if rank() == 0 else None
    result: Value = from_rank_0(value)
    return result


def write_on_rank_0(work: Callable[[], None]) -> None:
    """Call a function on rank 0 alone; an OSError of it is raised on all ranks, which may then go on without it."""
    failure: OSError | None = None
    if rank() == 0:
        try:
            work()
        except OSError as error:
            failure = error
    failure = from_rank_0(failure)
    if failure is not None:
        raise failure


# -- work that is shared ----------------------------------------------------------------------------------------------


class SharedWork:
    """Pieces of work 0 … n − 1, each of which goes to the rank that asks next, and what comes of them, to rank 0.

    All ranks must make theirs at the same point. A single process takes all pieces, in order.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = numbers
        self.name = common_name()

    def take(self) -> Iterator[int]:
        """The numbers that this rank is given, each when it asks for it, until none is left."""
        if world_size() == 1:
            yield from self.numbers
            return
        while (place := store().add(self.name, 1) - 1) < len(self.numbers):
            yield self.numbers[place]

    def hand_in(self, number: int, records: Sequence[dict[str, Any]]) -> None:
        """Give rank 0 what has come of a piece."""
        content = json.dumps(records)  # ASCII, so that a character is a byte
        n_pieces = -(-len(content) // PIECE_BYTES)
        for index in range(n_pieces):
            store().set(f"{self.name}/{number}/{index}", content[index * PIECE_BYTES : (index + 1) * PIECE_BYTES])
        store().set(f"{self.name}/{number}", str(n_pieces))  # last, as rank 0 looks for it

    def handed_in(self, number: int) -> list[dict[str, Any]] | None:
        """What another rank has made of a piece, once; None where it is not done yet."""
        key = f"{self.name}/{number}"
        if not store().check([key]):
            return None
        keys = [f"{key}/{index}" for index in range(int(store().get(key)))]
        content = b"".join(store().get(piece) for piece in keys)
        for used in (key, *keys):
            store().delete_key(used)
        records: list[dict[str, Any]] = json.loads(content)
        return records


class Counts:
    """Numbers that all ranks add to, for what rank 0 shows; those of the others are a second old at most.

    All ranks must make theirs at the same point.
    """

    def __init__(self, n_counts: int) -> None:
        self.name = common_name()
        self.own = [0] * n_counts  # that the others do not know of yet
        self.totals = [0] * n_counts
        self.told_at = 0.0  # time.monotonic()

    def add(self, *numbers: int) -> list[int]:
        """Add one number to each count; gives the sums over all ranks."""
        self.own = [own + number for own, number in zip(self.own, numbers, strict=True)]
        if world_size() == 1:
            return self.own
        if time.monotonic() - self.told_at >= SECONDS_BETWEEN_COUNTS:
            self.tell()
        return [total + own for total, own in zip(self.totals, self.own, strict=True)]

    def tell(self) -> None:
        """Tell the others of what they do not know yet, and ask for theirs."""
        if world_size() > 1:
            self.totals = [store().add(f"{self.name}/{index}", own) for index, own in enumerate(self.own)]
            self.own = [0] * len(self.own)
            self.told_at = time.monotonic()


def common_name() -> str:
    """A name that all ranks have, and nothing else has."""
    return from_rank_0(uuid.uuid4().hex)


def store() -> "Store":
    """Keys and values that all ranks see, which outlive any of them."""
    return dist.distributed_c10d._get_default_store()


# -- the end of a rank ------------------------------------------------------------------------------------------------


def is_first_to_fail(status: int) -> bool:
    """Whether no rank failed before this one, whose exit status is to be `status`: then it says why, and alone."""
    if world_size() == 1:
        return True
    try:
        is_first: bool = store().add("failures", 1) == 1
        if is_first:
            store().set("exit status", str(status))
    except RuntimeError:  # the store is gone, and so are others
        return False
    return is_first


def common_exit_status(status: int) -> int:
    """The exit status of the rank that failed first, in place of this one's."""
    if world_size() == 1:
        return status
    try:
        store().wait(["exit status"], timedelta(seconds=5))
        return int(store().get("exit status"))
    except RuntimeError:
        return status


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error says that another rank has ended."""
    is_of_store = isinstance(error, dist.DistError) and not is_of_backend(error)
    return world_size() > 1 and (is_of_store or "gloo" in str(error))


def is_of_backend(error: BaseException) -> bool:
    """Whether an error is nccl's: a rank that has ended, but also a wrong network interface, or too little memory."""
    return isinstance(error, dist.DistBackendError)
