"""Benchmarks against the machine and against other implementations; no run uses anything here."""
