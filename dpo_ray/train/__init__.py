"""Training: the step, the two loops, and what they save. ``offline.py`` and ``online.py`` are the algorithm."""
