"""DPO-augmented self-training (Algorithm 2 of arXiv 2407.18248), straight through, on the toy world: under two minutes.

    python examples/dpo_st.py

No run directory, no resume, no hashes. Simpler than `python train.py` in this too: a round uses its own samples only
(there those of all earlier rounds too), and nothing is left out for its length.
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs in a checkout that is not installed

import minidpost as mp

base = mp.find_model("tiny-t5")  # f_θ: a model that can read a problem, but has never seen a rationale
template = mp.load_template(base)  # how it writes a question and a rationale
labelled = mp.load_dataset("toy", "train")  # L: questions, answers and human rationales
pool = labelled + mp.load_dataset("toy", "unlabelled")[:200]  # U: questions and answers alone are used
dev = mp.load_dataset("toy", "dev")

method = "dpo-st"
preset = replace(mp.preset_for(base, method), sft_epochs=8, dpo_steps=15)
questions = [example.question for example in pool]
answers = [example.answer for example in pool]
prompts = {question: tuple(template.prompt_ids(question)) for question in questions}
gold = {
    example.question: mp.TokenizedExample(prompts[example.question], tuple(template.target_ids(example.rationale)))
    for example in labelled
}


def fine_tuned(examples):
    """SFT (equation 2) of the base model, from its first weights."""
    model = mp.load_model(base)
    mp.train_sft(model, examples, preset.sft(seed=1))
    return model


def candidates(model, n_samples, seed):
    """What is known of each question: the labelled rationale, and the model's own samples, graded."""
    known = [mp.Candidates(prompts[question], gold.get(question)) for question in questions]
    for sample in mp.generate(model, template, questions, preset.sampling(seed), answers=answers, n_samples=n_samples):
        known[sample.example_index].add(sample)
    return known


def preference_pairs(of_question):
    """The least similar pairs of one question's correct and incorrect rationales (equation 4)."""
    return mp.preference_pairs(
        of_question, max_similarity=preset.max_similarity, pairs_per_question=preset.pairs_per_question
    )


def dev_accuracy(model):
    return mp.greedy_accuracy(model, template, dev, preset.sampling(seed=0)).value


model = fine_tuned(list(gold.values()))  # line 1: warm-up, f_θ'
print(f"SFT: {dev_accuracy(model):.1%} of dev")
for iteration in range(1, 2):  # line 2: one round here, three in the paper
    known = candidates(model, preset.dpo_samples, seed=10 * iteration)  # line 3: y_w, y_l ~ f_θ' (y_w also from L)
    pairs = [pair for of_question in known for pair in preference_pairs(of_question)]  # equation 4
    dpo = preset.dpo(len(pairs), seed=1)
    reference_P2 = mp.reference_log_probabilities(model, pairs, micro_batch_tokens=dpo.micro_batch_tokens)
    mp.train_dpo(model, pairs, reference_P2, dpo)  # line 4: equation 5, f_θ' becomes f_θd
    known = candidates(model, preset.samples, seed=10 * iteration + 1)  # line 5: S ~ f_θd
    labels = mp.pseudo_labels(known, mp.METHODS[method], preset)  # lines 6 and 7: L ∪ S_α, correct ones and gold
    model = fine_tuned([label for of_question in labels for label in of_question])  # line 8: the base again, not f_θd
    print(f"DPO-ST, iteration {iteration}: {dev_accuracy(model):.1%} of dev")
