"""select: which rows of ranked/ are selected, and the files that they are written to."""
