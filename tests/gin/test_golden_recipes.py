"""Golden texts: the resolved configuration of every recipe, so that a changed default shows in review.

Rewrite them, and read what changed, with

    bash launch/test.sh tests/gin/test_golden_recipes.py --update-golden && git diff tests/gin/golden
"""

import difflib
import inspect
import pathlib
import re

import pytest

from diffusion_t5x import train
from diffusion_t5x.command_line import config
from diffusion_t5x.models.config import ModelConfig

GIN = pathlib.Path(__file__).parents[2] / "gin"
GOLDEN = pathlib.Path(__file__).parent / "golden"
UPDATE = "bash launch/test.sh tests/gin/test_golden_recipes.py --update-golden"
# Given after a recipe that pretrains, alone or together, they turn it into another run.
QUICKSTART = "recipes/quickstart"
PRETRAINING = f"{QUICKSTART}/pretraining.gin"
SWAPS = {"encoder_decoder": "models/encoder_decoder.gin", "span_corruption": f"{QUICKSTART}/span_corruption.gin"}


def included(file: str) -> set[str]:
    """The files that a gin file includes, directly or not."""
    direct = re.findall(r'^include "(.+)"', (GIN / file).read_text(encoding="utf-8"), re.MULTILINE)
    return set(direct).union(*map(included, direct))


def is_runnable(recipe: str) -> bool:
    return any(file.startswith("runs/") for file in included(recipe))


# Given before a recipe that leaves open what is learned and how it is written.
PAPER1, TINY = "recipes/paper1", "recipes/tiny"
KINDS = {
    PAPER1: {"ar": [f"{PAPER1}/ar.gin"], "diffusion": [f"{PAPER1}/diffusion.gin"]},
    TINY: {
        "ar": ["objectives/autoregressive.gin", "decoding/autoregressive.gin"],
        "diffusion": ["objectives/sundae.gin", "decoding/sundae.gin"],
    },
}


def kinds(recipe: str) -> dict[str, list[str]]:
    found = KINDS.get(recipe.rpartition("/")[0], {"": []})
    if recipe == f"{PAPER1}/figure3.gin":
        return {"": []}
    return {"diffusion": found["diffusion"]} if recipe == f"{PAPER1}/adapt.gin" else found


RECIPES = sorted(path.relative_to(GIN).as_posix() for path in (GIN / "recipes").rglob("*.gin"))
VARIANTS = ([], ["encoder_decoder"], ["span_corruption"], ["encoder_decoder", "span_corruption"])
RUNS = {
    "+".join(filter(None, [recipe.removeprefix("recipes/").removesuffix(".gin"), kind, *swaps])): [
        *before,
        recipe,
        *map(SWAPS.get, swaps),
    ]
    for recipe in filter(is_runnable, RECIPES)
    for kind, before in kinds(recipe).items()
    for swaps in (VARIANTS if PRETRAINING in included(recipe) else VARIANTS[:1])
}
RUNS["paper1/pretrain+diffusion+span_corruption"] = [
    *KINDS[PAPER1]["diffusion"],
    f"{PAPER1}/pretrain.gin",
    f"{PAPER1}/span_corruption.gin",
]
RUNS["quickstart/adapt+all_conversions"] = [
    f"{QUICKSTART}/adapt.gin",
    "objectives/block.gin",
    *(f"adaptation/{name}.gin" for name in ("shifted", "annealed", "block_growth", "joint")),
]
RUNS["quickstart/adapt+aligned_conversions"] = [
    f"{QUICKSTART}/adapt.gin",
    "objectives/block.gin",
    *(f"adaptation/{name}.gin" for name in ("shifted", "annealed", "aligned", "block_growth")),
]
AR2DIFF = "recipes/ar2diff"
RUNS |= {
    f"ar2diff/shifted+{data}": [f"{AR2DIFF}/shifted.gin", f"{AR2DIFF}/shared/{data}.gin"]
    for data in ("texts", "jsonl_texts", "prompts", "chat")
}


def resolved(run: str) -> str:
    config.load(RUNS[run])
    return config.operative_text()


def differences(run: str) -> str:
    """A unified diff from the golden text of a run to its present one."""
    path = GOLDEN / f"{run}.txt"
    golden = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = golden.splitlines(keepends=True), resolved(run).splitlines(keepends=True)
    return "".join(difflib.unified_diff(*lines, f"golden/{run}.txt", f"{' '.join(RUNS[run])} now", n=2))


@pytest.mark.parametrize("run", RUNS)
def test_a_recipe_resolves_to_its_golden_text(run, request):
    if request.config.getoption("--update-golden"):
        (GOLDEN / f"{run}.txt").parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / f"{run}.txt").write_text(resolved(run), encoding="utf-8")
    if diff := differences(run):
        pytest.fail(f"If this is meant: {UPDATE}\n{diff}", pytrace=False)


def test_every_golden_text_has_a_recipe(request):
    orphans = {path for path in GOLDEN.rglob("*.txt") if path.relative_to(GOLDEN).as_posix()[:-4] not in RUNS}
    if request.config.getoption("--update-golden"):
        for path in orphans:
            path.unlink()
    elif orphans:
        pytest.fail(f"No recipe is called {sorted(map(str, orphans))}. To remove them: {UPDATE}", pytrace=False)


def test_every_recipe_is_run_or_part_of_one_that_is():
    parts = set().union(*(included(file) | {file} for files in RUNS.values() for file in files))
    assert set(RECIPES) <= parts


def test_nothing_in_a_text_is_of_this_machine():
    for run in RUNS:
        assert not re.search(r"/(root|home|tmp|usr|work)/| at 0x", resolved(run))


POLICY = train.CheckpointPolicy(keep_last=7)


@pytest.mark.parametrize(
    ("owner", "name", "changed", "line"),
    [
        (ModelConfig.__init__, "norm_epsilon", 1e-5, "model_config.ModelConfig.norm_epsilon = 1e-05"),
        (train.train, "ema_decay", 0.99, "train.train.ema_decay = 0.99"),
        (train.train, "checkpoint_policy", POLICY, f"# diffusion_t5x.train.train.checkpoint_policy = {POLICY}"),
    ],
)
def test_a_changed_default_shows(owner, name, changed, line, monkeypatch):
    run = "quickstart/adapt"
    if owner is train.train:
        signature = inspect.signature(owner)
        parameters = signature.parameters | {name: signature.parameters[name].replace(default=changed)}
        monkeypatch.setattr(owner, "__signature__", signature.replace(parameters=list(parameters.values())))
    else:
        owner = inspect.unwrap(owner)  # from the check of shapes
        names = [field for field in owner.__annotations__ if hasattr(ModelConfig, field)]
        defaults = dict(zip(names, owner.__defaults__, strict=True)) | {name: changed}
        monkeypatch.setattr(owner, "__defaults__", tuple(defaults.values()))
    added = [text[1:] for text in differences(run).splitlines() if re.match(r"\+[^+]", text)]
    assert added == [line]
