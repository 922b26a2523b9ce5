"""What the processes (ranks) of one run exchange: values, gradients, and the agreement to stop.

The code of a run is the same for one process as for many. Starting processes, on this machine or on a cluster, is in
`roundoff.launch`; the loop that the ranks run together is in `roundoff.training`. Importing this package never imports
torch.

Doors: `ranks` (`Ranks`, `ALONE`, `joined`, `launched`), and `messages.MessageError` with `encode` and `decode`.
"""
