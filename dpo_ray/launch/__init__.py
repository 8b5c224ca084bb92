"""The only package that imports Ray: clusters, training workers, rollout engines, sweeps, and what a person sees."""
