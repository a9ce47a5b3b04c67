"""The formulas of the paper and the statistics, as pure functions: no configuration, no files, no Ray."""
