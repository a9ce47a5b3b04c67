"""What a job is asked for: a section a file, typed, validated when it is made."""
