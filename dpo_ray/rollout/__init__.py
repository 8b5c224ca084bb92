"""Rollouts: from prompts to preference pairs. Text and token ids in, records out; no Ray.

Reading order: ``collect`` (prompts, seeds and pairs of a round), ``judges`` and ``selectors`` (the replaceable parts),
``records`` (a round on disk), ``stream`` (rounds in flight), ``vllm_engine`` and ``stepping`` (generate the candidates).
"""
