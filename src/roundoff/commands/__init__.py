"""The command line's options and arguments: one module a command, named like it; no module imports torch.

A command turns its options into a call of `roundoff.actions`, prints what that returns, and imports what it needs only
when it runs, so that `roundoff --help` is fast. Options that several commands share, and the reading of their text, are
in `options` and `ray_options`.

Doors: every module. `roundoff.cli` collects the command of each.
"""
