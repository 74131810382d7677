"""Commands by several processes: the same samples for any number of them, files of rank 0, one message at a failure."""

import errno
import gc
import json
import os
import re
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from llama_oracle import LLAMA_SHAPES, random_llama
from ranks import PATIENCE, on_ranks, wait_for_all
from safetensors.torch import load_file
from t5_oracle import SHAPES, random_t5

from minidpost import processes
from minidpost.cli import run_command
from minidpost.data import toy
from minidpost.errors import UserError
from minidpost.models.weights import load_model, load_template, save_model
from minidpost.processes import Counts, SharedWork, is_first_to_fail, is_lost_connection, on_rank_0, own_device, rank
from minidpost.sampling import sampler
from minidpost.sampling.generate import generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.evaluation import greedy_outcomes, sampled_scores
from minidpost.selftraining.presets import TINY_T5
from minidpost.selftraining.run_directory import RunDirectory
from minidpost.selftraining.steps import load_for_training, save_trained
from minidpost.storage import write_jsonl
from minidpost.training import saving
from minidpost.training import sft as sft_module
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import Schedule, apply_step, read_log
from minidpost.training.parallel import load_spread
from minidpost.training.sft import SFTSettings, sft_gradients, train_sft
from minidpost.training.state import Terminated, TrainingState

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "weights" / "tiny-t5-dpo-st"
EXAMPLES = list(toy.examples("dev"))[:7]
SETTINGS = SamplingSettings(0.7, max_new_tokens=24, slots=5, seed=3)


# -- what processes tell each other -----------------------------------------------------------------------------------


def share_work(n_pieces: int) -> tuple[list[int], dict[int, list[dict]]]:
    """Take pieces until there are none; rank 0 collects what has come of those of the others."""
    processes.PIECE_BYTES = 100  # so that a result has several pieces
    work = SharedWork(range(10, 10 + n_pieces))
    counts = Counts(2)
    taken = []
    for number in work.take():
        taken.append(number)
        counts.add(1, number)
        if rank() > 0:
            work.hand_in(number, [{"number": number, "text": "½\ud800" * number, "none": None}])
    counts.tell()
    wait_for_all()
    counts.tell()
    found = {}
    if rank() == 0:
        for number in work.numbers:
            records = work.handed_in(number)
            assert (records is None) == (number in taken)
            if records is not None:
                found[number] = records
                assert work.handed_in(number) is None  # once
    assert counts.add(0, 0) == [n_pieces, sum(work.numbers)]
    return taken, found


@pytest.mark.parametrize(("n_ranks", "n_pieces"), [(2, 9), pytest.param(4, 3, marks=pytest.mark.slow)])
def test_every_piece_of_work_is_done_once(n_ranks, n_pieces):
    results = on_ranks(n_ranks, share_work, n_pieces)
    taken = [number for of_rank, _ in results for number in of_rank]
    assert sorted(taken) == [*range(10, 10 + n_pieces)]
    assert all(of_rank == sorted(of_rank) for of_rank, _ in results)
    found = results[0][1]
    assert found.keys() == {*taken} - {*results[0][0]}
    assert all(records == [{"number": n, "text": "½\ud800" * n, "none": None}] for n, records in found.items())


def decide() -> tuple[int, int]:
    return on_rank_0(lambda: 10 + rank()), sum(is_first_to_fail(7) for _ in range(2))


def test_rank_0_decides_and_the_first_to_fail_speaks():
    results = on_ranks(3, decide)
    assert [decided for decided, _ in results] == [10, 10, 10]
    assert sum(n_first for _, n_first in results) == 1


def test_an_own_gpu_is_the_one_that_the_group_gave(monkeypatch):
    """Where each process is shown one alone, that is number 0 of each."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert [own_device(device) for device in ("cuda", "cpu")] == ["cuda:0", "cpu"]


def test_a_launcher_that_says_too_little_is_told_so(monkeypatch, capsys):
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: None)
    (line,) = capsys.readouterr().err.splitlines()
    assert "WORLD_SIZE is 2, but RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR not set: torchrun sets" in line


def test_nccl_gives_its_own_reason(monkeypatch, capsys):
    """Which stands at the end of its message; not each of its errors says that a process has ended."""
    error = dist.DistBackendError(
        "NCCL error in: NCCLUtils.cpp\n" + 30 * "a word " + "\nLast error:\nno such interface"
    )

    def fail() -> None:
        raise error

    with pytest.raises(SystemExit, match="1"):
        run_command(fail, "that is all")
    (line,) = capsys.readouterr().err.splitlines()
    assert ": NCCL error in: " in line and line.endswith(" Last error: no such interface; that is all")
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    assert not is_lost_connection(error)
    assert is_lost_connection(dist.DistStoreError("wait timeout"))
    assert is_lost_connection(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer"))


# -- sampling and evaluation ------------------------------------------------------------------------------------------


def sample_and_evaluate(first_chunk: int) -> tuple[list[dict], list[int], dict, list[str]]:
    """The samples of some questions in chunks of four, on rank 0, and evaluations."""
    sampler.CHUNK = 4
    template = load_template(MODEL)
    model = load_model(MODEL)
    questions = [example.question for example in EXAMPLES]
    answers = [example.answer for example in EXAMPLES]
    samples = [
        asdict(sample)
        for sample in generate(
            model, template, questions, SETTINGS, answers=answers, n_samples=3, first_chunk=first_chunk
        )
    ]
    outcomes = greedy_outcomes(model, template, EXAMPLES, SETTINGS)
    scores = sampled_scores(model, template, EXAMPLES, SETTINGS, pass_at=[1, 2], maj_at=[2])
    return samples, outcomes, asdict(scores)


@pytest.fixture(scope="module")
def of_one_process() -> dict[int, tuple]:
    """What a single process samples and scores, from chunk 0 and from chunk 2 on."""
    chunk = sampler.CHUNK
    try:
        return {first_chunk: sample_and_evaluate(first_chunk) for first_chunk in (0, 2)}
    finally:
        sampler.CHUNK = chunk


@pytest.mark.parametrize(
    ("n_ranks", "first_chunk"), [(2, 2), *(pytest.param(n, 0, marks=pytest.mark.slow) for n in (2, 4))]
)
def test_samples_and_scores_are_those_of_one_process(of_one_process, n_ranks, first_chunk):
    samples, outcomes, scores = of_one_process[first_chunk]
    results = on_ranks(n_ranks, sample_and_evaluate, first_chunk)
    assert len(samples) == 7 * 3 - 4 * first_chunk
    assert results[0][0] == samples  # in the same order
    assert [of_rank[0] for of_rank in results[1:]] == [[]] * (n_ranks - 1)
    assert [of_rank[1:] for of_rank in results] == [(outcomes, scores)] * n_ranks


# -- models -----------------------------------------------------------------------------------------------------------


def load_and_save(start: Path, out: Path, lora_rank: int | None, dtype: torch.dtype) -> None:
    """Load a model as a training does, change it, and write it."""
    preset = replace(TINY_T5, lora_rank=lora_rank)
    model = load_for_training(start, preset, dtype=None, device="cpu", seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight.mul_(1.5).add_(0.01 * len(name))
    save_trained(model, out, start=start, dtype=dtype)


@pytest.mark.parametrize(
    ("family", "lora_rank", "dtype"),
    [
        pytest.param("t5", None, torch.float32, marks=pytest.mark.slow),
        ("llama", 3, torch.bfloat16),
        pytest.param("t5", 3, torch.float32, marks=pytest.mark.slow),
        pytest.param("t5", None, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("llama", None, torch.float32, marks=pytest.mark.slow),
        pytest.param("llama", 3, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_slices_of_a_model_are_written_as_the_whole(tmp_path, family, lora_rank, dtype):
    model = random_t5(SHAPES["relu-tied-scaled"]) if family == "t5" else random_llama(LLAMA_SHAPES["grouped"])
    save_model(model, tmp_path / "start", [])
    load_and_save(tmp_path / "start", tmp_path / "one", lora_rank, dtype)
    on_ranks(3, load_and_save, tmp_path / "start", tmp_path / "three", lora_rank, dtype)
    files = {str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*") if path.is_file()}
    assert ("adapter/adapter_model.safetensors" in files) == (lora_rank is not None)
    assert files == {str(p.relative_to(tmp_path / "three")) for p in (tmp_path / "three").rglob("*") if p.is_file()}
    for name in files:
        if name.endswith(".json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
            continue
        one, three = (load_file(tmp_path / side / name) for side in ("one", "three"))
        assert one.keys() == three.keys()
        for key in one:
            assert one[key].dtype == three[key].dtype
            torch.testing.assert_close(one[key], three[key], rtol=1e-6, atol=1e-7)
    loaded = load_model(tmp_path / "three")
    assert not torch.equal(loaded.embedding.weight, model.embedding.weight) or lora_rank is not None


def gathered_and_extra_bytes(n_rows: int, width: int) -> tuple[list[float], int]:
    """The first column of a tensor of which each rank had a slice, and the memory that its gathering took (Linux)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    # Made of the slices: whoever scatters a whole tensor may hold it a little longer.
    rows = torch.arange(n_rows, dtype=torch.float32)[processes.rows_of_rank(n_rows, rank())]
    spread = DTensor.from_local(
        rows[:, None].expand(-1, width).clone(),
        init_device_mesh("cpu", (dist.get_world_size(),)),
        [Shard(0)],
        run_check=False,
        shape=torch.Size((n_rows, width)),
        stride=(width, 1),
    )
    wait_for_all()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    at_rest = status_bytes("VmRSS")
    gathered = processes.whole(spread)
    extra = status_bytes("VmHWM") - at_rest
    assert torch.equal(gathered, gathered[:, :1].expand_as(gathered))
    return gathered[:, 0].tolist(), extra


def status_bytes(field: str) -> int:
    """A size in the process's status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of memory")
def test_gathering_a_tensor_takes_its_memory_once():
    n_bytes = 4 * 1001 * 2**14  # above what the allocator takes from what it has
    for gathered, extra in on_ranks(2, gathered_and_extra_bytes, 1001, 2**14):
        assert gathered == [*range(1001)]
        assert 0.9 * n_bytes < extra < 1.25 * n_bytes


def test_a_tensor_of_fewer_rows_than_ranks_is_gathered():
    for gathered, _ in on_ranks(3, gathered_and_extra_bytes, 4, 2):  # two rows, two rows, none
        assert gathered == [0, 1, 2, 3]


def is_let_go_of(start: Path) -> bool:
    """Whether a model that was trained is gone when the next one has been loaded."""
    gc.disable()  # else it depends on what else has been made since
    model = load_for_training(start, TINY_T5, dtype=None, device="cpu", seed=1)
    sft_gradients(model, [TokenizedExample((5, 6), (7, 1))], 100)
    reference = weakref.ref(model)
    del model
    load_for_training(start, TINY_T5, dtype=None, device="cpu", seed=1)
    return reference() is None


def test_a_stage_leaves_no_model_to_the_next():
    assert on_ranks(2, is_let_go_of, MODEL) == [True, True]


# -- a run's directory ------------------------------------------------------------------------------------------------


def make_stages(path: Path) -> tuple[list[bool], dict, dict]:
    """Two stages, in which every rank tries to write."""
    directory = RunDirectory(path, {"seed": 1})
    finished = [directory.is_finished("a.json")]
    with directory.stage("a.json") as stage:
        stage.metadata["rank"] = rank()
        if rank() == 0:
            stage.path.write_text("{}")
    with directory.stage("b") as stage:
        (stage.path / f"{rank()}").write_text(f"{rank()}")  # all are given the same place
        wait_for_all()
    finished += [directory.is_finished("a.json"), directory.is_finished("b")]
    directory.log("once")
    return finished, directory.stages


def test_rank_0_owns_the_run_directory(tmp_path):
    results = on_ranks(3, make_stages, tmp_path / "run")
    assert [finished for finished, _ in results] == [[False, True, True]] * 3
    assert results[0][1] == results[1][1] == results[2][1]
    assert results[2][1]["a.json"]["rank"] == 0
    assert results[2][1]["b"]["sha256"].keys() == {"0", "1", "2"}
    assert (tmp_path / "run" / "log.txt").read_text().count("once") == 1
    assert RunDirectory(tmp_path / "run", {"seed": 1}).is_finished("b")


# -- commands ---------------------------------------------------------------------------------------------------------

QUICK = """
    --iterations 1 --sft-epochs 2 --sft-dropout 0 --dpo-steps 2 --dpo-learning-rate 7e-5 --max-new-tokens 48 --slots 8
    --samples 2 --dpo-samples 3 --pass-at 2 --micro-batch-tokens 900 --checkpoint-minutes 0
""".split()


def command(name: str, arguments: list, out: Path) -> int:
    """A command as its file is run, with what it shows in files by rank: 0 where it ends well."""
    for number, suffix in ((1, "out"), (2, "err")):
        with open(out / f"{os.environ['RANK']}.{suffix}", "wb") as stream:
            os.dup2(stream.fileno(), number)
    # pytest's own streams are no files
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    sampler.CHUNK = 16
    sys.argv = [str(ROOT / name), *map(str, arguments)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


@pytest.fixture
def mine(tmp_path, monkeypatch) -> list:
    """Flags of a short run on 24 examples, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    write_jsonl("mine.jsonl", [vars(example) for example in list(toy.examples("train"))[:24]])
    return ["--model", MODEL, "--data", "mine.jsonl", *QUICK]


def train(n_ranks: int, arguments: list, name: str) -> list[str]:
    """A run by some processes; what each has shown on standard error."""
    out = Path(f"{name}-{n_ranks}.shown")
    out.mkdir(exist_ok=True)
    statuses = on_ranks(n_ranks, command, "train.py", [*arguments, "--run-dir", name], out, are_joined=False)
    shown = [(out / f"{number}.err").read_text() for number in range(n_ranks)]
    assert statuses == [0] * n_ranks, shown
    return shown


def stage_names(path: Path) -> list[str]:
    return [json.loads(line)["stage"] for line in (path / "stages.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_whole_run_of_two_processes(mine, tmp_path):
    """Samples, pairs and labels are those of one process, weights but for rounding; one continues what two did."""
    train(1, mine, "one")
    shown = train(2, mine, "two")
    assert shown[1] == "" and "0/sft" in shown[0]
    assert Path("two-2.shown/1.out").read_text() == ""
    one, two = tmp_path / "one", tmp_path / "two"
    assert stage_names(one) == stage_names(two)
    for name in ("samples-dpo", "pairs", "samples-sft", "pseudo-labels"):
        ours, theirs = ((side / "iteration-1" / f"{name}.jsonl").read_bytes() for side in (one, two))
        assert ours == theirs and len(ours) > 1000, name
    for name in ("iteration-0/sft", "iteration-1/dpo", "iteration-1/sft"):
        ours, theirs = (load_file(side / name / "model.safetensors") for side in (one, two))
        for key in ours:
            torch.testing.assert_close(theirs[key], ours[key], rtol=1e-3, atol=3e-4, msg=f"{name} {key}")
        logs = [[step["loss"] for step in read_log(side / name / "log.jsonl")] for side in (one, two)]
        assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    evaluations = [json.loads((side / "iteration-1/evaluation.json").read_text()) for side in (one, two)]
    assert evaluations[0] == evaluations[1]

    # The last stages once more, by another number of processes.
    expected = load_file(one / "iteration-1/sft/model.safetensors")
    for path, before, after in ((two, 2, 1), (one, 1, 2)):
        for stage in ("iteration-1/sft", "iteration-1/evaluation.json"):
            subprocess.run(["rm", "-r", path / stage], check=True)
        train(after, mine, path.name)
        assert f"begun with {before} processes, continued with {after}" in (path / "log.txt").read_text()
        found = load_file(path / "iteration-1/sft/model.safetensors")
        for key, weight in expected.items():
            torch.testing.assert_close(found[key], weight, rtol=1e-3, atol=3e-4)
    assert stage_names(one) == stage_names(two)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["--beta", "a"], "train.py: argument --beta: "),  # every process finds it
        pytest.param(
            ["--device", "cpu:0"],
            "train.py: argument --device: each process has a device of its own",
            marks=pytest.mark.slow,
        ),
        pytest.param(  # rank 0
            ["--data", "none.jsonl"], "train.py: none.jsonl: cannot be read", marks=pytest.mark.slow
        ),
        (["--max-target", "1"], "train.py: 0/sft: all "),  # every process, in a stage
    ],
)
def test_a_mistake_is_told_once_and_ends_all(mine, changes, complaint):
    Path("shown").mkdir()
    statuses = on_ranks(2, command, "train.py", [*mine, *changes, "--run-dir", "run"], Path("shown"), are_joined=False)
    assert statuses == [2, 2]
    told = [line for number in range(2) for line in Path(f"shown/{number}.err").read_text().splitlines()]
    assert len(told) == 1 and told[0].startswith(complaint), told


def fail_on_one(out: Path, error: Exception) -> None:
    """A command of which rank 1 fails while the others wait for it; whoever leaves the group waits for them, as nccl's.

    What each shows on standard error goes to a file.
    """

    def main() -> None:
        if rank() == 1:
            raise error
        wait_for_all()

    dist.destroy_process_group = lambda: time.sleep(PATIENCE)
    with open(out / f"{os.environ['RANK']}.err", "w") as stream:
        os.dup2(stream.fileno(), 2)
    sys.stderr = open(2, "w", closefd=False)
    run_command(main)


@pytest.mark.parametrize(
    ("error", "status", "told"), [(UserError("a mistake"), 2, "a mistake"), (ValueError("a fault"), 1, "Traceback")]
)
def test_a_failing_process_ends_without_the_others(tmp_path, error, status, told):
    assert on_ranks(2, fail_on_one, tmp_path, error, are_joined=False) == [status] * 2
    assert told in (tmp_path / "1.err").read_text()
    assert (tmp_path / "0.err").read_text() == ""


ENDS_BADLY = """
import atexit, os, sys
import torch.distributed as dist
from minidpost.cli import run_command

def main():
    atexit.register(os.abort)
    dist.barrier()
    print("the last words")
    if sys.argv[1:] == ["--help"]:
        sys.exit()

run_command(main)
"""


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_processes_end_well_whatever_happens_while_python_ends(flags):
    """As a thread of gloo's may abort them then."""
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    group = {
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": f"{store.port}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS_BADLY, *flags],
            env={**os.environ, **group, "WORLD_SIZE": "2", "RANK": f"{number}", "LOCAL_RANK": f"{number}"},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    shown = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert shown == ["the last words\n"] * 2


def test_sample_and_eval_write_what_one_process_writes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl("questions.jsonl", [{"question": example.question} for example in EXAMPLES * 3])
    common = ["--checkpoint", MODEL, "--max-new-tokens", 20, "--slots", 8]
    shown = {}
    for n_ranks in (1, 2):
        out = Path(f"{n_ranks}")
        out.mkdir()
        flags = [*common, "--input", "questions.jsonl", "--samples", 3, "--temperature", 0.7]
        statuses = on_ranks(
            n_ranks, command, "sample.py", [*flags, "--output", out / "samples.jsonl"], out, are_joined=False
        )
        flags = [*common, "--limit", 9, "--pass-at", 2, "--calculator", "on"]
        statuses += on_ranks(
            n_ranks, command, "eval.py", [*flags, "--output", out / "eval.json"], out, are_joined=False
        )
        assert statuses == [0] * 2 * n_ranks, [path.read_text() for path in out.glob("*.err")]
        shown[n_ranks] = [(out / f"{number}.out").read_text() for number in range(n_ranks)]
    assert shown[2] == [*shown[1], ""]  # rank 0 alone shows something
    for name in ("samples.jsonl", "eval.json"):
        assert Path("1", name).read_bytes() == Path("2", name).read_bytes()


# -- killed, or without room ------------------------------------------------------------------------------------------


SMALL_SFT = SFTSettings(epochs=6, examples_per_step=7, schedule=Schedule(1e-3), dropout=0.0)  # six steps


def train_small(state: TrainingState, at_step: dict[int, Callable[[], None]] = {}) -> list[str]:  # noqa: B006
    """An SFT of six steps, calling `at_step[step]()` before the step's update; gives the warnings."""

    def with_events(model, optimizer, schedule, *, step, n_steps):
        at_step.get(step, lambda: None)()
        return apply_step(model, optimizer, schedule, step=step, n_steps=n_steps)

    sft_module.apply_step = with_events
    model = load_spread(MODEL)
    examples = [TokenizedExample((n, 5), (n, 1)) for n in range(7)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train_sft(model, examples, SMALL_SFT, state=state)
    return [str(warning.message) for warning in caught]


def fail_to_save(out: Path, failing: int) -> list[str]:
    """An SFT of which one rank can write nothing for a while: the third and fourth save, after every step, fail.

    Rank 0 can write its slices, but not what it writes in the end.
    """
    n_saves = 0
    write_slices, write_json = saving.write_own_safetensors, saving.write_json

    def write_nothing(path, metadata):
        if metadata["next_step"] in ("3", "4") and failing == 0:
            raise OSError(errno.EFBIG, "File too large")
        write_json(path, metadata)

    def write_little(tensors, path, metadata):
        nonlocal n_saves
        n_saves += 1
        if n_saves in (3, 4) and rank() == failing == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
        try:
            write_slices(tensors, path, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    saving.write_json = write_nothing
    saving.write_own_safetensors = write_little
    return train_small(TrainingState(out / "state.safetensors", minutes=0))


@pytest.mark.parametrize("failing", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_save_without_room_on_one_rank_is_given_up_by_all(tmp_path, failing):
    """Training goes on, what was saved last before stays, and the next save is whole again."""
    results = on_ranks(2, fail_to_save, tmp_path, failing)
    for messages in results:
        given_up = [message for message in messages if "not saved (File too large); training goes on" in message]
        assert len(given_up) == 2, messages
    assert [path.name for path in tmp_path.iterdir()] == ["state-0000006"]


def save_while_training(out: Path, at_once: bool) -> list[tuple[list[str], bool]]:
    """Save after steps 0 and 1 alone, the second time slowly on rank 1; gives what is there and who writes at step 4.

    With `at_once` rank 1 has no memory for a copy, so that no rank makes one.
    """
    may_go_on = threading.Event()
    write = saving.write_own_safetensors
    n_saves = 0

    def write_slowly(tensors, path, metadata):
        nonlocal n_saves
        n_saves += 1
        if n_saves == 2 and rank() == 1 and not at_once:
            assert may_go_on.wait(60)
        write(tensors, path, metadata)

    saving.write_own_safetensors = write_slowly
    if at_once and rank() == 1:
        saving.available_memory = lambda: 0
    state = TrainingState(out / "state.safetensors", minutes=0)
    seen = []

    def no_more():
        state.minutes = 1e9

    def look():
        wait_for_all()
        is_rank_0_done = state.save is not None and (rank() == 1 or state.save.wait() is None)
        seen.append((sorted(path.name for path in out.iterdir()), is_rank_0_done))
        wait_for_all()
        may_go_on.set()

    train_small(state, {2: no_more, 4: look})
    return seen


@pytest.mark.slow
def test_slices_are_those_of_their_step_although_training_goes_on(tmp_path):
    """And a state has its name when the slowest rank has written; all write at once where one must."""
    found = {}
    for name, at_once in (("background", False), ("at once", True)):
        (tmp_path / name).mkdir()
        results = on_ranks(2, save_while_training, tmp_path / name, at_once)
        names = ["state-0000002"] if at_once else ["state-0000001", "state-0000002.unfinished"]
        assert results == [[(names, not at_once)]] * 2
        assert [path.name for path in (tmp_path / name).iterdir()] == ["state-0000002"]
        files = sorted(tmp_path.joinpath(name, "state-0000002").glob("*.safetensors"))
        assert len(files) == 2
        found[name] = [load_file(path) for path in files]
    for one, other in zip(*found.values(), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def stop_while_saving(out: Path, how: str) -> list[str]:
    """Stop at step 3, while rank 1 is still writing what is saved after step 2; gives what was raised."""
    write = saving.write_own_safetensors
    n_saves = 0
    may_go_on = threading.Event()

    def write_slowly(tensors, path, metadata):
        nonlocal n_saves
        n_saves += 1
        if n_saves == 3 and rank() == 1:
            assert may_go_on.wait(60)
        write(tensors, path, metadata)

    saving.write_own_safetensors = write_slowly
    state = TrainingState(out / "state.safetensors", minutes=0)

    def stop():
        threading.Timer(0.2, may_go_on.set).start()
        if how == "error":
            raise ValueError("on all ranks")
        if rank() == 1:
            state.stop_signal = signal.SIGTERM

    try:
        train_small(state, {3: stop})
    except (Terminated, ValueError) as error:
        assert not any(thread.name == "saving" for thread in threading.enumerate())
        return [type(error).__name__]
    return []


@pytest.mark.parametrize(
    ("how", "raised", "saved"),
    [
        ("SIGTERM", "Terminated", "state-0000004"),
        pytest.param("error", "ValueError", "state-0000002", marks=pytest.mark.slow),
    ],
)
def test_processes_end_while_a_save_is_being_written(tmp_path, how, raised, saved):
    """Asked to stop, they wait for it and save once more; after an error the save before it remains."""
    assert on_ranks(2, stop_while_saving, tmp_path, how) == [[raised]] * 2
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".unfinished"] == [saved]


@pytest.mark.slow
def test_three_kills_of_one_of_two_processes(tmp_path):
    script = ROOT / "tests" / "fault_injection" / "kill_ranks.py"
    flags = ["--kills", "3", "--seed", "5", "--output", tmp_path / "kills.md"]
    outcome = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "**3 of 3** ended" in (tmp_path / "kills.md").read_text(encoding="utf-8")


def torchrun(arguments: list) -> subprocess.Popen:
    """train.py by two processes, started as a user does."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "train.py", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_torchrun_with_a_mistake_a_kill_and_to_the_end(mine):
    mistaken = torchrun([*mine, "--run-dir", "run", "--beta", "a"])
    _, err = mistaken.communicate(timeout=120)
    assert err.count("train.py: argument --beta: ") == 1
    assert mistaken.returncode == 1  # torchrun's own
    assert len(re.findall(r"exitcode  : 2", err)) == 2

    killed = torchrun([*mine, "--run-dir", "run"])
    while not Path("run/iteration-0/sft.progress").is_dir() or not [*Path("run/iteration-0/sft.progress").iterdir()]:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.05)
    os.kill(children(killed.pid)[-1], signal.SIGKILL)
    _, err = killed.communicate(timeout=60)  # both have ended
    assert killed.returncode == 1
    # The other one says so, unless torchrun was the first to see the kill, and has ended it.
    assert re.search(r"another process has ended \(.*\); the same command continues from here", err) or "SIGTERM" in err

    whole = torchrun([*mine, "--run-dir", "run"])
    out, err = whole.communicate(timeout=300)
    assert whole.returncode == 0, err
    assert "The model to use is in" in out
    assert len(stage_names(Path("run"))) == 10
