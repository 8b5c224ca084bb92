"""No engine process outlives the process that started it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

WAIT_S = 20
OWNER = """
import subprocess, time
from dpo_ray.rollout.vllm_engine import guard
engine = subprocess.Popen(["sleep", "1000"])
guard(engine.pid)
print(engine.pid, flush=True)
time.sleep(1000)
"""


def test_an_engine_process_dies_with_a_killed_owner():
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]) as owner:
        assert owner.stdout
        engine = psutil.Process(int(owner.stdout.readline()))
        assert engine.is_running()
        os.kill(owner.pid, signal.SIGKILL)
        engine.wait(WAIT_S)
