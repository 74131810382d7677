"""Ids in, logits out: T5, Llama, their caches and their files."""
