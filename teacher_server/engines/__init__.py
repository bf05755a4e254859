"""The engines: what scores and continues ids."""
