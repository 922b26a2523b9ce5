"""The suite. Importing it has jaxtyping check the shapes in signatures of roundoff, before roundoff is imported."""

from jaxtyping import install_import_hook

import tests.shapes

CHECKED = ("training", "numerics", "hardware", "models", "sampling", "aqn", "srdd", "evaluation")
"""Rooms whose public functions take or return tensors."""
install_import_hook([f"roundoff.{room}" for room in CHECKED], f"{tests.shapes.__name__}.check")
