"""Wheel, source distribution, editable install and plain checkout: each finds all modules, tasks and gin files.

Built by setuptools itself, so without the package registry; a wheel of pure Python is installed by unpacking it.
"""

import importlib.metadata
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("setuptools")
ROOT = pathlib.Path(__file__).resolve().parents[1]
CONTENT = ("setup.py", "pyproject.toml", "README.md", "diffusion_t5x", "tasks", "gin")
# Files that only the copy under test has: what is found is this very copy, whatever else is installed here.
PROBES = {
    "gin/probe/deeper/probe.gin": "A = 1\n",
    "gin/probe.gin": "include 'probe/deeper/probe.gin'\n",
    "tasks/probe.py": "",
}
FIND = """
import importlib.util, json
import gin
import diffusion_t5x
from diffusion_t5x.command_line import config, gin_reading

config.load(["probe.gin"])
config.load(["gin/probe.gin"])
found = {
    "package": diffusion_t5x.__file__,
    "tasks": importlib.util.find_spec("diffusion_t5x.tasks.probe").origin,
    "gin files": gin_reading.shipped(),
    "gin": gin.__file__,
}
print(json.dumps(found))
"""


def python(code, *path, cwd):
    """Runs `code` with the folders of `path`, then the libraries of this environment, but none of its .pth files."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*path, sysconfig.get_path("purelib")]))}
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(kind, source, folder):
    """Has setuptools build the `kind` (wheel, sdist, editable) of the checkout `source`; returns the file."""
    name = python(f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))", cwd=source)
    return folder / name.splitlines()[-1]


def files_of(source):
    """Names of the files that a wheel of the checkout `source` has to hold."""
    modules = {path.relative_to(source) for path in (source / "diffusion_t5x").rglob("*.py")}
    tasks = {pathlib.Path("diffusion_t5x") / path.relative_to(source) for path in (source / "tasks").rglob("*.py")}
    gin_files = {pathlib.Path("diffusion_t5x") / path.relative_to(source) for path in (source / "gin").rglob("*.gin")}
    templates = {
        pathlib.Path("diffusion_t5x/reporting") / name
        for name in ("report.html", "report.md", "trace_page.html", "trace_page.js")
    }
    templates |= {pathlib.Path("diffusion_t5x/serving") / name for name in ("page.html", "page.js")}
    return {path.as_posix() for path in modules | tasks | gin_files | templates}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout") / "repository"
    folder.mkdir()
    for name in CONTENT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    for name, text in PROBES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build("wheel", checkout, tmp_path_factory.mktemp("wheel"))


def test_wheel_holds_all_modules_tasks_and_gin_files_and_nothing_else(checkout, wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == files_of(checkout)
    assert {f"diffusion_t5x/{name}" for name in PROBES} < names


def test_wheel_of_the_source_distribution_is_the_same(checkout, wheel, tmp_path):
    archive = build("sdist", checkout, tmp_path)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    again = build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path)
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return archive.read(name).decode().splitlines()


@pytest.fixture(scope="module")
def asked(metadata):
    """The requirements of setup.py, extras included."""
    return [Requirement(line.removeprefix(start)) for line in metadata if line.startswith(start := "Requires-Dist: ")]


def test_metadata(metadata):
    assert {line for line in metadata if line.startswith("Provides-Extra: ")} == {
        f"Provides-Extra: {extra}"
        for extra in ("test", "wandb", "serve", "beam", "math", "hf", "lm-eval", "docs", "tpu", "pathways", "cuda")
    }
    assert "Name: diffusion_t5x" in metadata or "Name: diffusion-t5x" in metadata
    assert any(line.startswith("Requires-Python: ") and "3.11" in line and "3.14" in line for line in metadata)


@pytest.mark.parametrize(
    "kind",
    ["checkout", pytest.param("wheel", marks=pytest.mark.slow), pytest.param("editable", marks=pytest.mark.slow)],
)
def test_found_from_any_folder(kind, checkout, wheel, tmp_path):
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "checkout":
        location = checkout
        output = python(FIND, checkout, cwd=elsewhere)
    elif kind == "wheel":
        location = installed
        zipfile.ZipFile(wheel).extractall(installed)
        output = python(FIND, installed, cwd=elsewhere)
    else:
        location = checkout
        zipfile.ZipFile(build("editable", checkout, tmp_path)).extractall(installed)
        output = python(f"import site; site.addsitedir({str(installed)!r})\n{FIND}", installed, cwd=elsewhere)
    found = json.loads(output.splitlines()[-1])
    assert pathlib.Path(found["package"]) == location / "diffusion_t5x/__init__.py"
    assert pathlib.Path(found["tasks"]) == location / "diffusion_t5x/tasks/probe.py"
    assert found["gin files"] == sorted(
        str(path.relative_to(checkout / "gin")) for path in (checkout / "gin").rglob("*.gin")
    )
    assert pathlib.Path(found["gin"]).is_relative_to(sysconfig.get_path("purelib"))


def test_gin_folder_does_not_shadow_the_library(checkout):
    assert not list((ROOT / "gin").rglob("*.py"))
    # From the checkout itself, its folder `gin` comes first on the path.
    assert python("import gin; print(gin.parse_config.__name__)", checkout, cwd=checkout) == "parse_config\n"


PYTHONS = [{"python_version": f"3.{minor}", "python_full_version": f"3.{minor}.1"} for minor in (11, 12, 13)]
LEFT_OUT = {"seqio-nightly", "tfds-nightly"}  # install over seqio and tensorflow-datasets


def locked(python):
    """The versions in requirements.lock for a Python, by canonical name."""
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    pins = [Requirement(line.partition(" --hash")[0]) for line in text.splitlines() if not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(python)]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    return versions


def fits(requirement, versions, extra, python):
    if requirement.marker and not requirement.marker.evaluate(python | {"extra": extra}):
        return True
    version = versions.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(version, prereleases=True)


@pytest.mark.parametrize("python", PYTHONS, ids=lambda python: python["python_version"])
def test_the_lock_has_what_setup_asks_for(python, asked):
    versions = locked(python)
    assert len(asked) > 30
    assert not [str(one) for one in asked if not fits(one, versions, "test", python)]
    assert not LEFT_OUT & versions.keys()


def test_the_lock_is_complete():
    """The needs of its packages are in it, too: it is installed without looking for more."""
    python = {"python_version": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    versions = locked(python)
    installed = {canonicalize_name(d.name): d for d in importlib.metadata.distributions()}
    same = [name for name, version in versions.items() if name in installed and installed[name].version == version]
    assert len(same) > len(versions) / 2
    missing = {
        (name, line)
        for name in same
        for line in installed[name].requires or ()
        if not fits(Requirement(line), versions, "", python) and Requirement(line).name not in LEFT_OUT
    }
    assert not missing


def test_the_lock_has_hashes_and_names_no_registry():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert len(entries) > 100 and all("--hash=sha256:" in entry for entry in entries)
    assert "://" not in text and "-url" not in text and "--find-links" not in text


def test_every_requirement_has_an_upper_bound(asked):
    assert not [str(one) for one in asked if not any(part.operator in ("<", "==") for part in one.specifier)]
