"""Many runs: on the cores of this machine, and on a cluster."""
