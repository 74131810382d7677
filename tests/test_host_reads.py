"""What a step makes the host wait for: models are on the meta device, which refuses to be read, in place of a GPU.

A GPU works behind the host, and any value that the host reads makes it wait for all that came before. Copies to the
device that are not marked as non-blocking or not from pinned memory, and indices that lie on the host, wait as well: a
dispatch mode finds them.
"""

import pytest
import torch
from llama_oracle import LLAMA_SHAPES, random_llama
from t5_oracle import SHAPES, random_t5
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidpost import precision
from minidpost.models.lora import add_adapters
from minidpost.precision import to_device
from minidpost.sampling.token_choice import SamplingSettings, choose
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import PreferencePair, dpo_gradients
from minidpost.training.optim import Schedule, apply_step
from minidpost.training.sft import sft_gradients

PROMPTS = [(5, 6, 7, 8), (9, 4), (5, 6, 7, 8), (3, 3, 3)]
TARGETS = [(8, 9, 1), (7, 1), (6, 5, 4, 3, 1), (2, 1)]
EXAMPLES = [TokenizedExample(*ids) for ids in zip(PROMPTS, TARGETS, strict=True)]


class Waits(TorchFunctionMode):
    """Notes what would wait for a GPU: a blocking copy to or from it, an index that lies on the host or is a list.

    `pinned` are the tensors of the host that copies may be from.
    """

    def __init__(self, pinned):
        super().__init__()
        self.found = []
        self.copies = Copies(self.found, pinned)

    def __enter__(self):
        self.copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.copies.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and args[0].is_meta:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += ["list" for part in parts if isinstance(part, list)]
        return function(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Notes the operations in which tensors of the host and of the device meet."""

    def __init__(self, found, pinned):
        super().__init__()
        self.found = found
        self.pinned = pinned

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema = function._schema
        named = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
        is_copy = "non_blocking" in [argument.name for argument in schema.arguments]
        # A number on the host may take part in an operation on the device.
        tensors = [value for value in tree_leaves(named) if isinstance(value, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.dim() or is_copy}
        if isinstance(named.get("device"), torch.device):
            kinds.add(named["device"].type)
        if kinds == {"cpu", "meta"}:
            addresses = {tensor.data_ptr() for tensor in self.pinned}
            is_pinned = all(tensor.data_ptr() in addresses for tensor in tensors if tensor.is_cpu)
            if not is_pinned or not named.get("non_blocking"):
                self.found.append(schema.name)
        return function(*args, **kwargs)


def build(family: str, lora_rank: int | None = None):
    """A model whose numbers nobody can read."""
    model = random_t5(SHAPES["gated-untied"]) if family == "t5" else random_llama(LLAMA_SHAPES["grouped"])
    if lora_rank:
        add_adapters(model, rank=lora_rank, alpha=4.0, seed=0)
    return model.to("meta")


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """The meta device has none, and is not even asked for it."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)


@pytest.fixture
def pinned(monkeypatch) -> list[torch.Tensor]:
    """What was pinned, as it would be for a GPU; kept here, so that its memory is no other tensor's."""
    tensors = []

    def pin(tensor, device):
        tensors.append(tensor)
        return tensor

    monkeypatch.setattr(precision, "pinned", pin)
    return tensors


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: precision.pinned(torch.zeros(3), "meta").to("meta"),
        lambda x: torch.zeros(3).to("meta", non_blocking=True),
        lambda x: x.copy_(precision.pinned(torch.zeros(3), "meta")),
        lambda x: x[[0, 2]],
        lambda x: x[torch.tensor([0, 2])],
    ],
    ids=["to", "pageable", "copy", "list", "index"],
)
def test_waits_are_found(wait, pinned):
    x = torch.zeros(3, device="meta")
    with Waits(pinned) as waits:
        to_device(torch.zeros(3), "meta")
        x.copy_(precision.pinned(torch.zeros(3), "meta"), non_blocking=True)
        x[1:] += 2.0
        assert waits.found == []
        wait(x)
    assert waits.found


@pytest.mark.parametrize(
    "read", [lambda x: x.tolist(), lambda x: x[0].item(), lambda x: x.cpu(), lambda x: x.nonzero()]
)
def test_values_cannot_be_read(read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("lora_rank", [None, 2])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_step_of_training_reads_the_gradient_norm_alone(family, lora_rank, pinned, monkeypatch):
    model = build(family, lora_rank)
    pairs = [PreferencePair(EXAMPLES[0], EXAMPLES[2]), PreferencePair(EXAMPLES[2], EXAMPLES[0])]
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], foreach=True)
    reads = []
    item = torch.Tensor.item

    def read(tensor):
        reads.append(tuple(tensor.shape))
        return 0.5

    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: read(tensor) if tensor.is_meta else item(tensor))
    sft_gradients(model, EXAMPLES, 100)  # a Llama's frequencies are copied once in a process
    with Waits(pinned) as waits:
        sft_gradients(model, EXAMPLES, 8, dtype=torch.float32)  # several micro-batches
        dpo_gradients(model, pairs, torch.zeros(2, 2), beta=0.1, micro_batch_tokens=8, dtype=torch.float32)
        assert (reads, waits.found) == ([], [])
        update = apply_step(model, optimizer, Schedule(1e-3), step=0, n_steps=2)
    assert update["grad_norm"] == 0.5
    assert (reads, waits.found) == ([()], [])


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_step_of_sampling_reads_nothing(family, temperature, pinned):
    """The prefill and rows that come and go included: the ids that are chosen are all that the host ever reads."""
    model = build(family)
    cache = model.new_cache(4, max_prompt=4, max_new=6)
    ids_B = torch.zeros(4, dtype=torch.long, device="meta")
    uniform_B = torch.zeros(4, dtype=torch.float64, device="meta") if temperature else None
    model.prefill(cache, range(4), PROMPTS)  # a Llama's frequencies are copied once in a process
    with Waits(pinned) as waits:
        model.prefill(cache, range(4), PROMPTS)
        for _ in range(3):
            ids_B = choose(model.decode(cache, ids_B), uniform_B, SamplingSettings(temperature))
            cache.copy_rows([0, 1], [3, 2])
            cache.copy_rows([2], [0])
    assert ids_B.is_meta and waits.found == []
