"""The error for everything that is wrong with a model's files."""


class ModelError(ValueError):
    """A model cannot be loaded, or cannot read a prompt; the message says what to do."""
