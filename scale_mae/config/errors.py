"""Errors that the user can correct."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; its text is one line: what, where, what to do."""


class ConfigError(UserError):
    """A configuration that cannot run."""
