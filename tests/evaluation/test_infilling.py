"""Diffusion fills the holes of texts: nothing else changes, and a model that knows a text by heart fills it exactly."""

import dataclasses
import itertools
import json
import string

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import quick

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.templates import Templates
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.evaluation import traces
from diffusion_t5x.evaluation.inference import make_decode_step, predict
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.masked import Masked
from diffusion_t5x.objectives.sundae import Sundae
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.step import loss_and_gradients

seqio = pytest.importorskip("seqio")
tf = pytest.importorskip("tensorflow")

MESH = MeshConfig(data=1).make(jax.devices()[:1])
TEXTS = ["x=f(1,y)", "import a", "for c d:", "return 3", "a+b == c", "print(z)", "if not q", "[n, m+2]"]
VOCABULARY = seqio.ByteVocabulary()
seqio.TaskRegistry.add(
    "eight_lines",
    source=seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {"inputs": list(string.ascii_lowercase[: len(TEXTS)]), "targets": TEXTS}
        ),
        splits=("train",),
    ),
    preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
    output_features={name: seqio.Feature(VOCABULARY) for name in ("inputs", "targets")},
)
TASK = SeqioDataset("eight_lines", {"inputs": 2, "targets": 10}, batch_size=8)


def make_model(config):
    definition = ModelDefinition(dataclasses.replace(config, vocab_size=264), TASK.token_ids())
    return definition, tiny.random_params(definition)


def make_filler(definition, params, decoder, dataset, folder, trace=False):
    """A function from lines to records."""
    # Compiled once: a decoder's program has the model's vocabulary in it.
    definition = ModelDefinition(definition.config, definition.vocabulary.for_infilling())
    step = make_decode_step(MESH, definition, decoder, seed=0, trace=trace)

    def fill(lines):
        path = folder / "templates.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        data = Templates.read(str(path), dataset)
        assert data.token_ids() == definition.vocabulary
        texts = data.to_text, data.cells
        return list(predict(step, params, data.eval_batches(), MESH, *texts, text_mask=data.text_mask))

    return fill


def learn(definition, params, objective, batch, steps):
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, key):
        params, opt_state = carry
        _, grads = loss_and_gradients(definition, objective.loss, params, batch, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    @jax.jit
    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(0), steps))[0][0]

    return run(params)


@pytest.mark.parametrize(
    "config,objective,decoder,steps",
    [
        pytest.param(tiny.RELATIVE, Sundae(), SundaeDecoder(), 800, marks=pytest.mark.slow),
        pytest.param(tiny.ENCODER_DECODER, Masked(), MaskedDecoder(num_steps=4), 1600, marks=pytest.mark.slow),
    ],
    ids=["sundae decoder_only", "masked encoder_decoder"],
)
def test_texts_learnt_by_heart_are_filled_exactly(config, objective, decoder, steps, tmp_path):
    dataset = dataclasses.replace(TASK, architecture=config.architecture)
    definition, params = make_model(config)
    ((batch, _),) = dataset.eval_batches()
    params = learn(definition, params, objective, jax.tree.map(jnp.asarray, batch), steps)
    lines, texts, holes = [], [], []
    for name, text in zip(string.ascii_lowercase, TEXTS, strict=False):
        for spans in ([(0, 8)], [(0, 3)], [(5, 8)], [(1, 3), (4, 7)], [(0, 1), (2, 3), (7, 8)]):
            ends = [0, *(place for span in spans for place in span), len(text)]
            parts = [text[start:end] for start, end in itertools.pairwise(ends)]
            template = "".join(f"<hole:{len(part)}>" if n % 2 else part for n, part in enumerate(parts))
            lines.append({"template": template, "inputs": name})
            texts.append(text)
            holes.append(parts[1::2])
    records = make_filler(definition, params, decoder, dataset, tmp_path)(lines)
    assert [record["prediction"] for record in records] == texts
    assert [record["holes"] for record in records] == holes


PARTS = st.lists(st.text("ab ", max_size=3), min_size=2, max_size=4)


@pytest.fixture(scope="module")
def fillers(tmp_path_factory):
    """Random models, which write anything, by architecture and decoder."""
    made = {}
    for config in (tiny.RELATIVE, tiny.ENCODER_DECODER):
        dataset = dataclasses.replace(TASK, architecture=config.architecture, batch_size=1)
        folder = tmp_path_factory.mktemp("templates")
        for decoder in (SundaeDecoder(1, 2, 1.0), MaskedDecoder(3, temperature=1.0)):
            made[config.architecture, type(decoder)] = make_filler(
                *make_model(config), decoder, dataset, folder, trace=True
            )
    return made


@pytest.mark.parametrize("architecture", quick(["decoder_only", "encoder_decoder"], ["decoder_only"]))
@pytest.mark.parametrize("decoder", [SundaeDecoder, MaskedDecoder])
@settings(max_examples=15, deadline=None)
@given(parts=PARTS, data=st.data())
def test_what_is_given_never_changes_and_nothing_ends_in_a_hole(fillers, decoder, architecture, parts, data):
    parts[1:-1] = [part or "b" for part in parts[1:-1]]  # neighbouring holes would be one
    room = 9 - sum(map(len, parts))
    sizes = [data.draw(st.integers(1, max(1, room // (len(parts) - 1)))) for _ in parts[1:]]
    if sum(sizes) > room:
        return
    template = "".join(f"<hole:{size}>{part}" for size, part in zip(sizes, parts[1:], strict=True))
    (record,) = fillers[architecture, decoder]([{"template": parts[0] + template, "inputs": "a"}])
    shown = list(traces.frames(record["trace"]))
    assert len(shown[0]) == 10 and record["num_tokens"] == sum(sizes) and np.isfinite(record["score"])
    is_hole = [False] * len(parts[0])
    for size, part in zip(sizes, parts[1:], strict=True):
        is_hole += [True] * size + [False] * len(part)
    is_hole += [False] * (10 - len(is_hole))
    given = [*"".join(parts), "¶", *"·" * (9 - len("".join(parts)) - sum(sizes))]
    for frame in shown:
        assert [text for (text, _), hole in zip(frame, is_hole, strict=True) if not hole] == given
        assert all(text not in "¶·▢" or not text for (text, p), hole in zip(frame, is_hole, strict=True) if hole and p)
    assert [place for place, hole in enumerate(is_hole) if not hole] == record["trace"]["given"]
    assert all(p > 0 for (_, p), hole in zip(shown[-1], is_hole, strict=True) if hole)
    assert len(record["holes"]) == len(sizes)
    filled = [text for pair in zip(record["holes"], parts[1:], strict=True) for text in pair]
    # What is no UTF-8 is left out by the vocabulary, and has a sign in the holes.
    assert record["prediction"] == parts[0] + "".join(filled).replace("�", "")


def test_what_may_be_written_in_a_hole():
    ids = tiny.VOCABULARY.for_infilling()
    assert ids.noise_ranges == ((3, 20),) and ids.mask_id == ids.eos_id == ids.pad_id == 23 and ids.noise_only
    ids.check_same(tiny.VOCABULARY.describe(), "a checkpoint")
    drawn = np.asarray(ids.sample_noise(jax.random.key(0), (1000,)))
    assert set(drawn.tolist()) == set(range(*tiny.PIECES))
