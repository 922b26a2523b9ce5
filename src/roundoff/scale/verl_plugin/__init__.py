"""in work by helper verl

A plugin for verl: the hardware in every actor and rollout worker, AQN at each weight sync.
"""
