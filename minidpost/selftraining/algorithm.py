"""Self-training (paper, Algorithm 1) and DPO-augmented self-training (Algorithm 2), and relatives of theirs.

What the methods have in common stands here, in what they differ in methods.py: `run.rules` is a row of that table.

Each step reads files and writes files (steps.py), and is passed over where its files are there, so that the same
command continues a run after the last step that was finished. U contains L's questions (section 4.1), and the correct
samples of all iterations so far are in L (line 5 or 7). Departures from the paper's text, as in the published code:
preference pairs too are made of the samples of all iterations so far; L's rationales may be chosen; every iteration is
made, instead of "until convergence" (`patience` stops earlier, where accuracy on dev no longer rises). The model to use
is that of the iteration with the best accuracy on dev.
"""

from collections.abc import Iterator

from minidpost.selftraining.run import Run
from minidpost.selftraining.steps import (
    build_preference_pairs,
    build_pseudo_labels,
    compute_reference,
    evaluate,
    fine_tune,
    has_converged,
    remove_models,
    sample_rationales,
    train_preferences,
)


def self_train(run: Run) -> Iterator[int]:
    """Run a method to its end, yielding the number of each iteration when all its files are there.

    L: labelled set. U: pool of questions. K: samples for each question. f_θ: base model. Line numbers are those of the
    algorithm that is named; a step of both algorithms has both.
    """
    K = run.preset.samples
    n_iterations = run.preset.iterations_of(run.rules)

    if run.preset.warm_up:
        fine_tune(run, 0)  # Algorithms 1 and 2, line 1: fine-tune f_θ on L to get f_θ'
    accuracies = [evaluate(run, 0)]
    yield 0

    for iteration in range(1, n_iterations + 1):  # line 2: repeat
        teacher = run.model(iteration - 1)  # f_θ'

        if run.rules.has_dpo:
            # Algorithm 2, line 3: generate the DPO dataset D (equation 4): y_l, and y_w unless it is L's, from f_θ'
            sample_rationales(run, iteration, "samples-dpo", model=teacher, n_samples=run.preset.dpo_samples)
            build_preference_pairs(run, iteration)
            # Algorithm 2, line 4: tune f_θ' with L_DPO on D to get f_θd (equation 5); π_ref is f_θ' as it is now
            compute_reference(run, iteration, model=teacher)
            train_preferences(run, iteration, model=teacher)
            teacher = run.path(iteration) / "dpo"  # f_θd

        # Algorithm 1, line 3; Algorithm 2, line 5: build the pseudo-labelled dataset S from U (equation 6)
        sample_rationales(run, iteration, "samples-sft", model=teacher, n_samples=K)
        # Algorithm 1, lines 4 and 5; Algorithm 2, lines 6 and 7: select S_α, the correct part of S; L ← S_α ∪ L
        labels = build_pseudo_labels(run, iteration)
        # Algorithm 1, line 6; Algorithm 2, line 8: train f_θ, the base and not the teacher, on L to get a new f_θ'
        fine_tune(run, iteration, labels)

        accuracies.append(evaluate(run, iteration))
        remove_models(run, accuracies)
        yield iteration
        # Algorithm 1, line 7; Algorithm 2, line 9: until convergence or max iteration is reached
        if has_converged(run, accuracies):
            return
