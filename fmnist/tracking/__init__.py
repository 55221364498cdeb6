"""Numbers out: metrics.jsonl, a progress bar, Weights & Biases."""
