"""The documentation as a site: every page has its place, and the build finds no broken link."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def test_every_page_has_its_place_once():
    named = re.findall(r": ([\w./-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "macros" / "index.html").exists()


def test_the_picture_of_the_readme_is_a_trace_in_motion():
    picture = (ROOT / "docs" / "images" / "canvas.svg").read_text(encoding="utf-8")
    assert picture.startswith("<!-- diffusion_t5x canvas -->") and "@keyframes" in picture
    assert "(docs/images/canvas.svg)" in (ROOT / "README.md").read_text(encoding="utf-8")
