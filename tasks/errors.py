"""Errors of data and assets: each message is one line that says what is wrong and what would be right."""

from __future__ import annotations


class DataError(Exception):
    """Text, tasks or files are missing or unfit."""


class AssetError(DataError):
    """An asset is unknown, or could not be fetched whole."""


class HubError(AssetError):
    """The hub or the way to it failed, not what was asked of it: the same may succeed later."""
