"""Making many runs: each on a core of this machine, all of them under torchrun, or on a Ray cluster.

A run is described by a `RunRequest` and its progress by a `Job` (`request`); every way of launching makes it by
`request.execute`. What happens inside of one run is in `roundoff.training`, and what it leaves on disk in
`roundoff.runs`. `roundoff.actions.run` chooses the way and prints what became of the runs.

Doors: `request` (RunRequest, Job, execute, job_of), `local.run_grid`, `ranks.run_in_ranks`, `ray.grid.run_on_ray`,
`ray.cluster.RayOptions`, `progress` (Progress, not_computed).
"""
