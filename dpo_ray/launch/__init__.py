"""Ray: the only package that imports it. Clusters, training workers, rollout engines, sweeps, and what a person sees."""
