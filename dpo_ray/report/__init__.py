"""What a run shows: its figures, its health, its pictures and its page.

Import from the modules: ``report`` draws with matplotlib, which a training worker has no need to load.
"""
