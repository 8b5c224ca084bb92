"""Sweeps without Ray: the records of trials and of the sweep itself, which the launcher writes and reports read."""
