"""Models: loading, sharding, scoring, the reference, and export."""
