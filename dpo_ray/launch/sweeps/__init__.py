"""The parts of a sweep that use Ray: its space, searchers and schedulers of Ray Tune, and the slots that run trials."""
