"""What is generic on Ray: connecting, shards through a pool of actors, rows that meet."""
