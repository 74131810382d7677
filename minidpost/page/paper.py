"""The paper's own numbers, for comparison: Wang, Li, Lu, ACL 2024, arXiv 2407.18248. None of them is a result of ours.

Accuracies in percent, greedy, as printed. Of figure 1 the text has the accuracies and no FLOPs; of figure 4 the
speed-ups over a tool user that decodes one question at a time, on one NVIDIA A40.
"""

SETS = ("gsm8k/test", "multiarith/test", "asdiv/test", "svamp/test")
BASES = {"flan-t5-base": "Flan-T5-Base", "flan-t5-large": "Flan-T5-Large"}  # our names, theirs

# Table 2: method, base model, accuracy on each of SETS.
TABLE_2 = (
    ("SFT", "Flan-T5-Base", (18.1, 54.2, 26.2, 19.5)),
    ("ST", "Flan-T5-Base", (25.9, 73.8, 28.2, 24.2)),
    ("DPO-ST", "Flan-T5-Base", (27.2, 74.3, 29.2, 22.6)),
    ("SFT", "Flan-T5-Large", (30.8, 77.2, 38.1, 33.6)),
    ("ST", "Flan-T5-Large", (35.6, 86.2, 42.5, 34.8)),
    ("DPO-ST", "Flan-T5-Large", (37.4, 89.0, 42.8, 36.8)),
)

# Table 3: method, base model, annotations, annotator, calculator, accuracy on GSM8K.
TABLE_3 = (
    ("CoT (Shridhar et al. 2023)", "GPT-2-Large", "7K", "human", False, 14.1),
    ("Self-consistency (Khalifa et al. 2023)", "Flan-T5-Large", "7K", "human", True, 33.3),
    ("GRACE (Khalifa et al. 2023)", "Flan-T5-Large", "7K", "human", True, 36.3),
    ("Calcformer (Kadlčík et al. 2023)", "T5-Large", "30K", "human", True, 34.2),
    ("Socratic CoT (Shridhar et al. 2023)", "GPT-2-Large", "7K", "GPT-3 175B", False, 21.1),
    ("CoT from CodeX (Fu et al. 2023)", "Flan-T5-Large", "100K", "CodeX", False, 20.2),
    ("CoT from PaLM (Magister et al. 2023)", "T5-Large", "6K", "PaLM 540B", True, 22.2),
    ("DPO-ST (K = 3)", "Flan-T5-Large", "7K", "human", True, 37.4),
    ("DPO-ST (K = 5)", "Flan-T5-Large", "7K", "human", True, 39.1),
    ("DPO-ST (K = 10)", "Flan-T5-Large", "7K", "human", True, 40.0),
)

# Table 4: kind, method, base model, calculator or other tools, accuracy on GSM8K.
TABLE_4 = (
    ("closed", "Claude-3-Opus", "–", False, 95.0),
    ("closed", "Claude-2", "–", False, 88.0),
    ("closed", "GPT-4", "–", False, 92.0),
    ("closed", "Flan-PaLM-2", "–", False, 84.7),
    ("distilled", "MAmooTH", "Llama-2-7b", True, 53.6),
    ("distilled", "LEMA", "Llama-2-7b", False, 54.1),
    ("distilled", "WizardMath", "Llama-2-7b", False, 54.9),
    ("distilled", "MetaMath", "Llama-2-7b", False, 66.5),
    ("distilled", "MuggleMath", "Llama-2-7b", False, 68.4),
    ("distilled", "ToRA", "Llama-2-7b", True, 68.8),
    ("open", "SFT (Yuan et al. 2023)", "Llama-1-7b", False, 35.9),
    ("open", "SFT", "Llama-1-7b", True, 40.0),
    ("open", "RFT (K = 100, Yuan et al. 2023)", "Llama-1-7b", False, 41.7),
    ("open", "SFT (Yuan et al. 2023)", "Llama-2-7b", False, 41.6),
    ("open", "SFT", "Llama-2-7b", True, 45.1),
    ("open", "RFT (K = 100, Yuan et al. 2023)", "Llama-2-7b", False, 47.5),
    ("open", "SFT", "Llama-3-8b", True, 61.0),
    ("open", "DPO-ST (K = 10)", "Llama-1-7b", True, 44.7),
    ("open", "DPO-ST (K = 10)", "Llama-2-7b", True, 54.7),
    ("open", "DPO-ST (K = 10)", "Llama-3-8b", True, 68.8),
)

# Figure 4: how many times as fast as one question at a time, by batch size; None: not printed.
FIGURE_4_BATCHES = (8, 16, 32)
FIGURE_4 = {"with calculator": (5.8, 9.5, 13.9), "without calculator": (6.9, 12.3, 19.9)}

# Figure 5: accuracy on GSM8K's test set after iterations 0 to 3.
FIGURE_5 = {
    "Flan-T5-Base": {"ST": (18.1, 24.2, 26.0, 25.9), "DPO-ST": (18.1, 24.6, 26.6, 27.2)},
    "Flan-T5-Large": {"ST": (30.8, 32.9, 35.1, 35.6), "DPO-ST": (30.8, 34.1, 35.6, 37.4)},
}

# Figure 6: Flan-T5-Large before and after the DPO of the first iteration; pass@1 is greedy, both on dev.
FIGURE_6 = {"pass@1": (36.1, 36.5), "pass@10": (62.9, 64.8), "pseudo-labels": (2495, 2940)}

# Figure 7: accuracy of Flan-T5-Large on dev after iterations 0 to 3.
FIGURE_7 = {"with calculator": (36.7, 40.5, 43.9, 44.8), "without calculator": (16.3, 17.1, 17.8, 18.0)}
