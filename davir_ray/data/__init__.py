"""Rows: from files to records, texts, tokens and shards; no model and no Ray."""
