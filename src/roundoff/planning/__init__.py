"""What runs will cost, in time, memory and seeds, before any of them is started.

The measured part (the variance between seeds, the seconds of a step) comes from run directories that already exist;
the rest comes from the sizes of the model and the rates of the machine. Power itself is computed in `roundoff.stats`,
and the options of `roundoff plan` are in `roundoff.commands.plan`. Importing this package never imports torch.

Doors: `cost_model` (`CostModel`, `Assumptions`, `default_assumptions`), `cost_table`, `machine.find_machine` and
`with_limits`, `seeds` (`measured_variance`, `measured_time`, `seeds_table`, `RunTime`), `shape.model_shape`.
"""
