"""A study on real rows with planted noise: when is a reference that has not seen what it scores the better one?"""
