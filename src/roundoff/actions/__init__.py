"""What the commands do once their options are read: run, sweep, extend, evaluate, export, show, scan, plan, compare.

An action is named like its command (`evaluate` is that of `roundoff eval`) and calls the rooms below: training, report,
planning and so on. Options are read in `roundoff.commands`. Most actions return what is to be printed; `run` and `scan`
print while they work. `terminal` holds the streams and tables that everything is printed with.

Doors: every module. `roundoff.commands` calls their functions, and the entry point uses `terminal`.
"""
