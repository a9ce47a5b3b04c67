"""Versions of what a run computes: part of fingerprints, so that what another version computed is not taken for it."""

PREPARE_VERSION = 2
"""To be increased with any change that may make other examples of the same records."""

DEAL_VERSION = 1
"""To be increased when other rows may get other folds, or be dropped as near duplicates."""

NUMERICS_VERSION = 2
"""To be increased when a change in models/kernel/ may change the bits of a score. Not for what changed on GPUs alone
before any had run this."""
