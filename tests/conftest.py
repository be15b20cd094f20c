"""The surroundings of every test: the CPU, no chatter, and real data where the machine has some."""

import gc
import importlib.metadata
import logging
import os
import pathlib

import jaxtyping
import pytest

# JAX, TensorFlow and pytest make millions of objects that stay. Looking through all of them again and again takes a
# third of the time of their imports.
gc.set_threshold(100_000, 20, 10)

# Before JAX or TensorFlow is imported. The suite sees one device, as a laptop does: eight virtual ones would split the
# machine's few cores and change the numbers that single-device tests hold. Tests of meshes start a process of their own
# with `eight_devices`.
os.environ["JAX_PLATFORMS"] = "cpu"
# Tests compile much and compute little. Without the backend's optimisation that takes about half the time, and with the
# older emitters of fused loops, which do without MLIR, half of that again. (XLA stops at a flag that it does not know.)
FLAGS = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Programs that tests start compile anew, and leave nothing in the user's cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

# Calls of these modules check the shapes of their arrays.
ROOMS = [f"diffusion_t5x.{room}" for room in ("data.batch", "data.ends", "models", "objectives", "decoding")]
jaxtyping.install_import_hook([*ROOMS, "my_objective", "my_remasking"], "shape_checks.checked")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=30, help="how often tests/faults/test_kills.py kills")
    parser.addoption("--kill_seed", type=int, default=0, help="decides when it does")
    parser.addoption("--soak_minutes", type=float, default=2, help="how long tests/faults/test_soak.py trains")
    parser.addoption("--load_minutes", type=float, default=0.5, help="how long tests/serving/test_load.py asks")
    parser.addoption("--update-golden", action="store_true", help="rewrite the texts in tests/gin/golden")


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """The folder of real data that DIFFUSION_T5X_TEST_DATA names; skips where there is none."""
    folder = os.environ.get("DIFFUSION_T5X_TEST_DATA")
    if not folder:
        pytest.skip("DIFFUSION_T5X_TEST_DATA is not set: it names the folder of real test data")
    if not pathlib.Path(folder).is_dir():
        pytest.fail(f"DIFFUSION_T5X_TEST_DATA={folder} is not a folder")
    return pathlib.Path(folder)


@pytest.fixture(scope="session")
def isolation() -> None:
    """Skips where the machine does not let programs run in isolation."""
    from diffusion_t5x.evaluation.code import execution

    if not execution.protections().isolation:
        pytest.skip(f"no isolation on this machine: {execution.protections().reason}")


@pytest.fixture(scope="session")
def eight_devices() -> dict[str, str]:
    """The environment of a process that sees eight CPU devices: `subprocess.run(..., env=eight_devices)`."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    return os.environ | {"XLA_FLAGS": flags.strip()}


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch) -> pathlib.Path:
    """An empty folder that TFDS looks in, by constants that it took from the environment when it was imported."""
    seqio = pytest.importorskip("seqio")
    monkeypatch.setattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", str(tmp_path))
    monkeypatch.setattr(seqio.utils.LazyTfdsLoader, "_MEMOIZED_BUILDERS", {})
    return tmp_path


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> pathlib.Path:
    """The folder of `quickstart_runs.pretrain`."""
    from quickstart_runs import pretrain

    return pretrain(tmp_path_factory.mktemp("quickstart_runs"))


@pytest.fixture(scope="session")
def finetuned(pretrained) -> pathlib.Path:
    """The folder of `quickstart_runs.finetune`."""
    from quickstart_runs import finetune

    return finetune(pretrained)


@pytest.fixture(autouse=True)
def _fresh_logging():
    """The verbs' logger as a new process has it: no test's records depend on the tests before it."""
    logger = logging.getLogger("diffusion_t5x")
    logger.handlers, logger.propagate = [], True
