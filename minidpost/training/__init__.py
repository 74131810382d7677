"""Losses, batches, and the two training loops."""
