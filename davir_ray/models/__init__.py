"""One process and its models: checkpoints, packed attention, the likelihood kernel, scoring and fine-tuning; no Ray."""
