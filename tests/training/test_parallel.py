"""One training on 1, 2, 3 and 4 processes (gloo): loss, gradient norm, weights, reference, whatever the batches."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from llama_oracle import LLAMA_SHAPES, random_llama
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from t5_oracle import SHAPES, random_t5

from minidpost.models.hf_config import Model
from minidpost.models.lora import add_adapters
from minidpost.models.weights import load_model, save_model
from minidpost.processes import rank, sum_over_ranks, whole, world_size
from minidpost.training import parallel, sft
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import DPOSettings, PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import Schedule, read_log
from minidpost.training.parallel import deal, load_spread, local_part
from minidpost.training.sft import SFTSettings, train_sft
from minidpost.training.state import TrainingState

MODELS = {
    "t5": lambda: random_t5(SHAPES["gated-untied"]),
    "t5 tied": lambda: random_t5(SHAPES["relu-tied-scaled"]),
    "llama": lambda: random_llama(LLAMA_SHAPES["grouped"]),
    "llama tied": lambda: random_llama(replace(LLAMA_SHAPES["grouped"], tied=True)),
}
SCHEDULE = Schedule(learning_rate=1e-2, warmup=0.0, max_grad_norm=0.5)


def load(directory: Path, has_adapters: bool = False, is_small: bool = False) -> Model:
    """The whole model where there is one process, else slices of it, layer by layer unless it is to count as small."""

    def add(model: Model) -> None:
        if has_adapters:
            add_adapters(model, rank=3, alpha=6.0, seed=5)

    if world_size() > 1:  # this process is one of the ranks, and ends with them
        parallel.MIN_SPREAD_BY_LAYER = 10**9 if is_small else 0
        return load_spread(directory, add=add, adapter_seed=5)
    model = load_model(directory)
    add(model)
    return model


def examples(n: int) -> list[TokenizedExample]:
    """Ragged prompts and targets."""
    random = torch.Generator().manual_seed(5)

    def ids(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (1,), generator=random))
        return tuple(torch.randint(3, 40, (length,), generator=random).tolist())

    return [TokenizedExample(ids(20), (*ids(30), 1)) for _ in range(n)]


def preference_pairs(n: int) -> list[PreferencePair]:
    """Pairs of which some share a question, and some a completion."""
    made = []
    for index, (a, b, c) in enumerate(zip(*[iter(examples(3 * n))] * 3, strict=True)):
        chosen = TokenizedExample(a.prompt_ids, a.target_ids)
        made.append(PreferencePair(chosen, TokenizedExample(a.prompt_ids, b.target_ids)))
        if index % 2:
            made.append(PreferencePair(chosen, TokenizedExample(a.prompt_ids, c.target_ids)))
    return made


def train(
    directory: Path,
    out: Path,
    kind: str,
    per_step: int,
    micro_batch_tokens: int,
    checkpointing: bool,
    is_small: bool = False,
) -> None:
    """A short training; rank 0 leaves the log, the whole weights and the reference."""
    # In fp64 rounding is far below AdamW's eps. In fp32 it makes steps of its own where a gradient is nothing but it.
    model = load(directory, has_adapters=kind.endswith("lora"), is_small=is_small).double()
    log = out / "log.jsonl" if rank() == 0 else None
    reference_P2 = torch.empty(0, 2)
    if kind.startswith("sft"):
        settings = SFTSettings(
            epochs=2,
            examples_per_step=per_step,
            schedule=SCHEDULE,
            dropout=0.0,
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=checkpointing,
        )
        train_sft(model, examples(10), settings, log_path=log)
    else:
        pairs = preference_pairs(6)
        reference_P2 = reference_log_probabilities(model, pairs, micro_batch_tokens=micro_batch_tokens)
        settings = DPOSettings(
            steps=5,
            pairs_per_step=per_step,
            schedule=SCHEDULE,
            micro_batch_tokens=micro_batch_tokens,
            activation_checkpointing=checkpointing,
        )
        train_dpo(model, pairs, reference_P2, settings, log_path=log)
    weights = {name: whole(weight.detach()) for name, weight in model.named_parameters()}
    if rank() == 0:
        save_file({**weights, "reference_P2": reference_P2}, out / "result.safetensors")


def all_cases(work: Callable[..., None], cases: list) -> None:
    """All cases, one after the other, in one of the processes."""
    for case in cases:
        work(*case)


def on_processes(n: int, work: Callable[..., None], cases: list) -> None:
    """Do something for each of some cases, on processes of their own; one is a process without a group."""
    if n == 1:
        all_cases(work, cases)
    else:
        on_ranks(n, all_cases, work, cases)


WHOLE_STEPS = (8, 10**6, False)  # examples a step, tokens of a micro-batch, activation checkpointing
RAGGED_STEPS = (2, 60, True)  # accumulation, and fewer examples than processes: some then have none
IN_ONE_GROUP = (*RAGGED_STEPS, True)


@pytest.mark.parametrize(
    ("n_processes", "kinds", "names", "steps"),
    [
        (2, ("sft", "dpo"), ("t5",), (WHOLE_STEPS,)),
        (2, ("sft", "dpo"), ("llama tied",), (RAGGED_STEPS,)),
        (3, ("sft",), ("llama",), (RAGGED_STEPS,)),
        (4, ("dpo",), ("llama",), (RAGGED_STEPS,)),
        (2, ("dpo-lora",), ("t5",), (RAGGED_STEPS,)),
        (2, ("sft",), ("t5 tied",), (IN_ONE_GROUP,)),
        pytest.param(2, ("sft", "dpo"), MODELS, (WHOLE_STEPS, RAGGED_STEPS), marks=pytest.mark.slow),
        pytest.param(3, ("sft", "dpo"), MODELS, (WHOLE_STEPS, RAGGED_STEPS), marks=pytest.mark.slow),
        pytest.param(4, ("sft", "dpo"), MODELS, (WHOLE_STEPS, RAGGED_STEPS), marks=pytest.mark.slow),
        pytest.param(2, ("sft-lora", "dpo-lora"), MODELS, (WHOLE_STEPS, RAGGED_STEPS), marks=pytest.mark.slow),
        pytest.param(3, ("sft", "dpo", "dpo-lora"), MODELS, (IN_ONE_GROUP,), marks=pytest.mark.slow),
    ],
)
def test_training_is_that_of_one_process(tmp_path, n_processes, kinds, names, steps):
    cases = []
    for name in names:
        directory = tmp_path / name / "model"
        save_model(MODELS[name](), directory, [])
        for kind in kinds:
            for per_step, *how in steps:
                out = tmp_path / name / f"{kind}-{per_step}"
                for count in (1, n_processes):
                    (out / str(count)).mkdir(parents=True)
                case = (directory, out, kind, per_step, *how)
                cases.append(case)
                train(directory, out / "1", *case[2:])
    on_processes(n_processes, train, [(d, out / str(n_processes), *rest) for d, out, *rest in cases])

    for _, out, *_ in cases:
        logs = [[*read_log(out / str(count) / "log.jsonl")] for count in (1, n_processes)]
        assert len(logs[0]) == len(logs[1]) >= 4
        for one, several in zip(*logs, strict=True):
            assert one.keys() == several.keys()
            # Before the first update all margins are 0, or what rounding leaves of it.
            for key in one.keys() - {"tokens_per_second", *(["accuracy"] if one["step"] == 0 else [])}:
                assert several[key] == pytest.approx(one[key], rel=1e-6, abs=1e-9), (out, key)
        one, several = (load_file(out / str(count) / "result.safetensors") for count in (1, n_processes))
        assert one.keys() == several.keys()
        for name in one:
            torch.testing.assert_close(several[name], one[name], rtol=1e-9, atol=1e-9, msg=f"{out} {name}")


def losses_and_gradients(directory: Path, seed: int) -> tuple[list[float], list[bytes]]:
    """Of two steps of SFT with dropout that change nothing: this rank's own part of the loss, its slices' gradients.

    All examples are the same, so that the ranks have the same rows in both steps.
    """
    losses, gradients = [], []

    def record_loss(loss: torch.Tensor) -> torch.Tensor:
        losses.append(loss.item())
        return sum_over_ranks(loss)

    def record_gradients(model: Model, optimizer: torch.optim.Optimizer, *_: object, **__: object) -> dict:
        slices = [local_part(weight.grad).flatten() for weight in model.parameters()]
        gradients.append(torch.cat(slices).numpy().tobytes())
        optimizer.zero_grad()
        return {}

    sft.sum_over_ranks, sft.apply_step = record_loss, record_gradients
    settings = SFTSettings(epochs=2, examples_per_step=2, schedule=SCHEDULE, dropout=0.3, seed=seed)
    train_sft(load(directory), examples(1) * 2, settings)
    return losses, gradients


def with_seeds(directory: Path, seeds: tuple[int, ...]) -> list[tuple[list[float], list[bytes]]]:
    """`losses_and_gradients` with one seed after the other."""
    return [losses_and_gradients(directory, seed) for seed in seeds]


@pytest.mark.parametrize("name", ["t5", pytest.param("llama", marks=pytest.mark.slow)])
def test_dropout_is_a_function_of_seed_step_and_rank(tmp_path, name):
    save_model(MODELS[name](), tmp_path, [])
    results = on_ranks(2, with_seeds, tmp_path, (3, 3, 4))
    for first, again, other in results:
        assert first == again
        for one, another in zip(first, other, strict=True):  # losses, gradients
            assert len({*one, *another}) == 4  # of two seeds and two steps
    (losses, _), (losses_of_rank_1, _) = (of_rank[0] for of_rank in results)
    assert all(loss != loss_of_rank_1 for loss, loss_of_rank_1 in zip(losses, losses_of_rank_1, strict=True))


def precisions_of_layers(directory: Path) -> tuple[set[torch.dtype], float]:
    """In which precisions layers are given what they add to, under bf16 autocast, and the loss.

    Weights are gathered as they are on GPUs.
    """
    policy = parallel.gathered_precision("cuda", torch.bfloat16)
    parallel.gathered_precision = lambda *_: policy
    model = load(directory)
    found = set()
    for stack in model.stacks:
        for layer in stack.layers:
            layer.register_forward_pre_hook(lambda _layer, inputs: found.add(inputs[0].dtype))
    loss = sft.sft_gradients(model, examples(2), 10**6, dtype=torch.bfloat16)
    assert all(weight.grad.dtype == torch.float32 for weight in model.parameters())
    return found, loss.item()


@pytest.mark.parametrize("name", ["llama", pytest.param("t5", marks=pytest.mark.slow)])
def test_bf16_weights_are_added_to_in_fp32(tmp_path, name):
    """As on one process."""
    save_model(MODELS[name](), tmp_path, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "gathered_precision", parallel.gathered_precision)  # put back afterwards
        expected = precisions_of_layers(tmp_path)
    assert expected[0] == {torch.float32}
    for found, loss in on_ranks(2, precisions_of_layers, tmp_path):
        assert found == {torch.float32}
        assert loss == pytest.approx(expected[1], rel=1e-2)


def gradients_of_parts(directory: Path) -> tuple[bool, list[list[float]]]:
    """Whether a part of a step leaves gradients whole on each rank, and the gradients when the rest has followed."""
    model = load(directory)
    sft.sft_gradients(model, examples(5)[:3], 10**6, ends_step=False)
    is_summed = any(weight.grad is not None for weight in model.parameters())
    sft.sft_gradients(model, examples(5)[3:], 10**6)
    return is_summed, [whole(weight.grad).flatten().tolist() for weight in model.parameters()]


def test_a_part_of_a_step_is_summed_over_the_ranks_with_the_rest(tmp_path):
    """As with several micro-batches, before the last of which each rank holds all gradients."""
    save_model(MODELS["llama"](), tmp_path, [])
    _, expected = gradients_of_parts(tmp_path)
    for is_summed, gradients in on_ranks(2, gradients_of_parts, tmp_path):
        assert not is_summed
        for ours, theirs in zip(gradients, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-6)


def test_rows_are_dealt_evenly():
    items = [[TokenizedExample((1,) * size, (1,))] for size in (3, 70, 30, 60, 20, 50, 10)]
    assert deal(items, 1) == [[0, 1, 2, 3, 4, 5, 6]]
    assert deal(items, 2) == [[1, 2, 4], [3, 5, 6, 0]]
    assert deal(items[:2], 4) == [[1], [0], [], []]


class Stopped(Exception):
    """A training that is stopped in the middle."""


class StoppingState(TrainingState):
    """One that saves after every step, and raises Stopped when it has saved after one of them."""

    def __init__(self, path: Path, stop_after: int | None):
        super().__init__(path, minutes=0)
        self.stop_after = stop_after

    def after_step(self, step, model, optimizer, log_path):
        super().after_step(step, model, optimizer, log_path)
        if step + 1 == self.stop_after:
            self._end_save()
            raise Stopped


def train_in_part(
    directory: Path, out: Path, stop_after: int | None, precise: bool, has_adapters: bool = False
) -> None:
    """SFT with dropout 0 that saves after every step, and stops after one of them."""
    model = load(directory, has_adapters)
    model = model.double() if precise else model
    state = StoppingState(out / "state.safetensors", stop_after)
    settings = SFTSettings(epochs=2, examples_per_step=4, schedule=SCHEDULE, dropout=0.0, micro_batch_tokens=90)
    log = out / "log.jsonl" if rank() == 0 else None
    try:
        train_sft(model, examples(10), settings, log_path=log, state=state)
    except Stopped:
        return
    weights = {name: whole(weight.detach()) for name, weight in model.named_parameters()}
    if rank() == 0:
        save_file(weights, out / "result.safetensors")


@pytest.mark.parametrize(
    ("before", "after", "has_adapters"),
    [
        (1, 2, False),
        (2, 1, False),
        *(pytest.param(2, n, False, marks=pytest.mark.slow) for n in (2, 3)),
        *(pytest.param(before, after, True, marks=pytest.mark.slow) for before, after in ((1, 2), (2, 1), (2, 3))),
    ],
)
def test_a_training_is_taken_up_by_any_number_of_processes(tmp_path, before, after, has_adapters):
    directory = tmp_path / "model"
    save_model(MODELS["llama"](), directory, [])
    for name in ("undisturbed", "stopped"):
        (tmp_path / name).mkdir()
    on_processes(after, train_in_part, [(directory, tmp_path / "undisturbed", None, True, has_adapters)])
    on_processes(before, train_in_part, [(directory, tmp_path / "stopped", 3, True, has_adapters)])
    assert len([*tmp_path.glob("stopped/state*")]) == 1
    on_processes(after, train_in_part, [(directory, tmp_path / "stopped", None, True, has_adapters)])
    one, other = (load_file(tmp_path / name / "result.safetensors") for name in ("undisturbed", "stopped"))
    for name in one:
        rounding = 0 if before == after else 1e-9
        torch.testing.assert_close(other[name], one[name], rtol=rounding, atol=rounding, msg=name)
    logs = [[*read_log(tmp_path / name / "log.jsonl")] for name in ("undisturbed", "stopped")]
    assert [step["step"] for step in logs[1]] == [*range(6)]
    assert [step["loss"] for step in logs[0]] == pytest.approx([step["loss"] for step in logs[1]], rel=1e-6)
