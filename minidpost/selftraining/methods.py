"""What the methods do in an iteration, side by side: a method is a row of this table, and nowhere a branch by its name.

sft      only the warm-up: fine-tune the base model on the labelled set L. It is iteration 0 of every method
st       paper, Algorithm 1: sample K rationales a question of U, fine-tune the BASE on L and the correct ones, repeat
dpo-st   paper, Algorithm 2: st, but what samples is the last model after a DPO step
rft      rejection-sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825): one iteration of st, 100 samples, of
         which each distinct list of equations stays once, if its calculations are right
rest-em  ReST-EM (Singh et al. 2023, arXiv 2312.06585): the base is fine-tuned on the correct samples of this
         iteration alone, at most 10 of a question, drawn at random
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Which correct samples of a question count as the same, so that the first one stays:
# similarity: their sets of token ids overlap by more than the preset's max_similarity (Jaccard; DPO-ST, section 4.2)
# equations: their lists of equations are equal; one with a wrong calculation is left out (Yuan et al., section 3.3)
# tokens: all their tokens are equal
Same = Literal["similarity", "equations", "tokens"]


@dataclass(frozen=True)
class Method:
    """The rules of one method; `settings` are the hyperparameters that it changes of a model's preset."""

    iterates: bool = True  # beyond the warm-up
    has_dpo: bool = False  # a DPO step comes before the pseudo-labels are sampled
    merges_iterations: bool = (
        True  # pseudo-labels come from the samples of all iterations so far, not of this one alone
    )
    has_gold: bool = True  # L's rationales are among the pseudo-labels
    same: Same = "similarity"  # which samples count as the same
    draws_capped: bool = (
        False  # of more than label_cap samples the remaining ones are drawn, instead of the first taken
    )
    settings: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sft": Method(iterates=False),
    "st": Method(),
    "dpo-st": Method(has_dpo=True),
    "rft": Method(same="equations", settings={"iterations": 1, "samples": 100, "label_percentile": None}),
    "rest-em": Method(
        merges_iterations=False,
        has_gold=False,
        same="tokens",
        draws_capped=True,
        settings={"samples": 32, "top_k": 40, "label_cap": 10, "label_percentile": None},
    ),
}
