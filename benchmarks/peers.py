"""What sampling is measured against: transformers' `generate` with a calculator, a question at a time, CTranslate2.

Each is meant to be as good as a user who knows the library would write it. The models are transformers' classes over
the very weights of ours; CTranslate2 gets a converted copy.
"""

import json
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import transformers
from torch import Tensor, nn

from benchmarks.scripted import CERTAIN, Work
from minidpost.models.hf_config import config_json, mapping_for
from minidpost.models.t5 import T5
from minidpost.models.weights import set_parameter
from minidpost.text.calculator import Automaton
from minidpost.text.templates import Template
from minidpost.training.batching import pad

try:
    import ctranslate2
    from ctranslate2.converters.transformers import T5Loader
    from ctranslate2.specs.model_spec import OPTIONAL
except ImportError:  # a yardstick, not a dependency: pip install ctranslate2
    ctranslate2 = None

transformers.logging.set_verbosity_error()


def twin(model: nn.Module) -> transformers.PreTrainedModel:
    """transformers' model over the parameters of ours (shared, not copied), in eval mode."""
    config, weights = model.config, dict(model.named_parameters())
    hf = config_json(config, next(model.parameters()).dtype)
    is_t5 = isinstance(model, T5)
    kind = transformers.T5ForConditionalGeneration if is_t5 else transformers.LlamaForCausalLM
    with torch.device("meta"):
        peer = kind(kind.config_class(**{key: value for key, value in hf.items() if key != "torch_dtype"}))
    for ours, theirs in mapping_for(config).names(config):
        set_parameter(peer, theirs, weights[ours])
    if is_t5:
        peer.encoder.embed_tokens.weight = peer.decoder.embed_tokens.weight = peer.shared.weight
    else:  # its frequencies are no parameters
        peer.model.rotary_emb = type(peer.model.rotary_emb)(peer.config).to(model.embedding.weight.device)
    if config.tied:
        peer.lm_head.weight = model.embedding.weight
    return peer.eval()


class Calculator(transformers.LogitsProcessor):
    """Forces the calculator's results in a batch: an automaton (ours) a row, one transfer of the last tokens a step."""

    def __init__(self, template: Template, n_rows: int):
        self.automata = [template.new_calculator() for _ in range(n_rows)]
        self.pending: list[deque[int]] = [deque() for _ in range(n_rows)]
        self.started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.started:
            for row, token_id in enumerate(input_ids[:, -1].tolist()):
                if forced := self.automata[row].push(token_id):
                    self.pending[row].extend(forced)
        self.started = True
        if rows := [row for row, pending in enumerate(self.pending) if pending]:
            scores[rows] = -torch.inf
            scores[rows, [self.pending[row].popleft() for row in rows]] = 0.0
        return scores


class Script(transformers.LogitsProcessor):
    """Makes each row write its script, by one scatter a step as in ScriptedModel."""

    def __init__(self, scripts: Sequence[Sequence[int]], eos_id: int, n_prompt: int, device: torch.device):
        self.script_BT = pad([[*script, eos_id] for script in scripts], eos_id).to(device)
        self.n_prompt = n_prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1] - self.n_prompt
        return scores.scatter_(1, self.script_BT[:, position, None], CERTAIN)


class ToolStop(transformers.StoppingCriteria):
    """Stops where an annotation's `=` has been written, and knows what comes after it."""

    def __init__(self, automaton: Automaton):
        self.automaton = automaton
        self.forced: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, **_) -> Tensor:
        self.forced = self.automaton.push(input_ids[0, -1].item())
        return torch.tensor([bool(self.forced)], device=input_ids.device)


def generate(peer: transformers.PreTrainedModel, work: Work, n_rows: int, is_sorted: bool = True) -> list[list[int]]:
    """All completions with `generate` in batches, as they come or by length of the question.

    The samples of a question are made of one prompt where a batch has room for all of them.
    """
    order = list(range(len(work.prompts)))
    if is_sorted:
        order.sort(key=lambda index: len(work.prompts[index]))
    completions: list[list[int]] = [[] for _ in order]
    n_each = work.n_samples if n_rows % work.n_samples == 0 else 1
    for start in range(0, len(order), n_rows):
        indices = order[start : start + n_rows]
        inputs = padded(peer, [work.prompts[index] for index in indices[::n_each]])
        n_prompt = 1 if peer.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        processors = scripts_of(work, indices, n_prompt, peer.device)
        processors.append(Calculator(work.template, len(indices)))
        with torch.inference_mode():
            output_BT = peer.generate(
                **inputs,
                **chosen_by(work),
                num_return_sequences=n_each,
                max_new_tokens=work.max_new_tokens,
                logits_processor=processors,
            )
        for index, row in zip(indices, output_BT[:, n_prompt:].tolist(), strict=True):
            completions[index] = ended(row, work.template.eos_id)
    return completions


def padded(peer: transformers.PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
    """Ids and mask of a batch; a decoder-only model wants its padding in front."""
    longest = max(map(len, prompts))
    is_padded_right = peer.config.is_encoder_decoder
    ids_BS, mask_BS = [], []
    for prompt in prompts:
        gap, ones = [0] * (longest - len(prompt)), [1] * len(prompt)
        ids_BS.append([*prompt, *gap] if is_padded_right else [*gap, *prompt])
        mask_BS.append([*ones, *gap] if is_padded_right else [*gap, *ones])
    tensors = {"input_ids": torch.tensor(ids_BS), "attention_mask": torch.tensor(mask_BS)}
    return {name: tensor.to(peer.device) for name, tensor in tensors.items()}


def scripts_of(
    work: Work, indices: Sequence[int], n_prompt: int, device: torch.device
) -> transformers.LogitsProcessorList:
    """The processor of some questions' scripts, if they have any."""
    if work.scripts is None:
        return transformers.LogitsProcessorList()
    scripts = [work.scripts[index] for index in indices]
    return transformers.LogitsProcessorList([Script(scripts, work.template.eos_id, n_prompt, device)])


def chosen_by(work: Work) -> dict:
    """`generate`'s settings: greedy, or random tokens of the whole vocabulary."""
    settings = {"num_beams": 1, "eos_token_id": work.template.eos_id, "pad_token_id": 0}
    if not work.temperature:
        return settings | {"do_sample": False}
    return settings | {"do_sample": True, "temperature": work.temperature, "top_k": 0, "top_p": 1.0}


def ended(row: list[int], eos_id: int) -> list[int]:
    """A completion without what pads it."""
    return row[: row.index(eos_id) + 1] if eos_id in row else row


def one_at_a_time(peer: transformers.PreTrainedModel, work: Work) -> list[list[int]]:
    """Completions, each by itself: `generate` runs to a tool call, the result is put after it, and so on.

    Keys and values (and the encoder's output) live on from one run to the next.
    """
    completions = []
    for index, prompt in enumerate(work.prompts):
        inputs, stop = padded(peer, [prompt]), ToolStop(work.template.new_calculator())
        if peer.config.is_encoder_decoder:
            start_id = peer.config.decoder_start_token_id
            prefix, ids_1T = "decoder_", torch.tensor([[start_id]], device=peer.device)
            with torch.inference_mode():
                encoded = peer.get_encoder()(**inputs)
            inputs = {"encoder_outputs": encoded, "attention_mask": inputs["attention_mask"]}
        else:
            prefix, ids_1T = "", inputs.pop("input_ids")
        n_prompt, keys_values = ids_1T.shape[1], None
        processors = scripts_of(work, [index], n_prompt, peer.device)
        while (n_left := work.max_new_tokens + n_prompt - ids_1T.shape[1]) > 0:
            # With a mask for all ids, `generate` feeds those alone that the cache does not have yet.
            inputs |= {f"{prefix}input_ids": ids_1T, f"{prefix}attention_mask": torch.ones_like(ids_1T)}
            with torch.inference_mode():
                output = peer.generate(
                    **inputs,
                    **chosen_by(work),
                    max_new_tokens=n_left,
                    past_key_values=keys_values,
                    logits_processor=processors,
                    stopping_criteria=transformers.StoppingCriteriaList([stop]),
                    return_dict_in_generate=True,
                )
            ids_1T, keys_values = output.sequences, output.past_key_values
            if not stop.forced:
                break
            ids_1T = torch.cat([ids_1T, ids_1T.new_tensor([stop.forced])], dim=1)
        completions.append(ids_1T[0, n_prompt : n_prompt + work.max_new_tokens].tolist())
    return completions


class CTranslate2:
    """A T5 in CTranslate2, which runs in a process of its own; its vocabulary are the ids themselves."""

    def __init__(self, peer: transformers.T5ForConditionalGeneration, directory: Path):
        """Convert transformers' model, with the head and the scale that it has, whatever its class supposes."""
        loader, config = T5Loader(), peer.config
        with torch.inference_mode():
            spec = loader.get_model_spec(peer)
        if not config.scale_decoder_outputs:
            spec.decoder.scale_outputs = OPTIONAL
        loader.set_vocabulary(spec, [str(token_id) for token_id in range(config.vocab_size)])
        spec.config.bos_token = spec.config.decoder_start_token = str(config.decoder_start_token_id)
        spec.config.eos_token, spec.config.unk_token = str(config.eos_token_id), "2"
        spec.validate()
        spec.optimize(quantization=None)
        spec.save(str(directory))
        self.directory, self.compute_types = directory, ctranslate2.get_supported_compute_types("cpu")
        command = [sys.executable, str(Path(__file__).with_name("ctranslate2_worker.py"))]
        self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close(self) -> None:
        """End the process."""
        self.worker.communicate()

    def translate(
        self,
        work: Work,
        threads: tuple[int, int],
        compute_type: str = "float32",
        batch_size: int = 64,
        batch_type: str = "examples",
        lengths: list[int] | None = None,
        **options,
    ) -> tuple[float, list[list[int]]]:
        """Seconds, and completions without a calculator. `threads` are workers and the threads of each.

        A batch is of `batch_size` rows, or ("tokens") of as many tokens as those have on average. A callback ends each
        row at its length, as scripts have it, if not given.
        """
        batch_size = max(1, batch_size // work.n_samples)
        if batch_type == "tokens":
            batch_size *= sum(map(len, work.prompts)) // len(work.prompts)
        if work.temperature:
            options |= {"sampling_topk": 0, "sampling_temperature": work.temperature, "num_hypotheses": work.n_samples}
        if work.scripts is not None:
            lengths = [len(script) for script in work.scripts]
            options |= never_ending(work)
        options |= {"max_batch_size": batch_size, "batch_type": batch_type, "max_decoding_length": work.max_new_tokens}
        translator = {"model_path": str(self.directory), "compute_type": compute_type}
        translator |= dict(zip(("inter_threads", "intra_threads"), threads, strict=True))
        prompts = [[*map(str, prompt)] for prompt in work.prompts[:: work.n_samples]]
        order = {"translator": translator, "prompts": prompts, "lengths": lengths, "options": options}
        self.worker.stdin.write(json.dumps(order) + "\n")
        self.worker.stdin.flush()
        answer = json.loads(self.worker.stdout.readline())
        return answer["seconds"], answer["completions"]

    def callback_fraction(self, work: Work, threads: tuple[int, int], batch_size: int, n_rounds: int = 3) -> float:
        """The fraction of the time that the Python callback takes, at one length for all rows."""
        n_tokens = 32
        fractions = []
        work = replace(work, scripts=None, max_new_tokens=n_tokens)
        translate = partial(self.translate, work, threads, batch_size=batch_size, **never_ending(work))
        for _ in range(n_rounds):
            seconds_without, _ = translate()
            seconds_with, _ = translate(lengths=[n_tokens] * len(work.prompts))
            fractions.append(1 - seconds_without / seconds_with)
        return median(fractions)


def never_ending(work: Work) -> dict:
    """The option that keeps CTranslate2 from ending a row by itself."""
    return {"suppress_sequences": [[str(work.template.eos_id)]]}
