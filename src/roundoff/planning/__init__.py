"""Before a run."""
