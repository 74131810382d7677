"""What the methods do in an iteration, side by side: a method is a row of METHODS, and nowhere a branch by its name.

    sft      only the warm-up: fine-tune the base model on the labelled set L. It is iteration 0 of every method
    st       self-training (paper, Algorithm 1): sample K rationales of each question of U, fine-tune the BASE on L and
             the correct ones, repeat
    dpo-st   DPO-augmented self-training (paper, Algorithm 2): st, but the last model is tuned by DPO before it samples
    rft      rejection sampling fine-tuning (Yuan et al. 2023, arXiv 2308.01825, section 3.3)
    rest-em  ReST-EM (Singh et al. 2023, arXiv 2312.06585, Algorithm 1 and section 5)

After the warm-up they differ in these, where K counts the samples of a question and T5's preset is shown:

                             st, dpo-st            rft                       rest-em
    DPO before sampling      dpo-st                no                        no
    iterations               3                     1                         3
    K                        3                     100                       32, of the 40 likeliest tokens
    samples used             of all iterations     of all iterations         of this iteration alone
    L's rationales           among the labels      among the labels          left out
    wrong calculations       are not looked for    are left out              are not looked for
    duplicates               similar sets of ids   equal lists of equations  equal ids
    labels of a question     up to the 90th        all                       10, drawn at random
                             percentile of counts

In every method a label has the correct answer, and what is fine-tuned is the base model. Departures. RFT: of samples
with equal equations the first one stays; the published code takes the one whose text is farthest from the others'.
ReST-EM: the random choice and the removal of equal samples are ours, as the paper names only the cap; it begins with
the base model and a prompt of examples, where ours is warmed up on L (--no-warm-up samples from the base itself).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Which rationales of a question are duplicates, of which the first one stays.
# similarity: their sets of token ids overlap by more than the preset's max_similarity (Jaccard; DPO-ST, section 4.2);
#   L's rationale is compared too, and stands before all samples
# equations: samples whose lists of equations are equal, in this order; L's rationale is not compared but joins what
#   remains, so that a sample may have its equations (RFT: D ∪ D'_gen)
# tokens: all their token ids are equal
Duplicates = Literal["similarity", "equations", "tokens"]


@dataclass(frozen=True)
class Method:
    """The rules of one method. The defaults are self-training's, so that a row of METHODS says what it does otherwise.

    The numbers that belong to the rules are hyperparameters (presets.py): `settings` are those that the method changes
    of a model's preset.
    """

    iterates: bool = True  # beyond the warm-up
    has_dpo: bool = False  # the last model is tuned by DPO before it samples pseudo-labels
    merges_iterations: bool = True  # pseudo-labels are samples of all iterations so far, not of this one alone
    has_gold: bool = True  # L's rationales are among the pseudo-labels
    checks_calculations: bool = False  # a sample with a wrong calculation is left out, though its answer is correct
    duplicates: Duplicates = "similarity"  # which rationales are duplicates
    is_cap_random: bool = False  # which pseudo-labels of a question stay under its cap: random ones, not the first
    settings: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "sft": Method(iterates=False),
    "st": Method(),
    "dpo-st": Method(has_dpo=True),
    "rft": Method(
        checks_calculations=True,
        duplicates="equations",
        settings={"iterations": 1, "samples": 100, "label_percentile": None},
    ),
    "rest-em": Method(
        merges_iterations=False,
        has_gold=False,
        duplicates="tokens",
        is_cap_random=True,
        settings={"samples": 32, "top_k": 40, "label_cap": 10, "label_percentile": None},
    ),
}
