"""Log-probabilities of the tokens of a text that an autoregressive model wrote."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion_t5x import partitioning
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.decoder import Decoded
from diffusion_t5x.models.sampling import forbid
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.objectives.autoregressive import Autoregressive


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities at temperature 1, over all ids that may be written.

    Attributes:
      written: of each token.
      likely: ids and log-probabilities of the most likely tokens at each place, in descending order.
    """

    written: list[float]
    likely: list[list[tuple[int, float]]]


class Scorer:
    """Scores texts in one pass of the model; exact, because each token was written given those before it.

    Args:
      mesh: the device mesh.
      definition, params: the model.
      decoder: the decoder of the texts.
      most: number of likely tokens at each place.
    """

    def __init__(
        self, mesh: Mesh, definition: ModelDefinition, params: Params, decoder: AutoregressiveDecoder, most: int
    ):
        self._mesh, self._params = mesh, params
        objective = Autoregressive(prefix=decoder.prefix)

        def score(params, batch):
            model = definition.bind(params)

            def read_out(logits, labels):
                scores = jax.nn.log_softmax(forbid(logits, model.vocabulary))
                written = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
                return written, jax.lax.top_k(scores, min(most, model.vocabulary.size))

            return model.map_logits(read_out, objective.output(model, batch).hidden, batch.tokens)

        self._step = jax.jit(score, out_shardings=partitioning.replicated(mesh))

    def __call__(self, row: Batch, decoded: Decoded) -> Scores:
        """Scores a row's text, up to and including the token that ends it."""
        with jax.set_mesh(self._mesh):
            batch = partitioning.put_batch(self._mesh, row.replace(tokens=np.asarray(decoded.tokens)))
            written, (best, ids) = jax.device_get(self._step(self._params, batch))
        places = np.flatnonzero(row.target_mask[0])[: int(decoded.num_tokens[0])]
        likely = [list(zip(ids[0, i].tolist(), best[0, i].tolist(), strict=True)) for i in places]
        return Scores(written[0, places].tolist(), likely)
