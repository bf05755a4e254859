"""What every table of the config shares, and the error of all of them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key, the value and the fix."""


class Section(BaseModel):
    """One table of the config: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
