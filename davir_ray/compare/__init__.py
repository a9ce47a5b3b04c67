"""Does the selection train a better model? An application of the stages."""
