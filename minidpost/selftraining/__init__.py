"""The paper: Algorithms 1 and 2 as stages of a run."""
