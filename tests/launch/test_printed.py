"""Golden texts: the commands that each launcher would run, as --print shows them.

Rewrite them, and read what changed, with

    bash launch/test.sh tests/launch/test_printed.py --update-golden && git diff tests/launch/golden
"""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest
from stand_ins import LAUNCH, environment, run

ROOT = LAUNCH.parent
GOLDEN = pathlib.Path(__file__).parent / "golden"
SLICE = ["--name", "a_slice", "--zone", "a_zone"]
QUEUED = "--accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5\n  --spot"
CLUSTER = ["--cluster", "c", "--zone", "z", "--tpu-type", "v5p-128", "--workload", "w"]
CALLS = {
    "local": ("local.sh", ["2"]),
    "slurm": ("slurm.sh", []),
    "tpu_vm": ("tpu_vm.sh", [*SLICE, "--"]),
    "tpu_vm_queue": ("tpu_vm.sh", [*SLICE, "--project", "p", "--slices", "2", "--request", QUEUED, "--"]),
    "xpk_pathways": ("xpk.sh", ["--pathways", *CLUSTER, "--"]),
    "xpk": ("xpk.sh", [*CLUSTER, "--"]),
    "xpk_image": ("xpk.sh", [*CLUSTER, "--num-slices", "2", "--docker-image", "registry/image", "--"]),
}
# A verb and its flags, one of which a shell would take apart.
LENGTHS = '--gin.TASK_FEATURE_LENGTHS={"inputs": 8, "targets": 8}'
VERB = ["train", "--gin_file=recipes/quickstart/pretrain_ar.gin", LENGTHS]


def printed(name: str) -> str:
    script, arguments = CALLS[name]
    process = run(LAUNCH / script, "--print", *arguments, *VERB, env=environment(TMPDIR="/tmp"))
    assert process.returncode == 0, process.stderr
    return process.stdout.replace(str(ROOT), "ROOT")


@pytest.mark.parametrize("name", CALLS)
def test_printed_commands_are_the_golden_ones(name, request):
    golden = GOLDEN / f"{name}.txt"
    text = printed(name)
    if request.config.getoption("--update-golden"):
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", CALLS)
def test_flags_stay_whole_through_every_shell(name):
    found = shlex.split(printed(name).splitlines()[-1])
    inner = [shlex.split(word) for word in found if " " in word and "train" in word and LENGTHS in word]
    assert LENGTHS in found or any(LENGTHS in words for words in inner)


@pytest.mark.parametrize("script", sorted({script for script, _ in CALLS.values()}))
def test_without_a_verb_the_usage_is_shown(script):
    process = run(LAUNCH / script, "--print")
    assert process.returncode == 2 and f"bash launch/{script}" in process.stderr


def test_scripts_are_clean():
    folders = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join(folders))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra test)")
    scripts = [*map(str, LAUNCH.glob("*.sh")), str(ROOT / ".ci/run")]
    process = subprocess.run([shellcheck, "-x", "-P", "SCRIPTDIR", *scripts], capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
