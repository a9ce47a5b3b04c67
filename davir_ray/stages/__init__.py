"""The stages of a run, the only rooms with Ray: prepare, training, scoring, ranking, selection, reporting.

A stage is a function of the run's location and its own settings. It reads what earlier stages wrote, writes its folder,
and writes its manifest last.
"""
