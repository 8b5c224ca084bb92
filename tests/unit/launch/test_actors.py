"""The end of actors that hang."""

import signal
import subprocess
import time

import pytest

from dpo_ray.launch.rollouts.actors import kill_process


@pytest.mark.parametrize(("name", "dies"), [("ray::CollectorActor", True), ("another", False)])
def test_a_stopped_process_is_killed_if_it_is_an_actors(name: str, dies: bool) -> None:
    """The id of an actor that has died may be that of another process by then."""
    process = subprocess.Popen([name, "60"], executable="/bin/sleep")
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.05)
    try:
        kill_process(process.pid)
        if dies:
            assert process.wait(10) == -signal.SIGKILL
        else:
            time.sleep(0.1)
            assert process.poll() is None
    finally:
        process.kill()
        process.wait(10)
    kill_process(process.pid)
    kill_process(None)
