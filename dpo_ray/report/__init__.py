"""Reports of runs and sweeps: key figures, health, plots, pages and summaries; ``live`` follows a running run."""
