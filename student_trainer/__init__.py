"""Trains a student on its own rollouts, scored token by token by a teacher reached by URL."""
