"""The cache against lists of vectors, and cached decoding against the full forward, rows coming and going at will."""

import random

import pytest
import torch
from llama_oracle import LLAMA_SHAPES, random_llama
from t5_oracle import SHAPES, random_t5

from minidpost.models import t5
from minidpost.models.kvcache import KVCache, SharedPromptCache
from minidpost.models.layers import Linear, RMSNorm, attention, mask_bias
from minidpost.models.t5 import T5

N_LAYERS, ROWS, N_HEADS, MAX_TOKENS, D_HEAD = 2, 5, 3, 12, 4


def kv_cache(n_layers: int, n_rows: int, n_heads: int, max_tokens: int, d_head: int, dtype: torch.dtype) -> KVCache:
    return KVCache(
        n_layers=n_layers,
        n_rows=n_rows,
        n_heads=n_heads,
        max_tokens=max_tokens,
        d_head=d_head,
        dtype=dtype,
        device="cpu",
    )


def test_random_use_equals_lists_of_vectors():
    """Steps, restarts and copies in random order: every row holds what was written to it, and nothing else."""
    choose = random.Random(0)
    generator = torch.Generator().manual_seed(0)
    cache = kv_cache(N_LAYERS, ROWS, N_HEADS, MAX_TOKENS, D_HEAD, torch.float32)
    expected: list[list[torch.Tensor]] = [[] for _ in range(ROWS)]  # of each row: (2, L, H, K) a token
    n_copies = n_steps = 0
    for _ in range(400):
        n_rows = choose.randint(1, ROWS)
        action = choose.choice(["step", "step", "step", "restart", "copy"])
        if action == "restart":
            row_ids = choose.sample(range(ROWS), n_rows)
            cache.set_lengths(row_ids, [0] * n_rows)
            for row in row_ids:
                expected[row] = []
        elif action == "copy":
            sources = [choose.randrange(ROWS) for _ in range(n_rows)]
            targets = choose.sample(range(ROWS), n_rows)
            cache.copy_rows(sources, targets)
            copied = [list(expected[source]) for source in sources]
            for target, tokens in zip(targets, copied, strict=True):
                expected[target] = tokens
            n_copies += 1
        elif max(len(tokens) for tokens in expected[:n_rows]) < MAX_TOKENS:
            new = torch.randn(2, N_LAYERS, n_rows, 1, N_HEADS, D_HEAD, generator=generator)
            for row in range(n_rows):
                expected[row].append(new[:, :, row, 0])
            longest = max(len(tokens) for tokens in expected[:n_rows])
            plan = cache.plan(n_rows)
            for layer in range(N_LAYERS):
                for used_BGSK in cache.append(layer, plan, new[0, layer], new[1, layer]):
                    assert used_BGSK.shape == (n_rows, N_HEADS, longest, D_HEAD)
            cache.advance(n_rows)
            assert cache.longest(n_rows) == longest
            n_steps += 1
        lengths = [len(tokens) for tokens in expected]
        assert cache.length_B.tolist() == cache.lengths.tolist() == lengths
        for row, tokens in enumerate(expected):
            for position, token in enumerate(tokens):
                assert torch.equal(cache.keys_LBGSK[:, row, :, position], token[0])
                assert torch.equal(cache.values_LBGSK[:, row, :, position], token[1])
    assert n_copies > 50 and n_steps > 100


def test_append_gives_what_it_wrote():
    cache = kv_cache(1, 3, 2, 4, 5, torch.float64)
    cache.set_lengths([1], [2])
    k_B1GK, v_B1GK = torch.randn(2, 2, 1, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys_BGSK, values_BGSK = cache.append(0, cache.plan(2), k_B1GK, v_B1GK)
    for used_BGSK, new_B1GK in ((keys_BGSK, k_B1GK), (values_BGSK, v_B1GK)):
        assert used_BGSK.shape == (2, 2, 3, 5)
        assert torch.equal(used_BGSK[0, :, 0], new_B1GK[0, 0])
        assert torch.equal(used_BGSK[1, :, 2], new_B1GK[1, 0])
    assert cache.lengths.tolist() == [0, 2, 0]  # not before advance


def test_prompts_padded_as_on_a_gpu_give_the_same_logits(monkeypatch):
    """To a multiple of 8, or to the cache's end; on a CPU not at all."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [t5.padded_length(n, 20, gpu) for n in (1, 8, 9, 17)] == [8, 8, 16, 20]
    assert t5.padded_length(9, 20, cpu) == 9
    model = fp64_model("gated-untied")
    caches = [model.new_cache(2, 20, 4) for _ in range(2)]
    prompts = [[5, 6, 7, 8, 9, 3, 4, 2, 5, 5], [3, 4]]
    model.prefill(caches[0], range(2), prompts)
    padded_length = t5.padded_length
    monkeypatch.setattr(t5, "padded_length", lambda longest, room, device: padded_length(longest, room, gpu))
    model.prefill(caches[1], range(2), prompts)
    assert caches[0].prompt.store.lengths.tolist() == caches[1].prompt.store.lengths.tolist()
    for _ in range(3):
        plain_BV, padded_BV = (model.decode(cache, torch.tensor([2, 3])) for cache in caches)
        torch.testing.assert_close(padded_BV, plain_BV, rtol=0, atol=1e-12)


class Script:
    """One sequence: a prompt, the tokens to be fed, and the logits that the full forward gives for them."""

    def __init__(self, model: T5, n_prompt: int, n_tokens: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        self.prompt = torch.randint(2, model.config.vocab_size, (n_prompt,), generator=generator).tolist()
        random_ids = torch.randint(2, model.config.vocab_size, (n_tokens - 1,), generator=generator).tolist()
        self.tokens = [model.config.start_id, *random_ids]
        source_1S = torch.tensor([self.prompt])
        with torch.no_grad():
            self.logits_TV = model(
                source_1S, torch.ones_like(source_1S, dtype=torch.bool), torch.tensor([self.tokens])
            )[0]


def fp64_model(shape: str) -> T5:
    return random_t5(SHAPES[shape]).double()


def play(model: T5, cache, rows: list[tuple[Script, int] | None]) -> list[tuple[Script, int] | None]:
    """One decoding step of rows that stand at (script, position) or idle (None); compares, and gives the next ones."""
    ids = [7 if row is None else row[0].tokens[row[1]] for row in rows]
    logits_BV = model.decode(cache, torch.tensor(ids))
    assert logits_BV.shape == (len(rows), model.config.vocab_size)
    for index, row in enumerate(rows):
        if row is not None:
            script, position = row
            torch.testing.assert_close(
                logits_BV[index],
                script.logits_TV[position],
                rtol=1e-10,
                atol=1e-10,
                msg=lambda m, i=index: f"row {i}: {m}",
            )
    return [None if row is None or row[1] + 1 == len(row[0].tokens) else (row[0], row[1] + 1) for row in rows]


def start(model: T5, cache, scripts: dict[int, Script]) -> None:
    first_ids = model.prefill(cache, list(scripts), [script.prompt for script in scripts.values()])
    assert first_ids == [model.config.start_id] * len(scripts)


@pytest.mark.parametrize("shape", SHAPES)
def test_ragged_rows_equal_the_full_forward(shape):
    model = fp64_model(shape)
    scripts = {row: Script(model, n_prompt, 20, seed=row) for row, n_prompt in enumerate([1, 9, 40, 3])}
    cache = model.new_cache(4, max_prompt=40, max_new=20)
    start(model, cache, scripts)
    rows = [(script, 0) for script in scripts.values()]
    for _ in range(20):
        rows = play(model, cache, rows)
    assert rows == [None] * 4


def test_positions_beyond_all_buckets():
    model = fp64_model("gated-untied")
    script = Script(model, 150, 145, seed=0)
    cache = model.new_cache(1, max_prompt=150, max_new=145)
    start(model, cache, {0: script})
    rows = [(script, 0)]
    for _ in range(145):
        rows = play(model, cache, rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_replaced_at_any_step(shape):
    """Three slots, refilled as soon as a row ends, ten sequences: shorter ones follow longer ones and the reverse."""
    model = fp64_model(shape)
    lengths = [(30, 14), (2, 3), (11, 6), (1, 1), (30, 2), (4, 14), (17, 5), (3, 9), (25, 1), (2, 13)]
    waiting = [Script(model, n_prompt, n_tokens, seed) for seed, (n_prompt, n_tokens) in enumerate(lengths)]
    cache = model.new_cache(3, max_prompt=30, max_new=24)
    rows: list = [None] * 3
    n_steps = 0
    while waiting or any(rows):
        free = [row for row in range(3) if rows[row] is None][: len(waiting)]
        if free:
            scripts = {row: waiting.pop(0) for row in reversed(free)}  # rows in any order
            start(model, cache, scripts)
            for row, script in scripts.items():
                rows[row] = (script, 0)
        rows = play(model, cache, rows)
        n_steps += 1
    assert n_steps < sum(n_tokens for _, n_tokens in lengths)


def test_copied_rows_go_their_own_ways():
    """A row copied before its first token (one prefill for many samples), and one copied in the middle of its text."""
    model = fp64_model("gated-untied")
    scripts = [Script(model, 13, 9, seed) for seed in range(3)]
    scripts[1].prompt = scripts[2].prompt = scripts[0].prompt
    scripts[2].tokens[:4] = scripts[0].tokens[:4]
    source_3S = torch.tensor([script.prompt for script in scripts])
    with torch.no_grad():
        logits_BTV = model(
            source_3S, torch.ones_like(source_3S, dtype=torch.bool), torch.tensor([script.tokens for script in scripts])
        )
    for script, logits_TV in zip(scripts, logits_BTV, strict=True):
        script.logits_TV = logits_TV
    longer = Script(model, 20, 9, seed=9)
    cache = model.new_cache(4, max_prompt=20, max_new=9)
    start(model, cache, {3: scripts[0], 0: longer, 1: longer, 2: longer})
    cache.copy_rows([3, 3], [0, 2])
    rows = [(scripts[0], 0), (longer, 0), (scripts[1], 0), (scripts[0], 0)]
    for _ in range(4):
        rows = play(model, cache, rows)
    cache.copy_rows([0], [1])
    rows[1] = (scripts[2], 4)
    while any(rows):
        rows = play(model, cache, rows)


def test_only_the_first_rows_of_a_cache_move():
    model = fp64_model("relu-tied-scaled")
    scripts = {row: Script(model, 3 + row, 6, seed=row) for row in range(4)}
    cache = model.new_cache(4, max_prompt=6, max_new=6)
    start(model, cache, scripts)
    rows = [(script, 0) for script in scripts.values()]
    for n_rows in (2, 1, 4, 3, 4):
        rows[:n_rows] = play(model, cache, rows[:n_rows])
    assert cache.own.lengths.tolist() == [5, 4, 3, 2]
    start(model, cache, {0: Script(model, 2, 6, seed=9), 1: (restarted := Script(model, 1, 6, seed=10))})
    cache.copy_rows([1], [0])  # now the rows that rest are longer than those that move
    rows[:2] = [(restarted, 0), (restarted, 0)]
    for n_rows in (1, 2, 1):
        rows[:n_rows] = play(model, cache, rows[:n_rows])


def test_logits_do_not_depend_on_row_and_neighbours():
    model = fp64_model("gated-tied")
    scripts = [Script(model, n_prompt, 5, seed=n_prompt) for n_prompt in (6, 1, 31, 12)]

    def decode(order: list[int]) -> torch.Tensor:
        cache = model.new_cache(len(order), max_prompt=31, max_new=5)
        model.prefill(cache, range(len(order)), [scripts[index].prompt for index in order])
        ids_TB = torch.tensor([scripts[index].tokens for index in order]).T
        return torch.stack([model.decode(cache, ids_B) for ids_B in ids_TB])

    together = decode([0, 1, 2, 3])
    torch.testing.assert_close(decode([2, 0, 3, 1]), together[:, [2, 0, 3, 1]], rtol=1e-12, atol=1e-12)
    for index in range(4):
        torch.testing.assert_close(decode([index]), together[:, [index]], rtol=1e-12, atol=1e-12)


def test_decoding_leaves_training_possible():
    """No tensor of inference mode remains in the model, and logits hold no history."""
    model = random_t5(SHAPES["gated-untied"])
    cache = model.new_cache(2, max_prompt=4, max_new=3)
    model.prefill(cache, [0, 1], [[5, 6, 7, 1], [9, 1]])
    assert not model.decode(cache, torch.tensor([0, 0])).requires_grad
    ids = torch.tensor([[5, 6, 1]])
    model(ids, torch.ones_like(ids, dtype=torch.bool), ids).sum().backward()
    assert all(weight.grad is not None and not weight.is_inference() for weight in model.parameters())


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_bf16_decoding_follows_its_full_forward(family):
    """Keys and position biases are fp32, as scores of bf16 keys would be rounded; values are bf16."""
    ids = torch.randint(3, 40, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, fed = ids[:12], ids[12:]
    if family == "t5":
        model = random_t5(SHAPES["gated-untied"]).bfloat16()
        source_1S = torch.tensor([prompt])
        fed = [model.config.start_id, *fed]
        inputs = (source_1S, torch.ones_like(source_1S, dtype=torch.bool), torch.tensor([fed]))
    else:
        model = random_llama(LLAMA_SHAPES["grouped"]).bfloat16()
        fed = [prompt[-1], *fed]
        inputs = (torch.tensor([ids]),)
    with torch.no_grad():
        expected_TV = model(*inputs)[0, -len(fed) :].float()
    cache = model.new_cache(1, max_prompt=12, max_new=10)
    for part in [cache] if isinstance(cache, KVCache) else [cache.own, cache.prompt.store]:
        assert (part.keys_LBGSK.dtype, part.values_LBGSK.dtype) == (torch.float32, torch.bfloat16)
    assert model.prefill(cache, [0], [prompt]) == fed[:1]
    for token, expected_V in zip(fed, expected_TV, strict=True):
        logits_1V = model.decode(cache, torch.tensor([token]))
        assert logits_1V.dtype == torch.bfloat16
        assert (logits_1V[0].float() - expected_V).abs().max() < 0.05 * expected_TV.abs().max()


def test_rows_and_prompts_stand_in_a_table():
    """The worked example of `SharedPromptCache._arrange`: rows 0 1 2 3 continue the prompts a b a a."""
    prompts = SharedPromptCache(kv_cache(1, 6, 1, 5, 2, torch.float32))
    prompts.begin([4, 5], [3, 5])
    prompts.copy_rows([4, 5, 4, 4], [0, 1, 2, 3])
    plan = prompts.plan(4)
    assert plan.table_QR.tolist() == [[0, 2, 3], [1, 0, 0]]
    assert plan.cell_of_row_B.tolist() == [0, 3, 1, 2]
    assert (plan.bias_Q11S == 0).sum(-1).flatten().tolist() == plan.length_Q.tolist() == [3, 5]
    assert prompts.plan(4) is plan
    prompts.copy_rows([5], [2])
    assert prompts.plan(4).table_QR.tolist() == [[0, 3], [1, 2]]


def test_prompts_are_stored_once_and_in_front():
    """Slots are shared by the rows of a prompt, come free with the last of them, and are moved to the front."""
    model = fp64_model("gated-untied")
    cache = model.new_cache(24, max_prompt=6, max_new=9)
    model.prefill(cache, range(16, 24), [[5 + row, 6, 1] for row in range(8)])
    for row in range(16):
        cache.copy_rows([16 + row % 8], [row])  # two samples of each of eight prompts
    ids_B = torch.full((16,), 7)
    together_BV = model.decode(cache, ids_B)
    assert cache.prompt.plan(16).table_QR.shape == (8, 2)
    alone = model.new_cache(8, max_prompt=6, max_new=9)
    model.prefill(alone, range(8), [[5 + row, 6, 1] for row in range(8)])
    alone_BV = model.decode(alone, ids_B[:8])
    torch.testing.assert_close(together_BV, torch.cat([alone_BV, alone_BV]), rtol=1e-12, atol=1e-12)
    model.prefill(cache, range(16, 24), [[30 + row, 6, 9, 1] for row in range(8)])
    for row in range(8):
        cache.copy_rows([16 + row], [row])
    model.decode(cache, torch.full((8,), 7))
    plan = cache.prompt.plan(8)
    assert plan.table_QR.shape == (8, 1), "the prompts that are read are not in front"
    assert plan.bias_Q11S.shape == (8, 1, 1, 4)
    torch.testing.assert_close(model.decode(cache, ids_B), decode_again(model, cache, ids_B), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_cleared_cache_is_as_good_as_new(family):
    """To the bit, in spite of what its memory holds."""
    model = random_t5(SHAPES["gated-untied"]) if family == "t5" else random_llama(LLAMA_SHAPES["grouped"])
    used, fresh = (model.new_cache(12, max_prompt=6, max_new=5) for _ in range(2))
    model.prefill(used, range(8, 12), [[7, 8, 9, 5, row + 2, 1] for row in range(4)])
    for row in range(8):
        used.copy_rows([8 + row * 7 % 4], [row])
    for _ in range(5):
        model.decode(used, torch.full((8,), 3))
    used.clear()
    for cache in (used, fresh):
        model.prefill(cache, range(8, 11), [[5, row + 2, 1] for row in range(3)])
        for row in range(8):
            cache.copy_rows([8 + row % 3], [row])
    for _ in range(5):
        assert torch.equal(model.decode(used, torch.full((8,), 4)), model.decode(fresh, torch.full((8,), 4)))


@torch.inference_mode()
def decode_again(model: T5, cache, ids_B: torch.Tensor) -> torch.Tensor:
    """The last step of a cache, once more, with every row's prompt in a slot of its own."""
    n_rows = len(ids_B)
    fresh = model.new_cache(n_rows, max_prompt=6, max_new=9)
    slots = cache.prompt.prompt_slot_of_row_B[:n_rows].tolist()
    for ours, theirs in ((fresh.prompt.store, cache.prompt.store), (fresh.own, cache.own)):
        source_ids = slots if ours is fresh.prompt.store else list(range(n_rows))
        ours.keys_LBGSK[:] = theirs.keys_LBGSK[:, source_ids]
        ours.values_LBGSK[:] = theirs.values_LBGSK[:, source_ids]
        ours.set_lengths(range(n_rows), theirs.lengths[source_ids].tolist())
    fresh.own.set_lengths(range(n_rows), (cache.own.lengths[:n_rows] - 1).tolist())
    return model.decode(fresh, ids_B)


@pytest.mark.parametrize("shape", [(3, 512), (3, 1, 512), (200, 512)])
def test_linear_of_few_rows_equals_torch(shape):
    torch.manual_seed(0)
    layer = Linear(512, 300, bias=True)
    x = torch.randn(shape, requires_grad=True)
    expected = torch.nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
def test_rms_norm_equals_torch(dtype, scale):
    """Of zeros and of numbers near epsilon too."""
    torch.manual_seed(0)
    norm = RMSNorm(96, 1e-6, dtype=dtype)
    torch.nn.init.normal_(norm.weight)
    x = (scale * torch.randn(5, 3, 96)).to(dtype).requires_grad_()
    expected = torch.nn.functional.rms_norm(x, (96,), norm.weight, 1e-6)
    assert torch.equal(norm(x), expected)
    with torch.inference_mode():
        tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0}[dtype]
        torch.testing.assert_close(norm(x), expected, rtol=tolerance, atol=tolerance)


def test_attention_of_few_queries_equals_torch():
    torch.manual_seed(0)
    q_BGRK, (k_BGSK, v_BGSK) = torch.randn(3, 2, 4, 8), torch.randn(2, 3, 2, 11, 8)
    length_B = torch.tensor([1, 11, 5])
    bias_B11S = mask_bias(torch.arange(11) < length_B[:, None], torch.float32)
    expected = torch.nn.functional.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSK, bias_B11S)
    ours = attention(q_BGRK, k_BGSK, v_BGSK, bias_B11S, length_B, 8**-0.5)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
