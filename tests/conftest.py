"""One place for what every test runs under: offline, one thread, one hypothesis profile, fixed seeds."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))  # `import strategies` from any test folder

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "fasfx",
    deadline=None,
    max_examples=50,
    derandomize=bool(os.environ.get("CI")),
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("fasfx")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves the default dtype alone."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture
def functions_of_its_own() -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    from fasfx.ops import functions

    with mock.patch.dict(functions.FUNCTIONS), mock.patch.dict(functions.OPERATORS):
        yield
