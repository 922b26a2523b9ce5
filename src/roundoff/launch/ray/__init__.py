"""Runs on a Ray cluster: the driver's side (`grid`), the nodes' side (`worker`), and the copying of files (`sync`).

Each run is one Ray task. With a directory that all nodes share, the task writes there; otherwise its files are sent
back to the driver while it runs. One larger run on several devices is not made here but under torchrun
(`roundoff.launch.ranks`).

Doors: `grid.run_on_ray`, `cluster.RayOptions`.
"""
