"""The verb shows the batch and what training step 1 reads of it; data never command the terminal."""

import re

import gin
import jax
import numpy as np
import optax
import pytest
import tiny

from diffusion_t5x.command_line import config
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import piece, visible
from diffusion_t5x.inspect_data import inspect_data
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.tasks import quickstart  # noqa: F401  (registers its tasks)
from diffusion_t5x.training.step import make_train_step, step_key

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

SEED = 7
TINIEST = ModelConfig(embed_dim=8, num_layers=1, num_heads=1, head_dim=8, mlp_dim=8)
HOSTILE = "[red]a [/red]\x1b[31m:smile:\x1b]0;t\x07\n\té\u202eb\x7f\x9b2J"
HARMLESS = "[red]a [/red]␛[31m:smile:␛]0;t␇␊␉é<U+202E>b␡<U+009B>2J"
POSITION = re.compile(r"^ *(\d+) +(\d+) +(\d+) +(\d+) +(\S+) +(inputs|targets) *(\S*) *$", re.MULTILINE)


def register(name, text):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensors({"inputs": text, "targets": text}),
            splits=("train",),
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        output_features=dict.fromkeys(("inputs", "targets"), seqio.Feature(seqio.ByteVocabulary(extra_ids=5))),
        metric_fns=[],
    )
    return SeqioDataset(name, {"inputs": 60, "targets": 60}, batch_size=2)


DATASET = register("test_hostile_text", HOSTILE)


@pytest.fixture(autouse=True)
def wide_and_without_colours(monkeypatch):
    """Wide enough that no cell is folded."""
    monkeypatch.setenv("COLUMNS", "250")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def table(tokens, segment_ids, positions, target_mask, reads, changed, dataset):
    """The strings that the table has to show for a row."""

    def show(token):
        return visible(dataset.piece(int(token))).replace(" ", "␣")

    marked = [f"⟦{show(r)}⟧" if c else show(r) for r, c in zip(reads, changed, strict=True)]
    return [
        (
            *map(str, (i, segment_ids[i], positions[i], tokens[i])),
            show(tokens[i]),
            "targets" if target_mask[i] else "inputs",
            "" if reads[i] == tokens[i] else marked[i],
        )
        for i in np.flatnonzero(segment_ids)
    ]


class FirstCall(Exception):
    pass


class Reader:
    """Stands in for a model, and stops at the first tokens that it reads."""

    def __init__(self, vocabulary):
        self.vocabulary, self.config = vocabulary, TINIEST

    def encode(self, batch, dropout_keys=None):
        return None

    def __call__(self, tokens, *arguments):
        raise FirstCall(np.asarray(tokens))


def first_reads(objective, dataset, batch):
    """The tokens that the loss of training step 1 reads first: noise is keyed by (seed, step)."""
    with pytest.raises(FirstCall) as stopped:
        objective.loss(Reader(dataset.token_ids()), batch, step_key(SEED, 0))
    return stopped.value.args[0]


PACKED = ["--gin.CANVAS=False", "--gin.train/SeqioDataset.pack=True"]
ENCODER_DECODER = ["--gin_file=models/encoder_decoder.gin"]


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("finetune_ar", PACKED),
        pytest.param("finetune_ar", ENCODER_DECODER, marks=pytest.mark.slow),
        ("finetune_diffusion", []),
        pytest.param("finetune_diffusion", ENCODER_DECODER + PACKED, marks=pytest.mark.slow),
    ],
    ids=["packed AR", "encoder-decoder AR", "canvas SUNDAE", "packed encoder-decoder SUNDAE"],
)
def test_the_table_is_the_batch_and_what_step_1_reads(recipe, flags, tmp_path, capsys):
    (tmp_path / "seed.gin").write_text(f"RANDOM_SEED = {SEED}")  # a run's own file, which the verb's must not override
    files = [f"recipes/quickstart/{recipe}.gin", tmp_path / "seed.gin", "runs/inspect_data.gin"]
    flags = [*(f"--gin_file={file}" for file in files), *flags, "--gin.BATCH_SIZE=4", "--gin.NUM_ROWS=3"]
    config.run(inspect_data, flags)
    shown = capsys.readouterr().out
    arguments = gin.get_bindings(inspect_data)
    dataset, objective = arguments["dataset"], arguments["objective"]
    assert dataset.seed == SEED
    batch = next(dataset.train_iterator())
    assert (batch.segment_ids.max() > 1) == dataset.pack
    reads = first_reads(objective, dataset, batch)
    there = batch.segment_ids > 0
    if isinstance(objective, Sundae):
        changed = (reads != batch.tokens) & there
        summary = f"{changed.sum() / batch.target_mask.sum():.1%} of the targets changed by noise"
        assert changed.any() and f"each token in its place, {summary}" in shown
    else:
        changed = np.zeros_like(there)
        assert "at each position the token before it, no noise" in shown
    for share, role in ((batch.target_mask, "targets (in the loss)"), (~there, "empty")):
        assert f"{share.mean():.1%} {role}" in shown
    expected = []
    for row in range(3):
        if batch.encoder_tokens is not None:
            tokens, segment_ids = batch.encoder_tokens[row], batch.encoder_segment_ids[row]
            no = np.zeros_like(tokens, bool)
            expected += table(tokens, segment_ids, batch.encoder_positions[row], no, tokens, no, dataset)
        arrays = batch.tokens, batch.segment_ids, batch.positions, batch.target_mask, reads, changed
        expected += table(*(array[row] for array in arrays), dataset)
    assert POSITION.findall(shown) == expected


@pytest.mark.slow
def test_training_step_1_has_the_noise_that_is_shown(capsys):
    dataset, objective = DATASET, Sundae()
    inspect_data(dataset=dataset, model=TINIEST, objective=objective, random_seed=SEED, dry_run=True)
    shown = capsys.readouterr().out
    definition = ModelDefinition(TINIEST, dataset.token_ids())
    mesh, optimizer = MeshConfig().make(), optax.sgd(0.1)
    abstract, state = tiny.fresh_state(mesh, definition, optimizer)
    with jax.set_mesh(mesh):
        step = make_train_step(mesh, abstract, definition, objective, optimizer, seed=SEED)
        _, metrics = step(state, next(dataset.train_iterator()))
    assert f"{float(metrics['noise_fraction']):.1%} of the targets changed by noise" in shown
    assert "row 0" not in shown  # a dry run shows the summary alone


def test_text_of_the_data_is_shown_and_never_obeyed(capsys):
    inspect_data(dataset=DATASET, model=TINIEST, objective=Autoregressive(), num_rows=1, positions=False)
    shown = capsys.readouterr().out
    first, second = HARMLESS.split("␊")
    lines = [line.strip() for line in shown.splitlines()]
    assert f"segment 1 inputs   {first}␊" in lines  # a line of the data is a line on the screen, with its end marked
    assert lines.count(f"{second}¶") == 1
    assert f"segment 1 targets  {first}␊" in lines
    assert f"model reads      ¶{first}␊" in lines  # shifted: the inputs' last token comes first
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert not POSITION.findall(shown)


def test_colours_are_all_that_a_terminal_is_told(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    inspect_data(dataset=DATASET, model=TINIEST, objective=Sundae(), num_rows=2)
    coloured = capsys.readouterr().out
    monkeypatch.delenv("FORCE_COLOR")
    inspect_data(dataset=DATASET, model=TINIEST, objective=Sundae(), num_rows=2)
    plain = capsys.readouterr().out
    without = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert coloured != without
    assert without == plain  # nothing is said by colour alone
    assert "\x1b[1;31m⟦" in coloured and "\x1b[1;33m¶\x1b[0m" in coloured
    assert "\x1b" not in plain


def test_mistakes_and_switches(capsys):
    files = ["--gin_file=recipes/quickstart/finetune_diffusion.gin", "--gin_file=runs/inspect_data.gin"]
    for flags, message in (
        (["--gin.NUM_ROWS=0"], "num_rows must lie between 1 and the 32 rows of a batch, not 0."),
        (["--gin.MIXTURE_OR_TASK_NAME=quickstart_pair"], "did you mean quickstart_pairs"),
        (["--gin.OBJECTIVE=%gin.REQUIRED"], "not set: OBJECTIVE."),
    ):
        with pytest.raises(SystemExit):
            config.run(inspect_data, [*files, *flags])
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out


def test_a_piece_is_the_part_of_the_text_that_its_token_holds():
    sentencepiece = SeqioDataset("quickstart_pairs", {}).vocabulary()  # puts a space before every text
    assert b"".join(piece(sentencepiece, token) for token in sentencepiece.encode(HOSTILE)).decode() == " " + HOSTILE
    assert piece(sentencepiece, sentencepiece.vocab_size - 1) == b" <extra_id_0>"
    vocabulary = seqio.ByteVocabulary(extra_ids=5)
    assert b"".join(piece(vocabulary, token) for token in vocabulary.encode(HOSTILE)).decode() == HOSTILE
    assert [piece(vocabulary, token) for token in (2, 3, 258, 259, 263)] == [
        b"<unk>", b"\0", b"\xff", b"<extra_id_4>", b"<extra_id_0>"
    ]  # fmt: skip
    assert piece(seqio.PassThroughVocabulary(27, eos_id=1), 26) == b" 26"
    assert DATASET.piece(DATASET.token_ids().mask_id).decode() == "▢"
    assert visible("é".encode()[:1]) == "<0xC3>"
