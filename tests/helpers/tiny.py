"""Tiny models, a vocabulary with every kind of id, and batches of random examples, for all tests."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import TokenIds
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.experts import Experts
from diffusion_t5x.models.output import Output
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.training.state import TrainState, abstract_state

# 0 pad, 1 EOS, 2 unknown, 3..19 pieces, 20..22 sentinels, 23 MASK; the embedding has rows up to 31 that mean nothing.
VOCABULARY = TokenIds(
    size=24, pad_id=0, eos_id=1, mask_id=23, start_id=0, noise_ranges=((0, 2), (3, 20)), resize_ids=(21, 22)
)
PIECES = (3, 20)

RELATIVE = ModelConfig(embed_dim=16, num_layers=2, num_heads=4, head_dim=4, mlp_dim=32, vocab_size=32)
ROTARY = dataclasses.replace(RELATIVE, position="rotary")
LLAMA = dataclasses.replace(  # everything that T5 does not have
    ROTARY, num_kv_heads=2, activation="silu", tie_embeddings=False, query_key_norm=True, attention_scale=0.5
)
GPT2 = dataclasses.replace(  # everything that neither has
    RELATIVE,
    position="learned",
    norm="layer",
    gated=False,
    qkv_bias=True,
    output_bias=True,
    attention_scale=0.5,
    logits_scale=1.0,
    max_length=32,
)

EXPERTS = dataclasses.replace(  # all that a mixture may have
    LLAMA,
    num_layers=3,
    rotary_dim=2,
    experts=Experts(
        number=8, per_token=3, mlp_dim=5, shared_mlp_dim=6, dense_layers=1, scores="sigmoid", scale=2.5, groups=4,
        groups_per_token=2, selection_bias=True, balance_weight=0.5,
    ),
)  # fmt: skip

ENCODER_DECODER = dataclasses.replace(RELATIVE, architecture="encoder_decoder", tie_embeddings=False)

Example = tuple[Sequence[int], Sequence[int]]  # inputs, targets


def random_params(definition: ModelDefinition, seed: int = 0) -> Params:
    """Random parameters of moderate size each; the model's own initialiser takes seconds to compile."""
    rng = np.random.default_rng(seed)

    def random(path, leaf):
        values = rng.standard_normal(leaf.shape).astype(np.float32)
        name = path[-1].key
        return jnp.asarray(1 + 0.2 * values if name == "scale" else values if name == "embedding" else 0.3 * values)

    return jax.tree_util.tree_map_with_path(random, definition.abstract())


def make_model(config: ModelConfig = RELATIVE, seed: int = 0) -> tuple[ModelDefinition, Params]:
    definition = ModelDefinition(config, VOCABULARY)
    return definition, random_params(definition, seed)


def fresh_state(
    mesh: Mesh, definition: ModelDefinition, optimizer: optax.GradientTransformation, keep_ema: bool = False
) -> tuple[TrainState, TrainState]:
    """The abstract state, and a state with random parameters in its place on the mesh."""
    params = random_params(definition)
    ema = jax.tree.map(jnp.copy, params) if keep_ema else None
    state = TrainState(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), ema=ema)
    abstract = abstract_state(mesh, definition, optimizer, keep_ema)
    return abstract, jax.tree.map(lambda x, at: jax.device_put(jnp.copy(x), at.sharding), state, abstract)


def random_example(rng: np.random.Generator, num_inputs: int, num_targets: int) -> Example:
    return rng.integers(*PIECES, num_inputs).tolist(), rng.integers(*PIECES, num_targets).tolist()


def random_examples(seed: int, sizes: Sequence[tuple[int, int]]) -> list[Example]:
    """An example for each `(number of inputs, number of targets)`."""
    rng = np.random.default_rng(seed)
    return [random_example(rng, *size) for size in sizes]


def pack(rows: Sequence[Sequence[Example]], length: int, first_id: int = 0) -> Batch:
    """A batch whose every row holds examples one after another."""
    batch = Batch(
        tokens=np.zeros((len(rows), length), np.int32),
        target_mask=np.zeros((len(rows), length), bool),
        segment_ids=np.zeros((len(rows), length), np.int32),
        positions=np.zeros((len(rows), length), np.int32),
        example_ids=np.arange(first_id, first_id + len(rows), dtype=np.int32),
    )
    for row, examples in enumerate(rows):
        start = 0
        for segment, (inputs, targets) in enumerate(examples, start=1):
            middle, end = start + len(inputs), start + len(inputs) + len(targets)
            batch.tokens[row, start:end] = [*inputs, *targets]
            batch.target_mask[row, middle:end] = True
            batch.segment_ids[row, start:end] = segment
            batch.positions[row, start:end] = np.arange(end - start)
            start = end
    return batch


def one_a_row(examples: Sequence[Example], length: int | None = None, first_id: int = 0) -> Batch:
    """A batch with one example in each row, by default just as long as the longest."""
    length = length or max(len(inputs) + len(targets) for inputs, targets in examples)
    return pack([[example] for example in examples], length, first_id)


def pack_apart(rows: Sequence[Sequence[Example]], encoder_length: int, length: int, first_id: int = 0) -> Batch:
    """As `pack`, for an encoder-decoder: inputs and targets in rows of their own."""
    nothing: list[int] = []
    encoder = pack([[(inputs, nothing) for inputs, _ in examples] for examples in rows], encoder_length)
    decoder = pack([[(nothing, targets) for _, targets in examples] for examples in rows], length, first_id)
    return decoder.replace(
        encoder_tokens=encoder.tokens, encoder_segment_ids=encoder.segment_ids, encoder_positions=encoder.positions
    )


def rows_of(batch: Batch, rows: Sequence[int]) -> Batch:
    """These rows of a batch, in this order."""
    return jax.tree.map(lambda x: x[np.asarray(rows)], batch)


class TableModel:
    """Stands in for a model: the logits at a position are a row of a table, chosen by the token that is read there.

    `calls` notes what it is called with; the n-th call's logits have `added[n]` on top.
    """

    def __init__(self, table, vocabulary=VOCABULARY, added=None, shifted=False):
        self.table, self.vocabulary, self.added, self.calls = table, vocabulary, added, []
        self.config = dataclasses.replace(RELATIVE, shifted=shifted)

    def encode(self, batch, dropout_keys=None):
        return None

    def __call__(self, tokens, slots, kind, encoded=None, dropout_keys=None):
        self.calls.append((tokens, slots, kind, dropout_keys))
        logits = self.table[tokens]
        return Output(logits if self.added is None else logits + self.added[len(self.calls) - 1])

    def map_logits(self, fn, hidden, *per_position):
        return fn(hidden, *per_position)
