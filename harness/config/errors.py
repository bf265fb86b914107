"""The one error of a configuration, apart from the schema: whoever raises or reports it needs no pydantic."""

from __future__ import annotations


class ConfigError(Exception):
    """The user's configuration is wrong. The message is one line and says what would be right."""
