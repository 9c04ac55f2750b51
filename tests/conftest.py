"""Without a GPU the kernels run under Triton's interpreter; with one, the same tests run them compiled.

VIDLA_REQUIRE_GPU=1 turns a missing GPU into a failure (for a CI job that is meant to have one).
VIDLA_TEST_SEED=N repeats a run: inputs and layouts are fresh each time, and the seed is printed in the header.
"""

import os
import random
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated, so before any import of one
    os.environ.setdefault("VIDLA_EMULATE_CUDA", "1")

BASE_SEED = int(os.environ.get("VIDLA_TEST_SEED", random.SystemRandom().randrange(2**31)))


def pytest_report_header(config: pytest.Config) -> str:
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU, kernels interpreted"
    return f"vidla: VIDLA_TEST_SEED={BASE_SEED}, {kind}"


def pytest_sessionstart(session: pytest.Session) -> None:
    if os.environ.get("VIDLA_REQUIRE_GPU") == "1" and not torch.cuda.is_available():
        raise pytest.UsageError("VIDLA_REQUIRE_GPU=1, but torch sees no GPU")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed of its own for each test, from the run's seed and the test's name; torch is seeded with it."""
    value = (BASE_SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31
    print(f"seed {value} (VIDLA_TEST_SEED={BASE_SEED})")
    torch.manual_seed(value)
    return value


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
