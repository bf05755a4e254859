"""The demos, and the worlds and models that they and the study run in."""
