"""From preference files to batches: reading records, tokenising them, the token store, the order of the data.

The names are imported from their modules: reading and tokenising need no torch, packing and loading do.
"""
