"""From preference files to batches: reading, tokenising, the token store, packing and loading.

Import from the modules: reading and tokenising need no torch, packing and loading do.
"""
