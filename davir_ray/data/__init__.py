"""Rows: from files to records, texts, tokens and packs. Never a model, never Ray."""
