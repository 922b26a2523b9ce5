"""The suite. Importing it has the shapes in signatures of roundoff checked, before roundoff is imported."""

from tests.shapes import check_imports

CHECKED = ("training", "numerics", "hardware", "models", "sampling", "aqn", "srdd", "evaluation")
"""Rooms whose public functions take or return tensors."""
check_imports([f"roundoff.{room}" for room in CHECKED])
