"""A demonstration with planted truth: a generated world, a base trained on the spot, what a selection makes of it."""
