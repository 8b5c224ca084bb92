"""Checks of an online run before it starts."""

import pytest

from dpo_ray.config import Config
from dpo_ray.launch.online import note_on_reference


@pytest.mark.parametrize(
    ("source", "sections", "noted"),
    [
        ("self_play", {"reference": {"refresh": "never"}}, True),
        ("self_play", {}, False),
        ("self_play", {"reference": {"refresh": 3}}, False),
        ("self_play", {"loss": {"use": "simpo"}}, False),
        ("candidates", {"reference": {"refresh": "never"}}, False),
    ],
)
def test_self_play_whose_reference_is_never_refreshed_is_noted(source, sections, noted):
    online = {"prompts": "p.jsonl", "source": {"use": source}}
    note = note_on_reference(Config.model_validate({"model": {"path": "m"}, "online": online, **sections}))
    assert bool(note) is noted
    assert note is None or "set reference.refresh: round" in note
