"""The paper: pure functions of tensors and arrays; no configuration, no files, no Ray."""
