"""A run while it trains: its status, its display, and the process that feeds trackers."""
