"""The folder of a run: its files, its only driver, its complete stages and its progress. No Ray here."""
