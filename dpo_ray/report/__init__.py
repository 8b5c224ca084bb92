"""Reports: key figures, health, plots and the page of a run. ``page`` and ``plots`` import matplotlib."""
