"""What a rationale is: calculator, grading, templates, tokenizers."""
