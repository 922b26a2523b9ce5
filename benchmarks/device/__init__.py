"""The parts of `python -m benchmarks gpu`, each of which a process of its own works through (`worker`).

`machine` holds everything that only an accelerator has (events, memory statistics, the search for synchronisations),
and `results` the rows of the table and the time that is left.
"""
