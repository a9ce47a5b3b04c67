"""The one kernel of likelihoods: packing, attention, the losses of a forward pass, and its check."""
