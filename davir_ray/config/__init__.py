"""The settings of the jobs: one file for each section, typed, validated when they are made."""
