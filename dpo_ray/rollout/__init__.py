"""Rollouts: from prompts to preference pairs. Text and token ids in, files out; asyncio, no Ray.

Reading order: ``pipeline`` (the way of a group), ``collector`` (rounds and evaluations), ``rounds`` (which
prompts, and when), ``ledger`` (a round on disk), ``judging``, ``judges`` and ``selectors``; ``engine`` (the
protocol), ``dispatch`` (requests to engines), ``fleet`` with ``membership`` and ``updates`` (the life of engines),
``vllm_engine`` with ``stepping`` and ``vllm_requests`` (the real one).
"""
