"""Direct preference optimisation, plain and normalised: an application of the stages."""
