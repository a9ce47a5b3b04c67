"""The likelihood kernel: packing, attention, the losses of a forward pass, and its check at start-up."""
