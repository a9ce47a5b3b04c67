"""Models in one process, without Ray: checkpoints, packed attention, the likelihood kernel, scoring and fine-tuning."""
