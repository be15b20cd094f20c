"""The texts of a rollout, decoded in one whole batch: what slots must write, too."""

import jax

from diffusion_t5x.models.streams import stream
from diffusion_t5x.training.rollout_texts import rollout_key, texts_of


def make_rollout_step(definition, decoder, seed=0, prepare=lambda model, batch, key: batch):
    """The jitted `(params, prompts, step, given=None) -> texts`."""

    @jax.jit
    def write(params, asked, step, given=None):
        key, wanted = rollout_key(seed, step), asked
        if given is not None:
            wanted = asked.replace(target_mask=asked.target_mask & ~given.any(axis=-1, keepdims=True))
        model = definition.bind(params)
        decoded = decoder.decode(model, wanted, key)
        written = decoded.canvas, decoded.written_at, decoded.log_probability
        texts = texts_of(asked, *written, definition.vocabulary.pad_id, given)
        return prepare(model, texts, stream(key, "prepare"))

    return write
