"""DPO-augmented self-training (Wang, Li, Lu, ACL 2024, arXiv 2407.18248), written out in PyTorch.

The public API, for notebooks and examples; the commands import from the folders. See README.md and examples/dpo_st.py.
"""

from minidpost.data.datasets import load as load_dataset
from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.models.hub import find_model
from minidpost.models.weights import load_model, load_template, save_model, tokenizer_files
from minidpost.sampling.generate import Sample, generate
from minidpost.sampling.token_choice import SamplingSettings
from minidpost.selftraining.evaluation import SampledScores, Score, greedy_accuracy, sampled_scores
from minidpost.selftraining.methods import METHODS, Method
from minidpost.selftraining.presets import Preset, preset_for
from minidpost.selftraining.selection import Candidates, preference_pairs, pseudo_labels
from minidpost.text.calculator import evaluate_expression
from minidpost.text.grading import extract_answer, is_correct
from minidpost.text.tokenizer import load_tokenizer
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import DPOSettings, PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import Schedule
from minidpost.training.sft import SFTSettings, train_sft
from minidpost.version import __version__

__all__ = [
    "METHODS",
    "Candidates",
    "DPOSettings",
    "Example",
    "Method",
    "PreferencePair",
    "Preset",
    "SFTSettings",
    "Sample",
    "SampledScores",
    "SamplingSettings",
    "Schedule",
    "Score",
    "TokenizedExample",
    "UserError",
    "__version__",
    "evaluate_expression",
    "extract_answer",
    "find_model",
    "generate",
    "greedy_accuracy",
    "is_correct",
    "load_dataset",
    "load_model",
    "load_template",
    "load_tokenizer",
    "preference_pairs",
    "preset_for",
    "pseudo_labels",
    "reference_log_probabilities",
    "sampled_scores",
    "save_model",
    "tokenizer_files",
    "train_dpo",
    "train_sft",
]
