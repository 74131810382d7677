"""T5 against transformers (logits, loss, every gradient), and what must hold of it by itself."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from t5_oracle import SHAPES, hf_logits, hf_twin, random_batch, random_t5
from transformers.models.t5.modeling_t5 import T5Attention

from minidpost.models.hf_config import read_config, t5_names
from minidpost.models.t5 import T5, T5Config, relative_bucket

TOLERANCE = 1e-5  # of the greatest absolute value compared


def assert_close(found: torch.Tensor, expected: torch.Tensor, what: str = "", tolerance: float = TOLERANCE) -> None:
    """No element further off than `tolerance` times the greatest expected one."""
    assert found.shape == expected.shape, what
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item()
    assert scale > 0 and difference <= tolerance * scale, f"{what}: off by {difference:.3g}, scale {scale:.3g}"


@pytest.mark.parametrize(
    ("lengths", "n_targets"),
    [([9], 7), ([12, 1, 7], 5), ([3, 150, 75], 140)],
    ids=["one row", "ragged", "beyond 128"],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape, lengths, n_targets):
    model = random_t5(SHAPES[shape])
    batch = random_batch(model.config, lengths, n_targets)
    with torch.no_grad():
        logits_BTV = model(*batch)
        assert logits_BTV.shape == (len(lengths), n_targets, model.config.vocab_size)
        assert_close(logits_BTV, hf_logits(hf_twin(model), *batch))


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_every_gradient_equal_transformers(shape):
    config = SHAPES[shape]
    model = random_t5(config).train()  # dropout is 0 in these shapes
    twin = hf_twin(model).train()
    source_BS, mask_BS, labels_BT = random_batch(config, [11, 4, 140], 8)
    labels_BT[:, 0] = 5
    labels_BT[0, 6:], labels_BT[1, 2:] = -100, -100
    target_BT = torch.cat([torch.full((3, 1), config.start_id), labels_BT[:, :-1]], dim=1)
    target_BT = target_BT.masked_fill(target_BT == -100, config.pad_id)

    loss = F.cross_entropy(model(source_BS, mask_BS, target_BT).flatten(0, 1), labels_BT.flatten())
    twin_loss = twin(
        input_ids=source_BS,
        attention_mask=mask_BS.long(),
        labels=labels_BT,
        decoder_attention_mask=torch.ones_like(labels_BT),
    ).loss
    assert_close(loss, twin_loss, "loss")

    loss.backward()
    twin_loss.backward()
    twin_weights = dict(twin.named_parameters())
    names = dict(t5_names(config))
    for name, weight in model.named_parameters():
        assert_close(weight.grad, twin_weights[names[name]].grad, name)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (16, 50), (8, 20)])
def test_buckets_equal_transformers(bidirectional, n_buckets, max_distance):
    offset = torch.arange(-600, 601)
    expected = T5Attention._relative_position_bucket(offset, bidirectional, n_buckets, max_distance)
    found = relative_bucket(offset, bidirectional, n_buckets, max_distance)
    assert torch.equal(found, expected)
    assert set(found.tolist()) == set(range(n_buckets)) - ({n_buckets // 2} if bidirectional else set())


@pytest.mark.parametrize("shape", SHAPES)
def test_padded_row_equals_the_row_alone(shape):
    model = random_t5(SHAPES[shape]).double()
    lengths, n_targets = [5, 140, 1, 17], [3, 9, 6, 1]
    source_BS, mask_BS, target_BT = random_batch(model.config, lengths, max(n_targets))
    with torch.no_grad():
        logits_BTV = model(source_BS, mask_BS, target_BT)
        for row, (n_source, n_target) in enumerate(zip(lengths, n_targets, strict=True)):
            alone_1TV = model(
                source_BS[row : row + 1, :n_source],
                mask_BS[row : row + 1, :n_source],
                target_BT[row : row + 1, :n_target],
            )
            assert_close(logits_BTV[row, :n_target], alone_1TV[0], f"row {row}", tolerance=1e-12)


def test_padding_does_not_affect_logits():
    model = random_t5(SHAPES["gated-untied"])
    source_BS, mask_BS, target_BT = random_batch(model.config, [6, 2], 5)
    other_BS = torch.where(mask_BS, source_BS, 77)
    changed_BT = target_BT.clone()
    changed_BT[:, 3:] = 44
    with torch.no_grad():
        logits_BTV = model(source_BS, mask_BS, target_BT)
        assert torch.equal(model(other_BS, mask_BS, target_BT), logits_BTV)
        changed_BTV = model(source_BS, mask_BS, changed_BT)
        assert_close(changed_BTV[:, :3], logits_BTV[:, :3], "positions before the change")
        assert (changed_BTV[:, 3:] - logits_BTV[:, 3:]).abs().max() > 0.01


def test_dropout_only_in_training():
    model = random_t5(replace(SHAPES["gated-untied"], dropout=0.1))
    batch = random_batch(model.config, [6, 9], 5)
    with torch.no_grad():
        quiet_BTV = model(*batch)
        assert torch.equal(model(*batch), quiet_BTV)
        model.train()
        torch.manual_seed(3)
        noisy_BTV = model(*batch)
        assert (noisy_BTV - quiet_BTV).abs().max() > 0.01
        assert not torch.equal(model(*batch), noisy_BTV)
        torch.manual_seed(3)
        assert torch.equal(model(*batch), noisy_BTV)
        assert torch.equal(model.eval()(*batch), quiet_BTV)


def test_dropout_may_be_set_beside_the_config():
    batch = random_batch(SHAPES["gated-untied"], [6, 9], 5)
    results = []
    for from_config, afterwards in ((0.3, None), (0.0, 0.3), (0.3, 0.0), (0.0, None)):
        model = random_t5(replace(SHAPES["gated-untied"], dropout=from_config)).train()
        model.dropout = model.dropout if afterwards is None else afterwards
        torch.manual_seed(3)
        results.append(model(*batch))
        assert model.config.dropout == from_config
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[2], results[3])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_dropout_is_where_transformers_has_it(shape, dropped):
    """Both drop the same shapes equally often: embeddings, attention weights, feed-forward, residuals, the end."""
    model = random_t5(replace(SHAPES[shape], dropout=0.2)).train()
    twin = hf_twin(model).train()
    batch = random_batch(model.config, [6, 9], 5)
    model(*batch)
    ours = sorted(dropped)
    dropped.clear()
    hf_logits(twin, *batch)
    assert ours == sorted(dropped)
    assert len(ours) == 4 + 4 * model.config.n_encoder_layers + 6 * model.config.n_decoder_layers


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_fp32(shape):
    model = random_t5(SHAPES[shape])
    batch = random_batch(model.config, [6, 30, 2], 9)
    with torch.no_grad():
        expected_BTV = model(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(model(*batch).float(), expected_BTV, "autocast", tolerance=0.1)
        logits_BTV = model.bfloat16()(*batch)
    assert logits_BTV.dtype == torch.bfloat16
    assert_close(logits_BTV.float(), expected_BTV, "bf16 weights", tolerance=0.1)


def test_autocast_trains_fp32_weights():
    model = random_t5(SHAPES["gated-untied"]).train()
    batch = random_batch(model.config, [6, 30, 2], 9)
    labels_BT = torch.randint(model.config.vocab_size, (3, 9), generator=torch.Generator().manual_seed(2))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        F.cross_entropy(model(*batch).float().flatten(0, 1), labels_BT.flatten()).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    exact = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = gradients()
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.float32
        assert F.cosine_similarity(rounded[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


def test_initialise_belongs_to_the_seed():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return T5(SHAPES["gated-untied"]).initialise().state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("norm" in name) for name in first)


def test_initialise_has_the_published_deviations():
    config = T5Config(503, 128, 16, 192, 6, n_encoder_layers=1, n_decoder_layers=1)
    torch.manual_seed(0)
    expected = {"query": (128 * 16) ** -0.5, "key": 128**-0.5, "value": 128**-0.5, "output": (6 * 16) ** -0.5}
    expected |= {"gate": 128**-0.5, "up": 128**-0.5, "down": 192**-0.5, "head": 128**-0.5, "embedding": 1.0}
    expected |= {"relative_bias": 128**-0.5}
    for name, weight in T5(config).initialise().named_parameters():
        kind = name.split(".")[-2]
        if "norm" in kind:
            assert torch.equal(weight, torch.ones_like(weight)), name
        else:
            noise = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
            assert abs(weight.std().item() / expected[kind] - 1) < noise, name
            assert abs(weight.mean().item()) < 5 * expected[kind] / math.sqrt(weight.numel()), name


@pytest.mark.parametrize("shape", ["gated-untied", "relu-tied-scaled"])
def test_fresh_model_knows_nothing(shape):
    config = replace(SHAPES[shape], vocab_size=400, d_model=96)
    torch.manual_seed(0)
    model = T5(config).initialise().eval()
    source_BS, mask_BS, target_BT = random_batch(config, [20] * 16, 30)
    labels_BT = torch.randint(400, target_BT.shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        loss = F.cross_entropy(model(source_BS, mask_BS, target_BT).flatten(0, 1), labels_BT.flatten())
    assert math.log(400) - 0.1 < loss < math.log(400) + 1  # logits of unit variance add one half


@pytest.mark.parametrize("name", ["flan-t5-small", "flan-t5-base", "flan-t5-large", "flan-t5-xl", "t5-large"])
def test_true_shapes_have_the_published_number_of_parameters(shared, name):
    counts = json.loads((shared / "configs/parameter_counts.json").read_text())
    with torch.device("meta"):
        model = T5(read_config(shared / "configs" / name))
    assert sum(weight.numel() for weight in model.parameters()) == counts[name]
