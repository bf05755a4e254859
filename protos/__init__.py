"""The contract between teacher server and student trainer: light, and imported by both."""
