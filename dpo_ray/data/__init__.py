"""From preference files to batches: reading, tokenizing, the token store, packing and loading.

Import from the modules: reading and tokenizing need no torch, packing and loading do.
"""
