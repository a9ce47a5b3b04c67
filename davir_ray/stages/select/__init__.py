"""select: which rows of ranked/ are taken, and what is written of them."""
