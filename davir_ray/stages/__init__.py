"""The stages of a run: prepare, finetune, score, rank, select, report, and what checks or previews a run.

A stage is a function of the run's folder and its own settings. It reads what earlier stages wrote, writes its own
folders, and writes its manifest last.
"""
