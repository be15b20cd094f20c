"""Gin files import and name allowed modules only."""

import pytest

from diffusion_t5x.command_line import config
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


def run(verb, *flags):
    """Runs a verb that must end with a usage error."""
    with pytest.raises(SystemExit) as stopped:
        config.run(verb, list(flags))
    assert stopped.value.code == 2


IMPORTS = "from __gin__ import dynamic_registration\n"
LOADERS = [
    "from diffusion_t5x import config\nX = @config.load()\nconfig.load.gin_files = ['/tmp/evil.gin']",
    "from diffusion_t5x import config\nX = [{'a': (@scope/config.load(), 1)}]",
    "from diffusion_t5x import cache_tasks\nX = @cache_tasks.cache_tasks()",
    "import seqio\nX = @seqio.get_mixture_or_task()",
    "from diffusion_t5x.tasks import quickstart\nX = @quickstart._write_atomically()",
    "from gin import config\nfrom diffusion_t5x import train\nX = @train.train()",
]


@pytest.mark.parametrize("text", LOADERS)
@pytest.mark.parametrize("beside", ["checkpoints", "checkpoint_0", "nothing"])
def test_no_gin_file_calls_what_loads(text, beside, tmp_path):
    (tmp_path / beside).mkdir()
    (tmp_path / "model.gin").write_text(f"{IMPORTS}{text}\n")
    with pytest.raises(UserError, match=r"model\.gin:\d+: it refers to .*, which does more than make settings"):
        config.load([str(tmp_path / "model.gin")])


def test_what_lies_beside_a_checkpoint_refers_to_less(tmp_path):
    text = f"{IMPORTS}import t5.data.preprocessors\nX = @t5.data.preprocessors.lm\n"
    (tmp_path / "mine.gin").write_text(text)
    config.load([str(tmp_path / "mine.gin")])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"refers to t5\.data\.preprocessors\.lm"):
        config.load([str(tmp_path / "mine.gin")])
    config.load([str(tmp_path / "mine.gin")], allowed=["t5.data.preprocessors"])


@pytest.mark.parametrize(
    "included", ["/etc/passwd", "beside.gin", "gs://bucket/x.gin", "s3://bucket/x.gin", "http://x/y"]
)
def test_what_comes_with_a_checkpoint_includes_shipped_files_only(included, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "beside.gin").write_text("X = 1\n")
    (tmp_path / "model.gin").write_text(f"include '{included}'\n")
    with pytest.raises(UserError, match="it includes"):
        config.load([str(tmp_path / "model.gin")])
    with pytest.raises(UserError, match="the configuration of somebody: it includes"):
        config.load([], search_paths=[str(tmp_path)], texts={"the configuration of somebody": f"include '{included}'"})
    (tmp_path / "model.gin").write_text("include 'models/decoder_only.gin'\n")
    config.load([str(tmp_path / "model.gin")])


@pytest.mark.parametrize("address", ["gs://bucket/v.model", "s3://bucket/v.model", "https://host/v.model"])
def test_what_comes_with_a_checkpoint_names_no_address(address, tmp_path, capsys):
    from diffusion_t5x import train

    pytest.importorskip("seqio")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "model.gin").write_text(f"VOCABULARY_FILE = '{address}'\n")
    flags = ["--gin_file=models/decoder_only.gin", "--gin_file=sizes/tiny.gin", "--gin_file=objectives/sundae.gin"]
    flags += ["--gin_file=runs/pretrain.gin", "--gin_file=tasks/local_text.gin", f"--gin_file={tmp_path}/model.gin"]
    flags += [f"--gin.MODEL_DIR={tmp_path}/made", "--gin.TRAIN_STEPS=1", '--gin.FILES={"train": "x"}']
    flags += ['--gin.TASK_FEATURE_LENGTHS={"inputs": 8, "targets": 8}']
    run(train.train, *flags)
    said = capsys.readouterr().err
    assert f"model.gin:1: VOCABULARY_FILE names '{address}'" in said and "--gin.VOCABULARY_FILE=" in said
    run(train.train, *flags, f"--gin.VOCABULARY_FILE={address}")
    assert "unasked" not in capsys.readouterr().err


def test_modules_that_are_named_by_text_must_be_allowed(tmp_path):
    (tmp_path / "model.gin").write_text("include 'runs/cache_tasks.gin'\nTASK_MODULES = ['antigravity']\n")
    with pytest.raises(UserError, match=r"imports antigravity\. If you trust it, add --gin_allow=antigravity"):
        config.load([str(tmp_path / "model.gin")])
    config.load([str(tmp_path / "model.gin")], allowed=["antigravity"])
    (tmp_path / "model.gin").write_text(
        "include 'runs/cache_tasks.gin'\nTASK_MODULES = ['diffusion_t5x.tasks.quickstart']\n"
    )
    config.load([str(tmp_path / "model.gin")])


def test_the_name_of_a_folder_is_no_gin(tmp_path):
    from diffusion_t5x.importing.output import model_gin
    from diffusion_t5x.models.config import ModelConfig

    model = ModelConfig(embed_dim=8, num_layers=1, num_heads=1, head_dim=8, mlp_dim=8)
    odd = "a\nimport os\nX = '\r\x85\u2028"
    text = model_gin(f"{odd} imported", model, "TOKENIZER_FILE", tmp_path / odd / "tokenizer.json")
    assert "\nimport os" not in text and "\nX" not in text
    (tmp_path / "model.gin").write_text(text)
    config.load([str(tmp_path / "model.gin")])
    assert config.gin.query_parameter("TOKENIZER_FILE/gin.macro.value") == str(tmp_path / odd / "tokenizer.json")


@pytest.mark.parametrize("value", ["True", "%X", "1"])
def test_only_users_may_allow_unsafe_programs(value, tmp_path):
    text = f"{IMPORTS}from diffusion_t5x.tasks import code_synthesis\nX = True\ncode_synthesis.mbpp.allow_unsafe = "
    (tmp_path / "mine.gin").write_text(text + value)
    config.load([str(tmp_path / "mine.gin")])
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"mine\.gin:4: it sets allow_unsafe, which only you may"):
        config.load([str(tmp_path / "mine.gin")])
    with pytest.raises(UserError, match="it sets allow_unsafe"):
        config.load([], texts={"the record": text + value})
    config.load([str(tmp_path / "mine.gin")], ["code_synthesis.mbpp.allow_unsafe = True"])
    (tmp_path / "mine.gin").write_text(f"{text}False")
    config.load([str(tmp_path / "mine.gin")])


def test_a_link_beside_a_checkpoint_is_not_the_user_s(tmp_path):
    (tmp_path / "model" / "checkpoints").mkdir(parents=True)
    (tmp_path / "model" / "docs").mkdir()
    text = f"{IMPORTS}import t5.data.preprocessors\nX = @t5.data.preprocessors.lm\n"
    (tmp_path / "model" / "docs" / "real.gin").write_text(text)
    (tmp_path / "model" / "model.gin").symlink_to("docs/real.gin")
    with pytest.raises(UserError, match=r"refers to t5\.data\.preprocessors\.lm"):
        config.load([str(tmp_path / "model" / "model.gin")])
    (tmp_path / "model" / "docs" / "real.gin").write_text("include '../secret.gin'")
    (tmp_path / "secret.gin").write_text("X = 1")
    with pytest.raises(UserError, match="may include shipped gin files only"):
        config.load([str(tmp_path / "model" / "model.gin")], search_paths=[str(tmp_path / "model")])
