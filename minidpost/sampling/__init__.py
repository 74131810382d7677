"""Batched decoding with forced tokens."""
