"""The error for everything that is wrong with a model's files."""

from roundoff.errors import RoundoffError


class ModelError(RoundoffError, ValueError):
    """A model cannot be loaded, or cannot read a prompt; the message says what to do."""
