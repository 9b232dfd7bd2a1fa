"""Errors that the user can correct."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can correct. Its text is one line: what is wrong, where, and what to do."""


class ConfigError(UserError):
    """A configuration that cannot run."""
