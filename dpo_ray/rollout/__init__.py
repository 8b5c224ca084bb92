"""Rollouts: from prompts to preference pairs. Text and token ids in, records out; no torch and no Ray.

Reading order: ``collect`` (which prompts, which seeds, which pairs), ``judges`` and ``selectors`` (the replaceable
parts), ``records`` (a round on disk), ``stream`` (rounds in flight), ``engine`` (what writes the candidates).
"""
