"""Puts a server together: the engines, the thread that runs them, the application, and the socket."""

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable

from jax.sharding import Mesh
from starlette.applications import Starlette

from diffusion_t5x.chat.prompts import Prompts
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.decoding.rows import RowDecoder
from diffusion_t5x.decoding.slots import Finished, SlotEngine
from diffusion_t5x.models.transformer import ModelDefinition, Params
from diffusion_t5x.serving.app import App
from diffusion_t5x.serving.engine import Engine, OneByOne
from diffusion_t5x.serving.metrics import Metrics
from diffusion_t5x.serving.requests import MOST_ALTERNATIVES
from diffusion_t5x.serving.scores import Scorer
from diffusion_t5x.serving.service import Limits, Service
from diffusion_t5x.serving.worker import Engines, Text, Worker


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model that is ready to decode.

    Attributes:
      name: the name that clients know it by.
      mesh, definition, params: the model.
      prompts: converts texts to rows and tokens to texts; its length is that of an answer if a request names none.
      decoder: writes the texts.
    """

    name: str
    mesh: Mesh
    definition: ModelDefinition
    params: Params
    prompts: Prompts
    decoder: Decoder

    def engine(self, decoder: Decoder, limits: Limits) -> Engine:
        """Returns an engine: one with slots, if the decoder can join rows to others at any time."""
        model = self.mesh, self.definition, self.params
        if not isinstance(decoder, RowDecoder):
            return OneByOne(*model, decoder)
        encoder_length = limits.context if self.definition.config.architecture == "encoder_decoder" else None
        return SlotEngine(*model, decoder, num_slots=limits.slots, length=limits.context, encoder_length=encoder_length)

    def scorer(self) -> Scorer | None:
        """Returns what computes log-probabilities; None if the decoder's have no exact ones."""
        if not isinstance(self.decoder, AutoregressiveDecoder):
            return None
        return Scorer(self.mesh, self.definition, self.params, self.decoder, MOST_ALTERNATIVES)

    def warm_up(self, engines: Engines, limits: Limits) -> None:
        """Compiles the programs that texts need, by writing some."""
        in_slots = isinstance(self.decoder, RowDecoder)
        prompts = dataclasses.replace(self.prompts, length=1 if in_slots else self.prompts.length)
        row = prompts.row([prompts.vocabulary.eos_id], 0)
        # An engine with slots reads 1, 4, 16 ... rows at once, and all slots when it is new.
        groups = [1, *(4**power for power in range(8) if 4**power <= limits.slots)] if in_slots else [1]
        for size in groups:
            texts = {Text(row, self.decoder, seed=0, sample=number) for number in range(size)}
            for text in texts:
                engines.submit(text)
            while texts:
                texts -= {event.ident for event in engines.advance() if isinstance(event, Finished)}


def application(loaded: Loaded, limits: Limits, api_key: str | None, on_failure: Callable[[], None]) -> Starlette:
    """Returns the application that serves a model; its thread runs while the application does.

    Args:
      loaded: the model; its programs are compiled before this returns.
      limits: limits of the server.
      api_key: the key that clients must send; None asks for none.
      on_failure: called when decoding has failed, after which every request is refused.
    """
    engines = Engines(lambda decoder: loaded.engine(decoder, limits))
    loaded.warm_up(engines, limits)
    worker, metrics = Worker(engines, loaded.scorer(), on_failure), Metrics()
    service = Service(loaded.name, loaded.prompts, loaded.decoder, limits, worker, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()

    return App(service, metrics, api_key).asgi(lifespan)
