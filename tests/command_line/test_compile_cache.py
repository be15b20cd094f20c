"""Compiled programs stay in the user's cache, for the next start."""

import os
import subprocess
import sys

import pytest

# Prints how many programs came from the cache, and where the cache is.
PROGRAM = """
from diffusion_t5x.command_line import config
if {early}:
    import jax
with config.program():
    import jax
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("cache_hits")))
    jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((64, 64))).block_until_ready()
    print(sum(hits), jax.config.jax_compilation_cache_dir)
"""


def start(cache, early=False, **settings):
    taken = {"JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE"}
    environment = {name: value for name, value in os.environ.items() if name not in taken}
    environment |= {"XDG_CACHE_HOME": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | settings
    program = [sys.executable, "-c", PROGRAM.format(early=early)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    hits, folder = done.stdout.split()
    return int(hits), folder


@pytest.mark.slow
@pytest.mark.parametrize("early", [False, True])
def test_a_second_start_compiles_nothing(early, tmp_path):
    hits, folder = start(tmp_path, early)
    assert hits == 0 and folder.startswith(str(tmp_path / "diffusion_t5x" / "compiled"))
    written = set(os.listdir(folder))
    assert written
    hits, _ = start(tmp_path, early)
    assert hits > 0 and {name for name in os.listdir(folder) if name.endswith("-cache")} <= written


@pytest.mark.slow
def test_it_is_switched_off_and_moved_by_jaxs_own_settings(tmp_path):
    assert start(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")) == (0, str(tmp_path / "own"))
    assert os.listdir(tmp_path / "own") and not (tmp_path / "diffusion_t5x").exists()
    start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")
    assert not (tmp_path / "diffusion_t5x").exists()


@pytest.mark.parametrize(
    "several", [{"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, {"JAX_NUM_CPU_DEVICES": "2"}]
)
def test_several_cpu_devices_keep_none(several, tmp_path):
    assert start(tmp_path, **several) == (0, "None")
    assert not (tmp_path / "diffusion_t5x").exists()
