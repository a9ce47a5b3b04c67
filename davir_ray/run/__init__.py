"""The folder of a run: what lies in it, whose it is, what is complete. No Ray here."""
