"""Trainings that are stopped at a step, and samplings at a chunk, end as if they had not been stopped."""

import errno
import json
import os
import signal
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import hf_storage

from minidpost.errors import UserError
from minidpost.models.hf_config import Model
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.lora import add_adapters
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import open_tensors
from minidpost.selftraining.run_directory import Chunks
from minidpost.storage import write_json
from minidpost.training import dpo, saving, sft, state
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import DPOSettings, PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import Schedule, apply_step, read_log
from minidpost.training.sft import SFTSettings, train_sft
from minidpost.training.state import Terminated, TrainingState, read_metadata

SFT = SFTSettings(epochs=3, examples_per_step=3, schedule=Schedule(1e-2), micro_batch_tokens=30, seed=3)
DPO = DPOSettings(steps=8, pairs_per_step=3, schedule=Schedule(1e-2), micro_batch_tokens=60, seed=3)
N_STEPS = 8 + 1  # of SFT: three epochs of seven examples


def tiny(family: str = "t5") -> Model:
    """A small model; of "t5-lora" and "llama-lora" adapters alone are trained."""
    torch.manual_seed(0)
    if family.startswith("t5"):
        model: Model = T5(T5Config(30, 16, 8, 24, 2, 1, 2, dropout=0.2)).initialise()
    else:
        model = Llama(LlamaConfig(30, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4, dropout=0.2)).initialise()
    if family.endswith("lora"):
        add_adapters(model, rank=2, alpha=4.0, seed=5)
    return model


def examples(n: int, seed: int = 1) -> list[TokenizedExample]:
    generator = Random(seed)
    ids = [[generator.randrange(30) for _ in range(generator.randrange(1, 9))] for _ in range(2 * n)]
    return [TokenizedExample(tuple(prompt), (*target, 1)) for prompt, target in zip(ids[::2], ids[1::2], strict=True)]


def pairs(n: int) -> list[PreferencePair]:
    return [
        PreferencePair(chosen, replace(rejected, prompt_ids=chosen.prompt_ids))
        for chosen, rejected in zip(examples(n), examples(n, 2), strict=True)
    ]


def dpo_against_itself(model, data, settings, **more) -> None:
    """DPO as a run does it: the reference is computed from the model that is to be trained, and then stays as it is."""
    reference_P2 = reference_log_probabilities(model, data, micro_batch_tokens=DPO.micro_batch_tokens)
    train_dpo(model, data, reference_P2, settings, **more)


LOOPS = {"sft": (sft, train_sft, examples(7), SFT, N_STEPS), "dpo": (dpo, dpo_against_itself, pairs(7), DPO, 8)}


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """As in a terminal; what runs in the background may have been started with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


TRAININGS = [
    *[(loop, family) for loop in LOOPS for family in ("t5", "llama")],
    ("sft", "t5-lora"),
    ("dpo", "llama-lora"),
]


@pytest.fixture(params=TRAININGS, ids="-".join)
def train(request, monkeypatch, tmp_path):
    """Runs a loop, calling `at_step[step]()` before the step's update; gives weights and log without speeds."""
    loop_name, family = request.param
    module, loop, data, settings, n_steps = LOOPS[loop_name]

    def run(state: TrainingState | None, at_step: dict = {}, **changes):  # noqa: B006
        def with_events(model, optimizer, schedule, *, step, n_steps):
            at_step.get(step, lambda: None)()
            return apply_step(model, optimizer, schedule, step=step, n_steps=n_steps)

        monkeypatch.setattr(module, "apply_step", with_events)
        model, log = tiny(family), tmp_path / "log.jsonl"
        items, stage = changes.pop("data", data), changes.pop("stage", "stage")
        loop(model, items, replace(settings, **changes), log_path=log, stage=stage, state=state)
        rows = [{name: value for name, value in row.items() if "second" not in name} for row in read_log(log)]
        assert [row["step"] for row in rows] == list(range(n_steps))
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}, rows

    run.module, run.n_steps = module, n_steps
    return run


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "sft.progress" / "state.safetensors"


def same(a: tuple, b: tuple) -> bool:
    return a[1] == b[1] and all(torch.equal(weight, b[0][name]) for name, weight in a[0].items())


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
@pytest.mark.parametrize("step", [0, 4, -1])
def test_a_stopped_training_ends_as_one_that_was_not(train, path, number, kind, step):
    whole, step = train(None), range(train.n_steps)[step]
    handler = signal.signal(signal.SIGTERM, state.interrupt)
    try:
        with pytest.raises(kind) as stopped:
            train(TrainingState(path), {step: lambda: send(number)})
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stopped.type is kind
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    steps = []
    resumed = train(TrainingState(path), {later: lambda later=later: steps.append(later) for later in range(99)})
    assert steps == list(range(step + 1, train.n_steps))
    assert same(resumed, whole)


def test_a_kill_loses_the_steps_after_the_last_save(train, path):
    """And what was logged of them."""
    whole, saving = train(None), TrainingState(path, minutes=0)

    def killed():
        raise RuntimeError

    def no_more():
        saving.minutes = 1e9

    with pytest.raises(RuntimeError):
        train(saving, {3: no_more, 5: killed})
    steps = []
    resumed = train(TrainingState(path), {later: lambda later=later: steps.append(later) for later in range(99)})
    assert steps[0] == 3
    assert same(resumed, whole)


def test_a_training_may_be_killed_again_and_again(train, path):
    def killed():
        raise RuntimeError

    for step in range(1, train.n_steps):
        with pytest.raises(RuntimeError):
            train(TrainingState(path, minutes=0), {step: killed})
    assert same(train(TrainingState(path)), train(None))


def test_a_second_ctrl_c_does_not_wait(train, path):
    done = []
    with pytest.raises(KeyboardInterrupt):
        train(TrainingState(path), {2: lambda: (send(signal.SIGINT), send(signal.SIGINT), done.append(2))})
    assert not done
    assert not path.exists()


def test_signals_are_as_they_were_afterwards(train, path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    during = []
    train(TrainingState(path), {1: lambda: during.append(signal.getsignal(signal.SIGINT))})
    train(None, {1: lambda: during.append(signal.getsignal(signal.SIGINT))})
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert during[0] != before[0]
    assert during[1] == before[0]  # without a path nobody waits


def test_the_state_of_another_reference_is_not_used(path, tmp_path):
    """Although pairs, settings and stage are the same."""

    def run(state: TrainingState | None, reference_P2: torch.Tensor) -> dict[str, torch.Tensor]:
        model = tiny()
        train_dpo(model, pairs(7), reference_P2, DPO, log_path=tmp_path / "log.jsonl", state=state)
        return {name: weight.detach().clone() for name, weight in model.named_parameters()}

    reference_P2 = reference_log_probabilities(tiny(), pairs(7), micro_batch_tokens=60)
    other_P2 = reference_P2.clone()
    other_P2[3, 1] += 1
    first = run(TrainingState(path, minutes=0), reference_P2)
    second = run(TrainingState(path), other_P2)
    expected = run(None, other_P2)
    assert all(torch.equal(weight, second[name]) for name, weight in expected.items())
    assert not all(torch.equal(weight, first[name]) for name, weight in expected.items())


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_the_state_of_adapters_holds_nothing_else(path, family):
    model = tiny(f"{family}-lora")
    train_sft(model, examples(7), SFT, state=TrainingState(path, minutes=0))
    with open_tensors(path) as file:
        names = {*file.keys()}
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert names == {f"{kind}/{name}" for kind in ("weight", "exp_avg", "exp_avg_sq", "step") for name in trained}
    assert all("lora_" in name for name in names)
    before = dict(tiny(family).named_parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name not in trained)


@pytest.mark.parametrize("other", ["t5", "t5-lora of rank 3"])
def test_the_state_of_other_adapters_is_not_used(path, other):
    """Although stage, settings and examples are the same."""

    def trained(state: TrainingState | None) -> dict[str, torch.Tensor]:
        model = tiny("t5")
        if other != "t5":
            add_adapters(model, rank=3, alpha=4.0, seed=5)
        train_sft(model, examples(7), SFT, state=state)
        return {name: weight.detach() for name, weight in model.named_parameters()}

    train_sft(tiny("t5-lora"), examples(7), SFT, state=TrainingState(path, minutes=0))
    found, expected = trained(TrainingState(path)), trained(None)
    assert all(torch.equal(weight, found[name]) for name, weight in expected.items())


@pytest.mark.parametrize("change", ["stage", "seed", "schedule", "data"])
def test_the_state_of_something_else_is_not_used(train, path, change):
    data = LOOPS[train.module.__name__.split(".")[-1]][2]
    other = {"stage": "other", "seed": 4, "schedule": Schedule(2e-3), "data": [*data[:-1], data[0]]}[change]
    with pytest.raises(KeyboardInterrupt):
        train(TrainingState(path), {4: lambda: send(signal.SIGINT)})
    assert same(train(TrainingState(path), **{change: other}), train(None, **{change: other}))


@pytest.mark.parametrize("less", [{"micro_batch_tokens": 9}, {"activation_checkpointing": True}], ids="".join)
def test_a_training_goes_on_with_less_memory(train, path, less):
    whole = train(None)
    with pytest.raises(KeyboardInterrupt):
        train(TrainingState(path), {4: lambda: send(signal.SIGINT)})
    steps = []
    record = {step: lambda step=step: steps.append(step) for step in range(99)}
    _, rows = train(TrainingState(path), record, **less)
    assert steps == list(range(5, train.n_steps))
    assert rows[:5] == whole[1][:5]
    # Other micro-batches do not make another learning rate the same training.
    steps.clear()
    train(TrainingState(path), record, **less, schedule=Schedule(2e-3))
    assert steps == list(range(train.n_steps))


def test_what_saves_memory_changes_only_rounding_of_the_rest(train, path):
    """Without dropout: micro-batches change which units it hits."""
    settings = {"dropout": 0.0} if train.module is sft else {}
    whole = train(None, **settings)
    with pytest.raises(KeyboardInterrupt):
        train(TrainingState(path), {4: lambda: send(signal.SIGINT)}, **settings)
    steps = []
    record = {step: lambda step=step: steps.append(step) for step in range(99)}
    resumed = train(TrainingState(path), record, **settings, micro_batch_tokens=9, activation_checkpointing=True)
    assert steps[0] == 5
    for row, expected in zip(resumed[1], whole[1], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4, abs=1e-5)


def test_a_broken_state_is_named(train, path):
    path.parent.mkdir()
    path.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(UserError, match=r"state\.safetensors: not a whole safetensors file"):
        train(TrainingState(path))


class StopAfter(TrainingState):
    """One that is asked to stop after so many steps."""

    def __init__(self, path: Path, n_steps: int):
        super().__init__(path)
        self.n_steps = n_steps

    def after_step(self, step, model, optimizer, log_path):
        if step + 1 == self.n_steps:
            send(signal.SIGINT)
        super().after_step(step, model, optimizer, log_path)


def as_of_two_processes(path: Path) -> Path:
    """Put what two processes would have saved in the place of a state of one: its directory, a file of each."""
    metadata, tensors = read_metadata(path), tensors_of(path)
    directory = path.with_name(f"state-{int(metadata['next_step']):07d}")
    directory.mkdir()
    for number in range(2):
        parts, info = {}, {}
        for name, tensor in tensors.items():
            if tensor.dim() == 0 and number == 0:
                parts[name], info[name] = tensor, {"saved_offsets": []}
            elif tensor.dim() > 0:
                start = number * ((len(tensor) + 1) // 2)
                parts[name] = tensor.tensor_split([(len(tensor) + 1) // 2])[number].contiguous()
                info[name] = {"saved_offsets": [start] + [0] * (tensor.dim() - 1)}
        header = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)}
        save_file(parts, directory / f"rank-{number:05d}.safetensors", header)
    write_json(directory / saving.METADATA, metadata)
    path.unlink()
    return directory


def test_one_process_takes_up_the_state_of_two(path):
    """And has nothing to warn of."""
    with pytest.raises(KeyboardInterrupt):
        train_sft(tiny(), examples(7), SFT, state=StopAfter(path, 4))
    assert as_of_two_processes(path).name == "state-0000004"
    whole, resumed = tiny(), tiny()
    train_sft(whole, examples(7), SFT)
    again = TrainingState(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_sft(resumed, examples(7), SFT, state=again)
    assert [str(warning.message) for warning in caught if "torch.distributed" in str(warning.message)] == []
    assert again.next_step == 4
    for weight, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(weight, expected)


@pytest.mark.parametrize("how", ["cut off", "garbage", "one missing", "all missing", "state.json without a log"])
def test_a_broken_state_of_two_processes_is_named(path, how, caplog):
    with pytest.raises(KeyboardInterrupt):
        train_sft(tiny(), examples(7), SFT, state=StopAfter(path, 4))
    directory = as_of_two_processes(path)
    first, second = sorted(directory.glob("*.safetensors"))
    if how == "cut off":
        second.write_bytes(second.read_bytes()[:-100])
    elif how == "garbage":
        second.write_bytes(b"\xff" * 1000)
    elif how == "one missing":
        second.unlink()
    elif how == "all missing":
        first.unlink()
        second.unlink()
    else:
        metadata = read_metadata(directory)
        del metadata["log"]
        write_json(directory / saving.METADATA, metadata)
    with pytest.raises(UserError, match=r"state-0000004.*; remove ") as refusal:
        train_sft(tiny(), examples(7), SFT, state=TrainingState(path))
    assert "\n" not in str(refusal.value)
    assert [record.message for record in caplog.records if record.name == "root"] == []  # which would be shown


def test_ctrl_c_while_a_state_of_two_is_read(path, monkeypatch):
    """torch makes an error of its own of it."""
    with pytest.raises(KeyboardInterrupt):
        train_sft(tiny(), examples(7), SFT, state=StopAfter(path, 4))
    as_of_two_processes(path)

    def interrupted(*_arguments):
        raise Terminated

    monkeypatch.setattr(hf_storage.HuggingFaceStorageReader, "read_data", interrupted)
    with pytest.raises(Terminated):
        train_sft(tiny(), examples(7), SFT, state=TrainingState(path))


# -- written while training goes on -----------------------------------------------------------------------------------


class Writes:
    """What is written of states, by the number of the next step: when, by whom, and with what hindrances.

    The writing of state `held` waits until `release` is called; `errors` are raised when half a state is written.
    """

    def __init__(self, monkeypatch):
        self.held: int | None = None
        self.errors: dict[int, Exception] = {}
        self.events: list[tuple[str, int]] = []
        self.threads: dict[int, threading.Thread] = {}
        self.may_go_on = threading.Event()
        self.original = saving.write_own_safetensors
        monkeypatch.setattr(saving, "write_own_safetensors", self.write)

    def write(self, tensors, path, metadata):
        next_step = int(metadata["next_step"])
        self.threads[next_step] = threading.current_thread()
        self.events.append(("begin", next_step))
        if next_step == self.held:
            assert self.may_go_on.wait(60)
        self.original(tensors, path, metadata)
        if next_step in self.errors:
            raise self.errors[next_step]
        self.events.append(("end", next_step))

    def release(self) -> None:
        self.may_go_on.set()

    def release_soon(self) -> None:
        """While somebody waits, as far as that can be had: nothing depends on it."""
        threading.Timer(0.05, self.release).start()

    @property
    def begun(self) -> list[int]:
        return [next_step for event, next_step in self.events if event == "begin"]


@pytest.fixture
def writes(monkeypatch) -> Writes:
    return Writes(monkeypatch)


def is_still_writing() -> bool:
    return any(thread.name == "saving" for thread in threading.enumerate())


def next_step_of(path: Path) -> int:
    """Of the only thing that is saved there."""
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return int(read_metadata(path)["next_step"])


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def saved_after_step_2(train, saving_state: TrainingState, at_step: dict[int, Any]) -> tuple:
    """A training that saves after steps 0, 1 and 2 alone."""

    def no_more():
        saving_state.minutes = 1e9

    return train(saving_state, {3: no_more, **at_step})


def test_a_state_is_that_of_its_step_although_training_goes_on(train, path, writes, monkeypatch):
    writes.held = 3
    saving_state = TrainingState(path, minutes=0)
    seen = []

    def two_steps_later():
        seen.append(saving_state.save is not None and not saving_state.save.is_written)
        seen.append(int(read_metadata(path)["next_step"]))
        writes.release()

    in_background = saved_after_step_2(train, saving_state, {5: two_steps_later})
    assert seen == [True, 2]  # two steps have changed all weights since, and the state before is still there
    assert next_step_of(path) == 3
    found = tensors_of(path)
    assert writes.threads[3] is not threading.main_thread()

    path.unlink()
    monkeypatch.setattr(saving, "available_memory", lambda: 0)
    at_once = saved_after_step_2(train, TrainingState(path, minutes=0), {})
    assert writes.threads[3] is threading.main_thread()
    expected = tensors_of(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert same(in_background, at_once)


def cannot_allocate(_tensor):
    raise MemoryError


@pytest.mark.parametrize(
    ("name", "replacement"), [("available_memory", lambda: 10**4), ("host_copy", cannot_allocate)], ids=["free", "copy"]
)
def test_without_memory_for_a_copy_a_state_is_written_at_once(train, path, writes, monkeypatch, name, replacement):
    monkeypatch.setattr(saving, name, replacement)
    saving_state = TrainingState(path, minutes=0)
    seen = []

    def look():
        seen.append((saving_state.save, next_step_of(path)))

    result = train(saving_state, dict.fromkeys(range(1, 99), look))
    assert seen == [(None, step) for step in range(1, train.n_steps)]
    assert {*writes.threads.values()} == {threading.main_thread()}
    assert same(result, train(None))


def test_memory_is_shared_by_the_processes_of_a_machine(monkeypatch):
    tensors = {"a": torch.ones(10, 10)}
    monkeypatch.setattr(saving, "available_memory", lambda: 1000)
    (copy,) = saving.host_copies(tensors).values()
    assert torch.equal(copy, tensors["a"]) and copy.data_ptr() != tensors["a"].data_ptr()
    monkeypatch.setattr(saving, "processes_of_machine", lambda: 2)
    assert saving.host_copies(tensors) is not None
    monkeypatch.setattr(saving, "processes_of_machine", lambda: 3)
    assert saving.host_copies(tensors) is None  # 400 bytes of 333


def test_memory_that_cannot_be_pinned_is_no_error(monkeypatch):
    def cannot_pin(_tensor):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other call")

    monkeypatch.setattr(saving, "host_copy", cannot_pin)
    assert saving.host_copies({"a": torch.ones(10)}) is None


def test_copies_are_waited_for_on_the_gpu_of_their_tensors(monkeypatch):
    """Which need not be the one that torch takes for the present one."""
    waited_for = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited_for.append)
    monkeypatch.setattr(saving, "host_copy", lambda tensor: tensor)
    device = torch.device("cuda:1")
    saving.host_copies({name: SimpleNamespace(is_cuda=True, device=device, nbytes=8) for name in "ab"})
    assert waited_for == [device]


def test_states_are_written_one_after_the_other(train, path, writes):
    """Of every step, if so asked: the next one waits."""
    writes.held = 3
    train(TrainingState(path, minutes=0), {3: writes.release_soon})
    steps = range(1, train.n_steps + 1)
    assert writes.events == [(event, step) for step in steps for event in ("begin", "end")]


def test_no_save_begins_while_one_is_written(train, path, writes, monkeypatch):
    """However much time passes."""
    now = [0.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    writes.held = 1

    def pass_hours():
        now[0] += 9999

    train(TrainingState(path, minutes=1), {**dict.fromkeys(range(99), pass_hours), train.n_steps - 1: writes.release})
    assert writes.begun[0] == 1
    assert writes.begun[1:] in ([], [train.n_steps])


def test_an_error_in_the_writing_is_raised_at_the_next_step(train, path, writes):
    writes.errors[4] = ValueError("this cannot be written")
    steps = []
    record = {step: lambda step=step: steps.append(step) for step in range(99)}
    with pytest.raises(ValueError, match="this cannot be written"):
        train(TrainingState(path, minutes=0), record)
    assert steps == [0, 1, 2, 3, 4]
    assert next_step_of(path) == 3  # half of what was written after it is removed
    assert not is_still_writing()


@pytest.mark.parametrize("failing", [range(4, 6), range(4, 99)], ids=["a while", "to the end"])
def test_a_save_without_room_is_given_up(train, path, writes, failing):
    """Training goes on, and what was saved before is still there."""
    writes.errors = dict.fromkeys(failing, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.warns(UserWarning, match="not saved .No space left on device.; training goes on") as warned:
        result = train(TrainingState(path, minutes=0))
    assert len(warned) == len(range(4, min(failing.stop, train.n_steps + 1)))
    assert next_step_of(path) == (3 if failing.stop == 99 else train.n_steps)
    writes.errors = {}
    assert same(result, train(None))
    assert same(train(TrainingState(path)), result)


def test_a_stop_waits_for_the_save_that_is_being_written(train, path, writes):
    writes.held = 3

    def stop():
        send(signal.SIGINT)
        writes.release_soon()

    with pytest.raises(KeyboardInterrupt):
        saved_after_step_2(train, TrainingState(path, minutes=0), {5: stop})
    assert writes.events[-4:] == [("begin", 3), ("end", 3), ("begin", 6), ("end", 6)]
    assert writes.threads[6] is threading.main_thread()
    assert next_step_of(path) == 6
    assert not is_still_writing()
    assert same(train(TrainingState(path)), train(None))


def test_a_second_ctrl_c_gives_up_what_is_being_written(train, path, writes):
    writes.held = 3

    def stop():
        writes.release_soon()
        send(signal.SIGINT, signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        saved_after_step_2(train, TrainingState(path, minutes=0), {5: stop})
    assert writes.events[-1] == ("begin", 3)
    assert next_step_of(path) == 2
    assert not is_still_writing()


def test_the_end_waits_for_the_save_that_is_being_written(train, path, writes):
    writes.held = train.n_steps
    train(TrainingState(path, minutes=0), {train.n_steps - 1: writes.release_soon})
    assert next_step_of(path) == train.n_steps
    assert not is_still_writing()


def test_an_error_in_a_step_waits_for_the_save_that_is_being_written(train, path, writes):
    """It is the error that is raised, even if the save fails too."""
    writes.held = 3

    def fail():
        writes.release_soon()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(TrainingState(path, minutes=0), {3: fail})
    assert next_step_of(path) == 3
    assert not is_still_writing()
    writes.errors[4] = ValueError("this cannot be written")
    with pytest.raises(RuntimeError, match="out of memory"):
        train(TrainingState(path, minutes=0), {4: fail})
    assert next_step_of(path) == 3


def test_halves_that_a_kill_left_are_removed(path):
    path.parent.mkdir()
    path.with_name("state.safetensors.unfinished").write_bytes(b"half")
    path.with_name("state-0000003.unfinished").mkdir()
    path.with_name("state-0000003.unfinished").joinpath("rank-00001.safetensors").write_bytes(b"half")
    train_sft(tiny(), examples(7), SFT, state=TrainingState(path, minutes=0))
    assert next_step_of(path) == N_STEPS


def test_time_decides_when_to_save(train, path, writes, monkeypatch):
    """So many minutes after the end of the last save; the first one after the third step here."""
    now = [0.0]
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])
    saving_state = TrainingState(path, minutes=3)

    def pass_a_minute():
        if saving_state.save is not None:
            saving_state.save.wait()
        now[0] += 60

    train(saving_state, dict.fromkeys(range(99), pass_a_minute))
    assert writes.begun == [3, 7]


def test_training_stands_still_for_a_twentieth_at_most(train, path, writes, monkeypatch):
    """A copy that takes 10 minutes is not made again for 190."""
    now, copy = [0.0], saving.host_copies
    monkeypatch.setattr(state.time, "monotonic", lambda: now[0])

    def slow_copies(tensors):
        now[0] += 600
        return copy(tensors)

    saving_state = TrainingState(path, minutes=3)

    def pass_half_an_hour():
        if saving_state.save is not None:
            saving_state.save.wait()
        now[0] += 1800

    monkeypatch.setattr(saving, "host_copies", slow_copies)
    train(saving_state, dict.fromkeys(range(99), pass_half_an_hour))
    # Copied after step 0 at 30 min, ended after step 1 at 70, again from 260 on: after step 8 at 280.
    assert writes.begun == [1, *([9] if train.n_steps == 9 else [])]


# -- samples ----------------------------------------------------------------------------------------------------------


def test_chunks_count_from_the_first_without_a_gap(tmp_path):
    chunks = Chunks(tmp_path / "a", "stage", 1)
    assert chunks.n_finished() == 0
    for chunk_index in (0, 1, 3):
        chunks.commit(chunk_index, [{"n": chunk_index}, {"text": "½"}])
    again = Chunks(tmp_path / "a", "stage", 1)
    assert again.n_finished() == 2
    assert list(again.records()) == [{"n": 0}, {"text": "½"}, {"n": 1}, {"text": "½"}]
    assert Chunks(tmp_path / "a", "stage", 2).n_finished() == 0


def test_chunks_keep_the_size_that_the_first_one_has(tmp_path):
    records = [{"n": n} for n in range(8)]
    chunks = Chunks(tmp_path, "stage")
    assert chunks.chunk_size(5) == 5
    chunks.save(records, 3)
    assert chunks.chunk_size(5) == Chunks(tmp_path, "stage").chunk_size(5) == 3
    # Without the first one the others are of no use, and another size begins.
    chunks.files()[0].unlink()
    chunks = Chunks(tmp_path, "stage")
    assert (chunks.n_finished(), chunks.chunk_size(5)) == (0, 5)
    chunks.commit(0, records[:5])
    again = Chunks(tmp_path, "stage")
    assert (again.n_finished(), again.n_records) == (1, 5)
