"""Decoding against transformers, independence of rows, slots and chunks, the calculator at work in the slots."""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import ClassVar, NamedTuple

import pytest
import torch
from llama_oracle import hf_llama, left_padded, random_llama
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import load_model
from minidpost.sampling import sampler
from minidpost.sampling.sampler import Request, Row, SamplingSettings, sample
from minidpost.text.calculator import Automaton, evaluate_expression
from minidpost.text.templates import T5Template
from minidpost.text.tokenizer import load_tokenizer

START, END = 0, 1


class Written(NamedTuple):
    """What a completion is compared by."""

    token_ids: list[int]
    forced: list[bool]
    finish_reason: str


class FakeCache:
    """Of each row, its prompt and the ids it was fed."""

    def __init__(self, n_rows: int):
        self.n_rows = n_rows
        self.n_cleared = 0
        self.clear()

    def clear(self) -> None:
        self.n_cleared += 1
        self.rows: list[tuple[tuple[int, ...], list[int]]] = [((), []) for _ in range(self.n_rows)]

    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        for source, target in zip(source_ids, target_ids, strict=True):
            prompt, fed = self.rows[source]
            self.rows[target] = (prompt, list(fed))


class FakeModel:
    """A model whose logits are a function of a row's prompt and position, and which remembers what it was asked."""

    def __init__(self, logits: Callable[[tuple[int, ...], int], Tensor]):
        self.logits = logits
        self.fed: dict[tuple[int, ...], list[int]] = {}  # the ids of the last row that had this prompt
        self.shapes: list[tuple[int, int, int]] = []  # of the caches
        self.cache: FakeCache | None = None  # the latest
        self.prefills: list[list[tuple[int, ...]]] = []
        self.batches: list[int] = []

    def parameters(self):
        yield torch.zeros(())

    def decoding(self):
        return nullcontext()

    @property
    def n_chunks(self) -> int:
        """How many chunks began: each with a cache that is cleared, which a new one is by itself."""
        return self.cache.n_cleared - 1 if self.cache else 0

    def new_cache(self, n_rows: int, max_prompt: int, max_new: int) -> FakeCache:
        self.shapes.append((n_rows, max_prompt, max_new))
        self.cache = FakeCache(n_rows)
        return self.cache

    def prefill(self, cache: FakeCache, row_ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        self.prefills.append(list(prompts))
        for row, prompt in zip(row_ids, prompts, strict=True):
            cache.rows[row] = (tuple(prompt), [])
        return [START] * len(prompts)

    def decode(self, cache: FakeCache, ids_B: Tensor) -> Tensor:
        self.batches.append(len(ids_B))
        logits = []
        for (prompt, fed), token_id in zip(cache.rows, ids_B.tolist(), strict=False):
            fed.append(token_id)
            self.fed[prompt] = list(fed)
            logits.append(self.logits(prompt, len(fed) - 1))
        return torch.stack(logits)


def scripted(scripts: Sequence[Sequence[int]], vocab_size: int) -> tuple[FakeModel, list[Request]]:
    """A model that chooses the ids of script i for the prompt (i,), and the requests that ask it to."""

    def logits(prompt: tuple[int, ...], position: int) -> Tensor:
        logits_V = torch.zeros(vocab_size)
        logits_V[scripts[prompt[0]][position]] = 1.0
        return logits_V

    return FakeModel(logits), [Request((i,), str(i)) for i in range(len(scripts))]


def tiny_t5(dtype: torch.dtype = torch.float64) -> T5:
    torch.manual_seed(3)
    model = T5(T5Config(40, 16, 8, 24, 2, 2, 2)).initialise()
    with torch.no_grad():
        model.head.weight[END] *= 2  # so that rows end at many lengths
    return model.to(dtype).eval()


def tiny_llama() -> Llama:
    model = random_llama(LlamaConfig(40, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4, eos_id=END))
    with torch.no_grad():
        model.head.weight[END] *= 2
    return model.double()


def ragged_requests(n_questions: int, n_samples: int) -> list[Request]:
    numbers = random.Random(0)
    prompts = [tuple(numbers.randrange(40) for _ in range(numbers.randint(1, 25))) for _ in range(n_questions)]
    return [Request(prompt, f"q{i}", k) for i, prompt in enumerate(prompts) for k in range(n_samples)]


def in_order(rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.request_index)


def completions(model, requests, settings, new_override=None) -> list[Written]:
    """The completions in the order of the requests, each of which came exactly once."""
    rows = in_order(sample(model, requests, settings, END, new_override=new_override))
    assert [row.request_index for row in rows] == list(range(len(requests)))
    assert all(row.request is request for row, request in zip(rows, requests, strict=True))
    return [Written(row.token_ids, row.forced, row.finish_reason) for row in rows]


# Against transformers


def test_greedy_completions_equal_transformers_generate(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=97,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_heads=3,
        num_layers=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=START,
        tie_word_embeddings=False,
    )
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.lm_head.weight = nn.Parameter(torch.empty(97, 32))  # transformers 5 ties it whatever the config says
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=1.0 if "shared" in name or "bias" in name else weight.shape[1] ** -0.5)
        theirs.lm_head.weight *= 2
        theirs.lm_head.weight[END] *= 2  # so that rows end at many lengths
    theirs.save_pretrained(tmp_path)

    numbers = random.Random(0)
    prompts = [tuple(numbers.randrange(2, 97) for _ in range(numbers.randint(1, 50))) for _ in range(200)]
    longest = max(map(len, prompts))
    source_BS = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts])
    mask_BS = torch.tensor([[1] * len(prompt) + [0] * (longest - len(prompt)) for prompt in prompts])
    generated = theirs.generate(source_BS, attention_mask=mask_BS, max_new_tokens=40, do_sample=False, num_beams=1)
    expected = [row[: row.index(END) + 1] if END in row else row for row in generated[:, 1:].tolist()]
    lengths = Counter(map(len, expected))
    assert len(lengths) > 15, "the random model should end its rows at many lengths"
    assert 20 < sum(row[-1] != END for row in expected) < 150, "and leave some to the limit"

    settings = SamplingSettings(max_new_tokens=40, slots=24)
    ours = completions(load_model(tmp_path), [Request(prompt, str(i)) for i, prompt in enumerate(prompts)], settings)
    assert [completion.token_ids for completion in ours] == expected
    assert [completion.finish_reason == "stop" for completion in ours] == [row[-1] == END for row in expected]


def test_greedy_completions_of_llama_equal_transformers_generate():
    config = LlamaConfig(97, 32, 48, 2, n_heads=4, n_kv_heads=2, d_head=8, bos_id=0, eos_id=END)
    model = random_llama(config)
    with torch.no_grad():
        model.head.weight *= 3
        model.head.weight[END] *= 2  # so that rows end at many lengths
    numbers = random.Random(0)
    prompts = [tuple(numbers.randrange(2, 97) for _ in range(numbers.randint(1, 50))) for _ in range(200)]
    ids_BT, mask_BT = left_padded(prompts)
    generated = hf_llama(model).generate(
        ids_BT, attention_mask=mask_BT.long(), max_new_tokens=40, do_sample=False, num_beams=1, pad_token_id=0
    )
    rows = generated[:, ids_BT.shape[1] :].tolist()
    expected = [row[: row.index(END) + 1] if END in row else row for row in rows]
    assert len(Counter(map(len, expected))) > 15, "the random model should end its rows at many lengths"
    assert 20 < sum(row[-1] != END for row in expected) < 150, "and leave some to the limit"
    requests = [Request(prompt, str(i)) for i, prompt in enumerate(prompts)]
    ours = completions(model, requests, SamplingSettings(max_new_tokens=40, slots=24))
    assert [completion.token_ids for completion in ours] == expected


# A row's completion is its own


SETTINGS_SAMPLED = [
    SamplingSettings(temperature=0.7, max_new_tokens=16),
    SamplingSettings(temperature=0.7, top_k=5, max_new_tokens=16),
    SamplingSettings(temperature=0.7, top_p=0.8, max_new_tokens=16),
    SamplingSettings(temperature=1.3, top_k=20, top_p=0.9, max_new_tokens=16),
]


@pytest.mark.parametrize("settings", SETTINGS_SAMPLED, ids=["plain", "top-k", "top-p", "both"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_completion_is_its_rows_own(family, settings, monkeypatch):
    model, requests = tiny_t5() if family == "t5" else tiny_llama(), ragged_requests(10, 3)
    reference = completions(model, requests, replace(settings, slots=64))
    assert len({len(completion.token_ids) for completion in reference}) > 5
    assert len({tuple(completion.token_ids) for completion in reference}) > 20
    for slots in (1, 3):
        assert completions(model, requests, replace(settings, slots=slots)) == reference
    order = random.Random(1).sample(range(len(requests)), len(requests))
    for numbers in (order, order[:7]):  # shuffled, so that samples of a question are torn apart; and a few alone
        shuffled = completions(model, [requests[i] for i in numbers], replace(settings, slots=3))
        assert shuffled == [reference[i] for i in numbers]
    monkeypatch.setattr(sampler, "CHUNK", 10)
    monkeypatch.setattr(sampler, "PREFILL_BATCH", 2)
    assert completions(model, requests, replace(settings, slots=4)) == reference


def test_greedy_completions_equal_a_step_by_step_argmax():
    model, requests = tiny_t5(), ragged_requests(8, 1)
    for request, completion in zip(
        requests, completions(model, requests, SamplingSettings(max_new_tokens=30, slots=3)), strict=True
    ):
        source_1S, ids = torch.tensor([request.prompt_ids]), [START]
        while ids[-1] != END and len(ids) <= 30:
            logits_1TV = model(source_1S, torch.ones_like(source_1S, dtype=torch.bool), torch.tensor([ids]))
            ids.append(logits_1TV[0, -1].argmax().item())
        assert completion.token_ids == ids[1:]


def test_tokens_depend_on_seed_question_and_sample_alone():
    """With logits that never change, a completion shows its row's uniform numbers."""
    model = FakeModel(lambda prompt, position: torch.arange(20.0) / 10)
    settings = SamplingSettings(temperature=1.0, max_new_tokens=30, slots=2)

    def chosen(prompt, question, sample_index, **changes):
        request = Request(prompt, question, sample_index)
        never = 99  # an end id out of reach, so that all tokens show
        (row,) = sample(model, [request], replace(settings, **changes), never)
        return row.token_ids

    reference = chosen((5,), "a", 0)
    assert chosen((7, 8, 9), "a", 0) == reference
    assert chosen((5,), "a", 0, max_new_tokens=12) == reference[:12]
    others = [chosen((5,), "b", 0), chosen((5,), "a", 1), chosen((5,), "a", 0, seed=43), chosen((5,), "a", 10)]
    assert len({tuple(ids) for ids in [reference, *others]}) == 5


# Slots, chunks and prefills


@pytest.mark.parametrize("n_requests", [1, 4, 5, 23, 40])
def test_every_request_is_yielded_once(n_requests, monkeypatch):
    monkeypatch.setattr(sampler, "CHUNK", 10)
    monkeypatch.setattr(sampler, "PREFILL_BATCH", 3)
    scripts = [[*[2 + i % 5] * (i * 7 % 9), END] for i in range(n_requests)]
    model, requests = scripted(scripts, 8)
    assert [c.token_ids for c in completions(model, requests, SamplingSettings(max_new_tokens=20, slots=4))] == scripts
    n_chunks = -(-n_requests // 10)
    assert model.n_chunks == n_chunks
    assert len(model.shapes) == 1  # one cache serves all chunks
    assert sum(model.batches) == sum(map(len, scripts))  # a row is decoded once for each of its tokens and never again


def test_no_requests_no_work():
    model, requests = scripted([], 3)
    assert list(sample(model, requests, SamplingSettings(), END)) == []
    assert not model.shapes


def test_chunks_begin_with_empty_slots(monkeypatch):
    monkeypatch.setattr(sampler, "CHUNK", 6)
    model, requests = tiny_t5(torch.float32), ragged_requests(8, 2)
    settings = SamplingSettings(temperature=0.7, max_new_tokens=15, slots=4)
    expected = completions(model, requests, settings)
    parts = (requests[:6], requests[6:12], requests[12:])
    assert [completion for part in parts for completion in completions(model, part, settings)] == expected
    fake, requests = scripted([[END]] * 14, 3)
    chunks_when_yielded = [fake.n_chunks for _ in sample(fake, requests, SamplingSettings(slots=4), END)]
    assert chunks_when_yielded == [1] * 6 + [2] * 6 + [3] * 2


def test_a_slot_is_refilled_as_soon_as_its_row_ends():
    scripts = [[2] * 8 + [END], [2, END], [2, 2, END], [END], [2, END]]
    model, requests = scripted(scripts, 3)
    rows = list(sample(model, requests, SamplingSettings(max_new_tokens=20, slots=2), END))
    assert model.batches == [2] * 8 + [1]  # nine tokens beside 2 + 3 + 1 + 2
    assert [row.request_index for row in rows] == [1, 2, 3, 4, 0]


def test_completions_come_as_they_finish():
    scripts = [[2] * 30 + [END], [2, END]]
    model, requests = scripted(scripts, 3)
    stream = sample(model, requests, SamplingSettings(max_new_tokens=40, slots=2), END)
    assert next(stream).request_index == 1
    assert len(model.batches) == 2
    assert next(stream).request_index == 0


def test_samples_of_one_question_share_one_encoder_pass(monkeypatch):
    """Also where they outnumber the slots, and where fewer prompts are prefilled together than there are."""
    monkeypatch.setattr(sampler, "PREFILL_BATCH", 2)
    model, requests = tiny_t5(), ragged_requests(5, 9)
    reference = completions(model, requests, SamplingSettings(temperature=0.7, max_new_tokens=12))
    encoded_rows = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda ids, mask: encoded_rows.append(len(ids)) or encode(ids, mask))
    settings = SamplingSettings(temperature=0.7, max_new_tokens=12, slots=4)
    assert completions(model, requests, settings) == reference
    assert encoded_rows == [2, 2, 1]
    assert len({tuple(c.token_ids) for c in reference[:9]}) > 5  # and are samples nevertheless


def test_longest_prompts_first_and_no_larger_cache_than_needed(monkeypatch):
    monkeypatch.setattr(sampler, "PREFILL_BATCH", 3)
    model = FakeModel(lambda prompt, position: torch.eye(3)[END])
    prompts = [(2,) * n for n in (1, 5, 2, 7, 3, 4)]
    requests = [Request(prompt, str(prompt)) for prompt in prompts]
    completions(model, requests, SamplingSettings(max_new_tokens=9, slots=64))
    assert [[len(prompt) for prompt in prefill] for prefill in model.prefills] == [[7, 5, 4], [3, 2, 1]]
    assert model.shapes == [(6 + 3, 7, 9)]


def test_any_of_several_end_tokens_ends_a_row():
    model, requests = scripted([[5, 7, 6, END], [5, 6, END], [5, END], [5, 5, 5]], 10)
    settings = SamplingSettings(temperature=0, max_new_tokens=3)
    rows = in_order(sample(model, requests, settings, eos_id=frozenset({END, 7})))
    assert [row.token_ids for row in rows] == [[5, 7], [5, 6, END], [5, END], [5, 5, 5]]
    assert [row.finish_reason for row in rows] == ["stop", "stop", "stop", "length"]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 17])
def test_max_new_tokens_is_exact(max_new_tokens):
    model, requests = scripted([[2] * 20, [2] * (max_new_tokens - 1) + [END]], 3)
    endless, just = completions(model, requests, SamplingSettings(max_new_tokens=max_new_tokens))
    assert endless == Written([2] * max_new_tokens, [False] * max_new_tokens, "length")
    assert just == Written([*[2] * (max_new_tokens - 1), END], [False] * max_new_tokens, "stop")


def test_one_transfer_to_the_host_a_step(monkeypatch):
    """Ids come over with one tolist(); nothing else in a step waits for the device."""

    class Scalars(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Scalars.count += "_local_scalar_dense" in str(function) or "nonzero" in str(function)
            return function(*args, **(kwargs or {}))

    lists, steps = [], []
    model, requests = tiny_t5(), ragged_requests(6, 2)
    decode, tolist = model.decode, Tensor.tolist
    monkeypatch.setattr(model, "decode", lambda cache, ids_B: steps.append(1) or decode(cache, ids_B))
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(1) or tolist(tensor))
    with Scalars():
        completions(model, requests, SamplingSettings(temperature=0.7, top_k=9, top_p=0.9, max_new_tokens=12, slots=4))
    assert len(lists) == len(steps) > 12
    assert Scalars.count == 0


# The calculator in the slots

TEXTS = ["", "", "<<", ">>", "<", "=", "=<<", ")=", "2=", "= ", "=5", "==", "a", " ", "(", ")", "+", "-", "*", "/", "."]
TEXTS += [*"0123456789", "16", "75", "1000", "12", ">>>"]
IDS = {text: token_id for token_id, text in enumerate(TEXTS) if text} | {"END": END}


def encode(text: str) -> list[int]:
    """Ids by the longest token that fits."""
    ids = []
    while text:
        token = max((token for token in TEXTS if token and text.startswith(token)), key=len)
        ids.append(IDS[token])
        text = text.removeprefix(token)
    return ids


def toy_calculator() -> Callable[[], Automaton]:
    automaton = Automaton(TEXTS, lambda result: encode(result + ">>"), "<<", ">>")
    return automaton.fresh


# What the row holds in the end; a token written !so is forced. Where one is, the model chooses something else.
CASES = {
    "result of several tokens": "<< 6 7 / 4 = !16 !. !75 !>> a END",
    "token of several digits": "<< 5 0 0 * 2 = !1000 !>> END",
    "token before the mark holds =": "a = << 1 + 1 = !2 !>> END",
    "token holds = and the opening mark": "8 / 2 =<< 8 / 2 = !4 !>> 4 END",
    "token ends in =": "<< ( 1 + 2 )= !3 !>> END",
    "digit and = in one token": "<< 1 + 2= !3 !>> END",
    "blank after = in the token": "<< 1 + 4 = !5 !>> = 5 END",
    "blank after = inside the token": "<< 1 + 4 =\u2423 !5 !>> END",
    "token goes on after =": "<< 1 + 4 =5 >> END",
    "two = in a token": "<< 1 + 4 == 5 >> END",
    "opening mark in two tokens": "< < 1 + 4 = !5 !>> END",
    "negative result": "<< 1 - 4 = !- !3 !>> END",
    "blanks between": "a \u2423 << 1 \u2423 + \u2423 4 \u2423 = !5 !>> \u2423 END",
    "two annotations": "<< 1 + 1 = !2 !>> 2 a << 2 * 6 = !12 !>> 12 END",
    "second annotation at once": "<< 1 + 1 = !2 !>> << 2 + 1 = !3 !>> END",
    "plain arithmetic after an annotation": "<< 1 + 1 = !2 !>> 2 + 3 = 5 END",
    "annotation opened again": "<< 1 + << 2 + 1 = !3 !>> END",
    "closed and not computed": "<< 1 + 1 >> = 2 END",
    "malformed: operator missing a side": "<< 1 + = 5 >> END",
    "malformed: parenthesis": "<< ( 1 + 1 = 5 >> END",
    "malformed: division by zero": "<< 1 / 0 = 5 >> END",
    "malformed: a word": "<< a = 5 >> END",
    "malformed: nothing": "<< = 5 >> END",
    "well-formed after malformed": "<< 1 + = 5 >> << 1 + 4 = !5 !>> END",
    "no annotation": "1 + 1 = 5 END",
    "end inside an annotation": "<< 1 + END",
    "end where a result was expected": "<< a = END",
}


def parse(case: str) -> tuple[list[int], list[bool]]:
    """Ids and forced flags of a case; \u2423 is a blank that belongs to a token."""
    words = [word.replace("\u2423", " ") for word in case.split(" ")]
    return [IDS[word.removeprefix("!")] for word in words], [word.startswith("!") for word in words]


def without_results(token_ids: list[int], forced: list[bool], instead: str) -> list[int]:
    """A row with another token wherever one is forced."""
    return [IDS[instead] if is_forced else i for i, is_forced in zip(token_ids, forced, strict=True)]


@pytest.mark.parametrize("instead", ["END", "<<", "7"])
def test_results_are_forced(instead):
    """The model chooses `instead` wherever a forced id stands: that choice is discarded, be it the end."""
    expected = [parse(case) for case in CASES.values()]
    model, requests = scripted([without_results(*case, instead) for case in expected], len(TEXTS))
    results = completions(model, requests, SamplingSettings(max_new_tokens=40, slots=3), toy_calculator())
    for name, (ids, forced), request, completion in zip(CASES, expected, requests, results, strict=True):
        assert completion == Written(ids, forced, "stop"), name
        # The model reads what stands there, not what it chose.
        assert model.fed[request.prompt_ids] == [START, *ids[:-1]], name


@pytest.mark.parametrize(
    ("max_new_tokens", "reason"), [(6, "length"), (7, "length"), (9, "length"), (10, "length"), (11, "stop")]
)
def test_the_length_limit_may_fall_inside_a_result(max_new_tokens, reason):
    """Ends at the =, at the first forced id, before the closing mark, after it, and at the end token."""
    ids, forced = parse("<< 6 7 / 4 = !16 !. !75 !>> END")
    model, requests = scripted([without_results(ids, forced, "7")] * 3, len(TEXTS))
    settings = SamplingSettings(max_new_tokens=max_new_tokens, slots=2)
    for completion in completions(model, requests, settings, toy_calculator()):
        assert completion == Written(ids[:max_new_tokens], forced[:max_new_tokens], reason)


def test_without_a_calculator_nothing_is_forced():
    ids, _ = parse("<< 1 + 4 = 7 >> END")
    model, requests = scripted([ids], len(TEXTS))
    assert completions(model, requests, SamplingSettings()) == [Written(ids, [False] * len(ids), "stop")]


def test_a_forced_token_replaces_one_choice_only():
    """Uniform numbers belong to positions: after forced tokens a row goes on as it would have without them."""

    class Interrupting:
        """Forces the ids 30 and 31 after the row's third token, and remembers all it saw."""

        made: ClassVar[list["Interrupting"]] = []
        trigger_ids: ClassVar[frozenset[int]] = frozenset()
        is_idle = False

        def __init__(self):
            self.seen = []
            self.made.append(self)

        def push(self, token_id: int) -> list[int]:
            self.seen.append(token_id)
            return [30, 31] if len(self.seen) == 3 else []

    model = FakeModel(lambda prompt, position: torch.cat([torch.zeros(20), torch.full((20,), -torch.inf)]))
    requests = [Request((5,), "q", k) for k in range(6)]
    settings = SamplingSettings(temperature=1.0, max_new_tokens=12, slots=4)
    free = [row.token_ids for row in in_order(sample(model, requests, settings, 39))]
    forced = in_order(sample(model, requests, settings, 39, new_override=Interrupting))
    assert [c.token_ids for c in forced] == [[*ids[:3], 30, 31, *ids[5:]] for ids in free]
    assert all(c.forced == [False] * 3 + [True] * 2 + [False] * 7 for c in forced)
    assert sorted(override.seen for override in Interrupting.made) == sorted(c.token_ids for c in forced)


def test_forced_ids_are_those_of_the_training_text(shared):
    """Rows that choose the end token where a human wrote a result come out as the training text has them."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "t5")
    t5_template = T5Template(tokenizer)
    with open(shared / "data" / "gsm8k" / "train.jsonl", encoding="utf-8") as stream:
        rationales = [json.loads(line)["answer"] for line, _ in zip(stream, range(120), strict=False)]
    targets = [t5_template.target_ids(rationale) for rationale in rationales]
    forced = [computed_positions([tokenizer.token_texts[i] for i in ids]) for ids in targets]
    assert sum(map(any, forced)) > 100
    assert max(map(sum, forced)) > 10
    eos_id = tokenizer.eos_id
    scripts = [[eos_id if f else i for i, f in zip(*pair, strict=True)] for pair in zip(targets, forced, strict=True)]
    model, requests = scripted(scripts, tokenizer.vocab_size)
    results = completions(model, requests, SamplingSettings(max_new_tokens=500, slots=16), t5_template.new_calculator)
    for ids, flags, completion in zip(targets, forced, results, strict=True):
        assert completion == Written(ids, flags, "stop"), t5_template.decode(ids)


def computed_positions(token_texts: list[str]) -> list[bool]:
    """Which tokens lie within the ` result]` of an annotation whose left side has a value, found in the whole text."""
    spans = [
        match.span(2)
        for match in re.finditer(r"\[([^\[\]=]*)=( [^\[\]]*\])", "".join(token_texts))
        if evaluate_expression(match[1]) is not None
    ]
    positions, end = [], 0
    for text in token_texts:
        start, end = end, end + len(text)
        positions.append(any(first <= start < end <= last for first, last in spans))
    return positions


def test_an_idle_override_sees_its_triggers_alone():
    """And every token from then on, forced ones too, until it is idle again."""

    class Watcher:
        """Busy from each 5 on for three tokens, of which it forces the last two; it remembers all it saw."""

        seen: ClassVar[list[int]] = []
        trigger_ids: ClassVar[frozenset[int]] = frozenset([5])

        def __init__(self):
            self.n_left = 0

        @property
        def is_idle(self) -> bool:
            return self.n_left == 0

        def push(self, token_id: int) -> list[int]:
            self.seen.append(token_id)
            self.n_left = 2 if token_id == 5 else self.n_left - 1
            return [6, 7] if token_id == 5 else []

    model, requests = scripted([[2, 3, 5, 0, 0, 4, 2, 5, 0, 0, 2, END]], 8)
    (completion,) = completions(model, requests, SamplingSettings(max_new_tokens=20), Watcher)
    assert completion.token_ids == [2, 3, 5, 6, 7, 4, 2, 5, 6, 7, 2, END]
    assert Watcher.seen == [5, 6, 7, 5, 6, 7]


def test_a_row_that_has_ended_is_small():
    """What it needed only while it was written is dropped."""
    model, requests = scripted([[IDS["7"], END]], len(TEXTS))
    (row,) = sample(model, requests, SamplingSettings(temperature=1e-3), END, new_override=toy_calculator())
    assert (row.override, row.uniforms, len(row.pending)) == (None, (), 0)
