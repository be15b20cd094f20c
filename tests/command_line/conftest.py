"""The folder of the toy verb."""

import sys

import gin
import pytest
from toy import BASE_GIN, MODELS, TRAIN, registered

from diffusion_t5x.command_line import config


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with the package `toy_verbs` and gin files; on sys.path for the tests of this file."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_verbs").mkdir()
    (folder / "configs").mkdir()
    for path, text in {
        "toy_verbs/__init__.py": "",
        "toy_verbs/models.py": MODELS,
        "toy_verbs/train.py": TRAIN,
        "toy_verbs/broken.py": "import a_library_that_is_missing\n",
        "base.gin": BASE_GIN,
        "warmup.gin": BASE_GIN[: BASE_GIN.index("MODEL_DIR")] + "models.warmup.peak = 0.5\n",
        "configs/longer.gin": "include 'base.gin'\nTRAIN_STEPS = 200\n",
        "configs/beside.gin": "include 'longer.gin'\n",
    }.items():
        (folder / path).write_text(text)
    # gin never forgets a name by itself: `train.train` would be ambiguous here and in the tests that follow.
    ours = registered("diffusion_t5x.")
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    gin.clear_config()
    registered("toy_verbs.")
    for name in [name for name in sys.modules if name.partition(".")[0] == "toy_verbs"]:
        del sys.modules[name]  # another file's tests have a folder of their own
    for selector, configurable in ours.items():
        config.gin_config._REGISTRY[selector] = configurable
