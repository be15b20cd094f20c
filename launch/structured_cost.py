"""The cost of structured output: decoding by JSON schemas beside decoding without one, and how many texts are valid.

python launch/structured_cost.py --checkpoint DIR --output costs.json   (docs/structured.md says what the figures mean)
"""

import argparse
import dataclasses
import json
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jsonschema
import numpy as np

import diffusion_t5x as dt
from diffusion_t5x import partitioning, records
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.vocabularies import to_text
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.decoder import Decoded, Decoder
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.structured import language_of
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.evaluation.inference import make_decode_step
from diffusion_t5x.evaluation.results import describe
from diffusion_t5x.performance import stopwatch

logger = logging.getLogger(__name__)


def thing(*required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required)}


def text(most: int, **more: Any) -> dict[str, Any]:
    return {"type": "string", "maxLength": most, **more}


INTEGER, NUMBER, BOOLEAN = ({"type": name} for name in ("integer", "number", "boolean"))
DATE, TIME, UUID = ({"type": "string", "format": name} for name in ("date", "time", "uuid"))
SCHEMAS: tuple[Mapping[str, Any], ...] = (
    INTEGER,
    NUMBER,
    BOOLEAN,
    DATE,
    TIME,
    UUID,
    text(20, minLength=1),
    {"enum": ["red", "green", "blue", None]},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": ["number", "null"]},
    {"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 5},
    {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 6},
    {"anyOf": [BOOLEAN, {"type": "array", "items": text(5)}]},
    {"type": "object", "additionalProperties": INTEGER},
    thing("x", "y", x=NUMBER, y=NUMBER),
    thing("name", "age", name=text(12), age=INTEGER),
    thing("due", due=DATE, done=BOOLEAN),
    thing("label", "score", label={"enum": ["positive", "negative"]}, score=NUMBER),
    thing("tool", "arguments", tool={"const": "search"}, arguments=thing("query", query=text(16))),
    thing("tags", tags={"type": "array", "items": text(4), "maxItems": 3}, next={"type": ["integer", "null"]}),
)


@dataclasses.dataclass(frozen=True)
class Cost:
    """A decoder on some texts of one schema.

    Attributes:
      free, within: medians of seconds without the schema and with it.
      free_passes, within_passes: model passes of the batch.
      valid, texts: number of valid texts, and of all.
    """

    free: float
    within: float
    free_passes: int
    within_passes: int
    valid: int
    texts: int


class Timed:
    """A decoder, compiled for one batch."""

    def __init__(self, model: dt.Model, decoder: Decoder, batch: Batch, seed: int):
        self._mesh = model.mesh
        with jax.set_mesh(self._mesh):
            self._arguments = model.params, partitioning.put_batch(self._mesh, batch)
            step = make_decode_step(self._mesh, model.definition, decoder, seed=seed)
            self._program = step.lower(*self._arguments).compile()
        self.seconds: list[float] = []

    def run(self) -> Decoded:
        """Decodes once more, and notes the seconds."""
        with jax.set_mesh(self._mesh):
            start = time.perf_counter()
            decoded = jax.block_until_ready(self._program(*self._arguments))
            self.seconds.append(time.perf_counter() - start)
        return decoded


def measure(model: dt.Model, decoder: Decoder, schemas: Sequence[Any], batch: Batch, repeats: int) -> list[Cost]:
    """Returns the cost of each schema; runs with and without it take turns."""
    found = []
    free = Timed(model, decoder, batch, seed=0)
    for schema in schemas:
        language = language_of(None, schema, model.tokenizer, end_ids=model.definition.vocabulary.end_ids)
        language.check_fits([int(batch.target_mask[0].sum())], "Give it more tokens: --length.")
        within = Timed(model, decoder.within(language), batch, seed=0)
        free.seconds.clear()
        for _ in range(repeats):
            plain, kept = free.run(), within.run()
        texts = [
            to_text(model.tokenizer, row[mask].tolist())
            for row, mask in zip(np.asarray(kept.tokens), batch.target_mask, strict=True)
        ]
        found.append(
            Cost(
                statistics.median(free.seconds),
                statistics.median(within.seconds),
                int(plain.steps),
                int(kept.steps),
                sum(is_valid(schema, text) for text in texts),
                len(texts),
            )
        )
        logger.info("%s: %s, such as %s", json.dumps(schema), found[-1], texts[0])
    return found


def is_valid(schema: Any, text: str) -> bool:
    """Returns True if the text is JSON of the schema, as jsonschema judges."""
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    try:
        return judge.is_valid(json.loads(text))
    except ValueError:
        return False


def row(name: str, costs: Sequence[Cost]) -> str:
    """Returns a line of the table. A batch by a schema may end in fewer passes, so it is passes that are compared."""
    free, within = (
        1e3 * sum(getattr(cost, kind) for cost in costs) / sum(getattr(cost, f"{kind}_passes") for cost in costs)
        for kind in ("free", "within")
    )
    valid, texts = sum(cost.valid for cost in costs), sum(cost.texts for cost in costs)
    slower = statistics.median(cost.within / cost.within_passes / (cost.free / cost.free_passes) - 1 for cost in costs)
    return f"| {name} | {free:.2f} | {within:.2f} | {within / free - 1:+.1%} | {slower:+.1%} | {valid} of {texts} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="any model; it need not have learned to decode like this")
    parser.add_argument("--output", required=True, help="a JSON file with every figure")
    parser.add_argument("--decoders", default="masked,block,sundae")
    parser.add_argument("--outputs", type=int, default=1000, help="texts of each decoder, over all schemas")
    parser.add_argument("--schemas", type=int, default=len(SCHEMAS), help="how many schemas: the last ones of the list")
    parser.add_argument("--length", type=int, default=64, help="targets of a text")
    parser.add_argument("--input_length", type=int, default=16, help="random inputs of a text")
    parser.add_argument("--steps", type=int, default=10, help="steps of a canvas, or of a block")
    parser.add_argument("--block_size", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=3)
    flags = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)

    masked = MaskedDecoder(flags.steps, temperature=flags.temperature)
    decoders = {
        "masked": masked,
        "block": BlockDecoder(flags.block_size, masked),
        "sundae": SundaeDecoder(flags.steps, 1, flags.temperature),
    }
    if unknown := set(flags.decoders.split(",")) - decoders.keys():
        parser.error(f"--decoders: there is no {', '.join(sorted(unknown))}. There are: {', '.join(decoders)}.")
    model, schemas = dt.load(flags.checkpoint), SCHEMAS[-flags.schemas :]
    rows = math.ceil(flags.outputs / len(schemas))
    batch = stopwatch.random_batch(model.definition, rows, flags.input_length, flags.length, seed=0)
    costs = {name: measure(model, decoders[name], schemas, batch, flags.repeats) for name in flags.decoders.split(",")}
    report = {
        "settings": {**vars(flags), "decoders": {name: describe(decoders[name]) for name in costs}},
        "machine": stopwatch.describe_machine(),
        "costs": {name: [dataclasses.asdict(cost) for cost in each] for name, each in costs.items()},
    }
    records.write_json(flags.output, report)
    print(
        "| decoder | ms per pass, free | within a schema | slower | median schema | valid |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for name, each in costs.items():
        print(row(name, each))


if __name__ == "__main__":
    main()
