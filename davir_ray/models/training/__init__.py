"""The training loop: batches of examples or pairs, one process or several."""
