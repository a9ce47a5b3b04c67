"""The folder of a run: its files, its one driver, its complete stages and its progress. No Ray here."""
