"""What gin files may import and name."""

import pytest

from diffusion_t5x import config
from diffusion_t5x.errors import UserError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import subprocess", "2: it imports subprocess, but gin files may use diffusion_t5x, seqio, t5, optax only"),
        ("from os import path", "--gin_allow=os.path."),
        ("import diffusion_t5x_evil.x", "it imports diffusion_t5x_evil.x, but"),
        ("from diffusion_t5x import train\nX = @train.os.system()", "3: it names train.os.system, which is in os, but"),
        ("from diffusion_t5x import train\ntrain.os.system.command = 'date'", "it names train.os.system"),
        ("from diffusion_t5x import train\nX = @train.sys.modules()", "it names train.sys.modules, which is in sys"),
        ("import optax\nX = @optax.adam.__globals__()", "optax.adam.__globals__"),
    ],
)
def test_gin_files_use_what_is_allowed(tmp_path, text, message):
    (tmp_path / "evil.gin").write_text(f"from __gin__ import dynamic_registration\n{text}\n")
    with pytest.raises(UserError) as caught:
        config.load([str(tmp_path / "evil.gin")])
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_what_was_written_is_allowed_and_gin_itself_is_not(tmp_path):
    (tmp_path / "written.gin").write_text("from __gin__ import dynamic_registration\nfrom gin import config\nX = 1\n")
    config.load([str(tmp_path / "written.gin")])
    (tmp_path / "gin.gin").write_text("import gin\n")
    with pytest.raises(UserError, match="it imports gin, but"):
        config.load([str(tmp_path / "gin.gin")])


def test_what_is_allowed_is_used(tmp_path):
    (tmp_path / "mine.gin").write_text("from __gin__ import dynamic_registration\nimport json.encoder\nimport optax\n")
    with pytest.raises(UserError, match=r"imports json\.encoder"):
        config.load([str(tmp_path / "mine.gin")])
    config.load([str(tmp_path / "mine.gin")], allowed=["json"])
