"""Group advantages, the policy loss and the schedule of AQN: `roundoff.algorithms.advantage`, `.loss`, `.schedule`."""
