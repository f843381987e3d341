"""Studies of hardware: a figure of the machine is changed, and what it does to a step is shown."""
