"""The status actor of a run on a cluster: its death ends nothing."""

import time

import ray

from dpo_ray.launch.status import ask_status, start_status_actor


def test_a_status_actor_that_dies_is_restarted_empty_and_one_that_is_gone_answers_nothing(joined_cluster: None) -> None:
    actor = start_status_actor()
    assert ask_status(actor, "request_stop") is False
    assert ask_status(actor, "stop_requested") is True
    ray.kill(actor, no_restart=False)
    deadline = time.monotonic() + 60
    while (requested := ask_status(actor, "stop_requested")) is not False and time.monotonic() < deadline:
        time.sleep(0.2)
    assert requested is False
    ray.kill(actor)
    assert ask_status(actor, "stop_requested") is None
