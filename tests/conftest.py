"""What every test shares: no network, one thread, fixed seeds, and shape annotations that are checked as the code runs.

The import hook below puts beartype and jaxtyping on every function and dataclass of the package, so each test is also a
test of the shapes in its signatures. It must be in place before the first `import hydra_rlhf`, hence this file.
"""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HUB_DIR = tempfile.mkdtemp(prefix="hydra-rlhf-tests-")
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HOME=HUB_DIR,  # a developer's own cache must not decide whether a test passes
    MPLBACKEND="Agg",
    CUBLAS_WORKSPACE_CONFIG=":4096:8",  # deterministic matrix products on CUDA need it before the first one
)

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

assert "hydra_rlhf" not in sys.modules, "hydra_rlhf was imported before the shape checks were in place"
# is_pep484_tower: an int is welcome where a float is asked for, as in static typing.
install_import_hook("hydra_rlhf", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    """Remove the empty hub cache of this process."""
    shutil.rmtree(HUB_DIR, ignore_errors=True)


@pytest.fixture(autouse=True)
def repeatable() -> None:
    """Seed the global generators, so that a test does not depend on which tests ran before it."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def no_bfloat16_units() -> Iterator[None]:
    """`model.dtype=auto` is float32 on every machine that runs the tests; what it is elsewhere is tested by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra_rlhf.model.device.has_bfloat16_units", lambda device: False)  # noqa: ARG005
        yield


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the checkout: real preference data cut small, and one small pre-trained model."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip(f"the real data of this test is not here: no folder {folder}")
    return folder
