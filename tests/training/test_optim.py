"""The schedule's values, what decays, what is clipped, derived seeds, speed, and the log of steps."""

import json
import math

import pytest
import torch
from torch import nn

from minidpost.models.t5 import T5, T5Config
from minidpost.precision import autocast
from minidpost.training import optim
from minidpost.training.optim import (
    Schedule,
    StepLog,
    adamw,
    apply_step,
    derived_seed,
    read_log,
    tokens_per_second,
)


def tiny() -> T5:
    torch.manual_seed(0)
    return T5(T5Config(20, 8, 4, 12, 2, 1, 1)).initialise()


def test_schedule_warms_up_then_follows_a_cosine_to_its_floor():
    schedule, n_steps = Schedule(3e-4, warmup=0.1, floor=0.1), 150
    rates = [schedule.at(step, n_steps) for step in range(n_steps)]
    assert rates[:3] == pytest.approx([3e-4 / 15, 2 * 3e-4 / 15, 3 * 3e-4 / 15], rel=1e-12)
    assert rates[14] == pytest.approx(3e-4, rel=1e-12)  # the end of the warm-up
    assert rates[15] == pytest.approx(3e-4, rel=1e-12)  # the cosine begins at its top
    halfway = 3e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * 67 / 135)) / 2)
    assert rates[82] == pytest.approx(halfway, rel=1e-12)
    last = 3e-4 * (0.1 + 0.9 * (1 + math.cos(math.pi * 134 / 135)) / 2)
    assert rates[-1] == pytest.approx(last, rel=1e-12)
    assert 3e-5 < rates[-1] < 1.002 * 3e-5
    assert rates[:15] == sorted(rates[:15])
    assert rates[15:] == sorted(rates[15:], reverse=True)


def test_schedule_at_its_edges():
    assert Schedule(1.0, warmup=0.1).at(0, 1) == 1.0
    assert Schedule(1.0, warmup=0.0).at(0, 10) == 1.0
    assert Schedule(1.0, warmup=1.0).at(9, 10) == 1.0
    assert Schedule(1.0, warmup=0.15).at(0, 10) == 0.5  # one step and a half are two
    assert Schedule(1.0, warmup=0.01).at(0, 10) == 1.0  # a fraction of a step is one step
    assert Schedule(1.0, warmup=0.0, floor=0.0).at(5, 10) == pytest.approx(0.5)


def test_what_is_frozen_is_not_optimised():
    model = tiny()
    model.requires_grad_(False)
    query = model.encoder.layers[0].attention.query.weight.requires_grad_(True)
    optimizer = adamw(model, Schedule(0.5))
    assert [weight for group in optimizer.param_groups for weight in group["params"]] == [query]
    query.grad = torch.ones_like(query)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    assert apply_step(model, optimizer, Schedule(0.5), step=0, n_steps=1)["grad_norm"] == pytest.approx(8.0)  # √64
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {"encoder.layers.0.attention.query.weight"}


def test_norms_do_not_decay_and_everything_else_does():
    model = tiny()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = adamw(model, Schedule(0.5, weight_decay=0.01))
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()  # with no gradient the decay is all that happens
    for name, weight in model.named_parameters():
        factor = 1.0 if "norm" in name else 1 - 0.5 * 0.01
        torch.testing.assert_close(weight.detach(), before[name] * factor, rtol=1e-6, atol=0)
    assert any("norm" in name for name in before)


def test_adamw_has_every_parameter_once_and_the_usual_moments():
    model = tiny()
    optimizer = adamw(model, Schedule(1e-3))
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters())
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.9, 0.999), 1e-8)}


@pytest.mark.parametrize(("norm", "applied"), [(5.0, 1.0), (0.5, 0.5)])
def test_apply_step_clips_and_reports_the_norm_before(norm, applied):
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    direction = torch.tensor([[0.6, 0.8]])
    model.weight.grad = direction * norm
    schedule = Schedule(0.25, warmup=0.5, max_grad_norm=1.0)
    update = apply_step(model, torch.optim.SGD(model.parameters(), lr=99.0), schedule, step=0, n_steps=4)
    assert update == {"lr": 0.125, "grad_norm": pytest.approx(norm, rel=1e-6)}
    torch.testing.assert_close(model.weight.detach(), before - 0.125 * applied * direction, rtol=0, atol=1e-6)
    assert model.weight.grad is None


def test_apply_step_sets_the_rate_of_all_groups():
    model = tiny()
    optimizer = adamw(model, Schedule(1.0))
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    apply_step(model, optimizer, Schedule(1.0, warmup=0.5), step=2, n_steps=10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.6, 0.6]


def test_derived_seeds_belong_to_their_names():
    names = [(seed, stage, step) for seed in (1, 2, 12) for stage in ("sft", "dpo") for step in (0, 1, 2, 10, 20)]
    seeds = [derived_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert derived_seed("ab", "c") != derived_seed("a", "bc")
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derived_seed(42, "sft", 0) == derived_seed(42, "sft", 0) == 7064932454153035806  # on every machine
    torch.manual_seed(max(seeds))  # torch takes what it gives


def test_speed_is_finite_when_the_clock_stands_still(monkeypatch):
    monkeypatch.setattr(optim.time, "perf_counter", lambda: 5.0)
    assert tokens_per_second(100, started=3.0) == 50.0
    assert math.isfinite(tokens_per_second(100, started=5.0))


def test_no_autocast_without_a_gpu():
    with autocast(torch.device("cpu")):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")


def test_step_log_is_one_object_a_line_written_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    with StepLog(path) as log:
        log.write(step=0, loss=0.123456789, n_tokens=123456789)
        assert path.read_text() == '{"step": 0, "loss": 0.1234568, "n_tokens": 123456789}\n'
        log.write(step=1, loss=3e-07)
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(read_log(path))
    assert list(read_log(path))[1] == {"step": 1, "loss": 3e-07}


def test_step_log_without_a_path_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with StepLog(None) as log:
        log.write(step=0, loss=1.0)
    assert list(tmp_path.iterdir()) == []
