"""Measurements, and the rivals' ways of doing the same: nothing here is used by a run."""
