"""The processes of a run: ranks, launcher, network, signals, watchdog, exit."""
