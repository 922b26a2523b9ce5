"""The error of everything that is wrong with a model's files."""


class ModelError(ValueError):
    """A model that cannot be loaded or asked; the message says what to do."""
