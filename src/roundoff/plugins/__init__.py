"""roundoff inside of training loops that others wrote: verl (`verl`) and trl's GRPOTrainer (`trl`).

A plugin puts hardware and AQN where that loop needs them, and refuses what it cannot simulate there. roundoff's own
loop is in `roundoff.training`; hardware, AQN and tasks come from their own rooms. Each plugin needs its package
installed: `pip install 'roundoff[trl]'` or `'roundoff[verl]'`.

Doors: `trl` (AqnCallback, install_in_trainer, uninstall_from_trainer), for users; `verl.command` and `verl.parquet`,
for `roundoff verl-config`; `verl.entry` and `verl.entry_point`, which verl imports.
"""
