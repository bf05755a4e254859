"""Who writes the completions: the student itself, in this process."""
