"""The error of everything that is wrong with a model's files."""

from roundoff.errors import RoundoffError


class ModelError(RoundoffError, ValueError):
    """A model that cannot be loaded or asked; the message says what to do."""
