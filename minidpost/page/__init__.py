"""One HTML page about runs: their results, trainings and rationales, and the paper's exhibits; it only reads."""
