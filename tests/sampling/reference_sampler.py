"""Sampling with the calculator in its plainest form; docs/walkthrough.md shows it, tests compare the fast one."""

from collections import deque

import torch

from minidpost.sampling.token_choice import row_uniforms


def sample_one(model, template, question, settings, sample_index=0):
    """One completion of one question: its token ids, and which of them the calculator forced."""
    source = torch.tensor([template.prompt_ids(question)])
    uniforms = row_uniforms(settings, question, sample_index)  # this row's own random numbers, one a position
    calculator = template.new_calculator()
    token_ids, forced, pending = [], [], deque()
    while len(token_ids) < settings.max_new_tokens:
        decoder_input = torch.tensor([[model.config.start_id, *token_ids]])
        logits_V = model(source, torch.ones_like(source).bool(), decoder_input)[0, -1]  # 1) feed everything again
        if settings.temperature == 0:  # 2) choose: greedily, or by inverse CDF
            token_id = int(logits_V.argmax())
        else:
            cdf_V = (logits_V / settings.temperature).softmax(-1).cumsum(-1)
            token_id = int(torch.searchsorted(cdf_V, uniforms[len(token_ids)] * cdf_V[-1], right=True))
        is_forced = bool(pending)  # 3) force: ids that the calculator asked for come first
        if is_forced:
            token_id = pending.popleft()
        token_ids.append(token_id)  # 4) emit
        forced.append(is_forced)
        if token_id == template.eos_id and not is_forced:  # 5) end
            break
        pending.extend(calculator.push(token_id))
    return token_ids, forced
