"""DPO at scale on Ray: sharded training, vLLM rollouts, iterative preference rounds and sweeps.

Read ``train/offline.py`` and ``train/online.py`` first: those two files are the algorithm.
"""
