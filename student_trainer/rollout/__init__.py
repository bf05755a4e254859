"""Who writes the completions: the student itself, in this process or on a server of its own."""
