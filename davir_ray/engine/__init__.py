"""The Ray code that stages share: connecting, actor pools over shards, shuffles, training workers, progress."""
