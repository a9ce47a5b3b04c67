"""Preference training by DavIR-DPO and the losses it is compared with, built from the stages of a run."""
