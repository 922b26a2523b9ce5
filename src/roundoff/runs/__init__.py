"""What a run leaves on disk: its directory, checkpoints, metrics, outcomes and provenance. Nothing here trains a model.

The writer is `directory` alone, and the reader is `record`. Reports and comparisons of runs are in `roundoff.report`.

Doors: `directory`, `record`, `checkpoint`, `metrics`, `outcomes`, `health`, `files`, `provenance`, `clock`,
`strict_json`.
"""
