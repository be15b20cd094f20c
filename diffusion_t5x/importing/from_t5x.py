"""Imports a T5 1.1 from one of T5X's checkpoint folders."""

import collections
import pathlib
import re
import shutil

from diffusion_t5x.data import tokenizer_files
from diffusion_t5x.data.vocabularies import TokenIds, token_ids
from diffusion_t5x.data.vocabulary_files import vocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.importing import importing, output
from diffusion_t5x.importing.families import Described, check_names
from diffusion_t5x.importing.t5x_checkpoint import T5XCheckpoint
from diffusion_t5x.importing.weights import Weight, table, under, vector
from diffusion_t5x.models.config import Activation, ModelConfig

_KIND = "T5 1.1"
_EMBEDDING = "token_embedder/embedding"
_LAYER = re.compile(r"(?<=/layers_)\d+")
_HEAD = "decoder/logits_dense/kernel"


def from_t5x(path: str, tokenizer_file: str, output_folder: str, activation: Activation, max_distance: int) -> None:
    """Imports an encoder-decoder that T5X trained, from a checkpoint in T5X's format before Orbax.

    `output_folder` gets checkpoints/checkpoint_0 (step and parameters), a copy of the tokenizer and model.gin. The
    model's sizes follow from the arrays; epsilon, logits' scale and causal buckets are those of T5 1.1.

    Args:
      path: a folder with a file `checkpoint`.
      tokenizer_file: its SentencePiece model. See `data.vocabulary_files.vocabulary`.
      output_folder: a folder that is empty or does not exist.
      activation: the gate of the feed-forward layers, which the arrays do not show.
      max_distance: the maximum distance of the relative position bias, which the arrays do not show.

    Raises:
      UserError: before anything is written: the folder's content is not supported, broken or does not fit together, or
        the output folder is not empty.
    """
    final = output.empty_folder(output_folder)
    tokenizer = pathlib.Path(tokenizer_file).expanduser()
    ids = _ids(tokenizer)
    source = T5XCheckpoint.open(path)
    described = _describe(source, activation, max_distance)
    definition = importing.definition_of(source, described, ids, tokenizer)

    with output.building(final) as to:
        for file in (tokenizer, *tokenizer_files.beside(tokenizer.parent)):
            shutil.copyfile(file, to / file.name)
        output.print_table(_dropped(source))
        importing.write(to, final, source, described, definition, tokenizer.name, f"{_KIND}, of T5X")
    print(f"Wrote {final}: checkpoints/checkpoint_0, {tokenizer.name}, model.gin")


def _ids(tokenizer: pathlib.Path) -> TokenIds:
    if tokenizer.suffix in (".json", ".bin"):
        raise UserError(f"{tokenizer} is not a SentencePiece model, which the tokenizers of T5X's models are.")
    return token_ids(vocabulary(str(tokenizer)))


def _describe(source: T5XCheckpoint, activation: Activation, max_distance: int) -> Described:
    """Returns the model, by the shapes of its arrays."""
    rows, embed = _matrix(source, _EMBEDDING)
    heads, buckets = _matrix(source, "decoder/relpos_bias/rel_embedding")
    _, joined = _matrix(source, "decoder/layers_0/self_attention/query/kernel")
    _, mlp = _matrix(source, "decoder/layers_0/mlp/wi_0/kernel")
    layers = {name: _num_layers(source, name) for name in ("encoder", "decoder")}
    if layers["encoder"] != layers["decoder"]:
        raise UserError(
            f"{source.path}: an encoder of {layers['encoder']} layers and a decoder of {layers['decoder']}; "
            "they must be equal."
        )
    if joined % heads:
        raise UserError(
            f"{source.path}: {joined} columns of queries do not divide into the {heads} heads of relpos_bias."
        )
    config = ModelConfig(
        embed_dim=embed,
        num_layers=layers["decoder"],
        num_heads=heads,
        head_dim=joined // heads,
        mlp_dim=mlp,
        architecture="encoder_decoder",
        activation=activation,
        tie_embeddings=_HEAD not in source.tensors,
        relative_buckets=buckets,
        relative_max_distance=max_distance,
        causal_buckets=True,
    )
    described = Described(config, rows, _weights(config), copies={}, sizes_from="the rest of the checkpoint")
    check_names(source, described, _KIND)
    return described


def _matrix(source: T5XCheckpoint, name: str) -> tuple[int, ...]:
    """Returns the shape of an array from which sizes are read."""
    if name not in source.tensors:
        raise UserError(f"{source.path} lacks {name}, which every {_KIND} has.")
    if len(shape := source.tensors[name].shape) != 2 or 0 in shape:
        raise UserError(f"{source.path}: {name} has the shape {shape}, and should be a matrix.")
    return shape


def _num_layers(source: T5XCheckpoint, stack: str) -> int:
    return len({name.split("/")[1] for name in source.tensors if name.startswith(f"{stack}/layers_")})


def _weights(config: ModelConfig) -> tuple[Weight, ...]:
    """Returns all weights; with an output matrix only if the embedding is not tied."""
    head = () if config.tie_embeddings else (table(_HEAD, "head"),)
    encoder = _sublayer("pre_attention_layer_norm", "attention", "attention")
    decoder = (
        *_sublayer("pre_self_attention_layer_norm", "self_attention", "attention"),
        *_sublayer("pre_cross_attention_layer_norm", "encoder_decoder_attention", "cross_attention"),
    )
    return (table(_EMBEDDING, "embedding"), *_stack("encoder", encoder), *_stack("decoder", decoder), *head)


def _kernel(theirs: str, ours: str, inputs: int = 1) -> Weight:
    return Weight(f"{theirs}/kernel", ours, inputs=inputs, transposed=False)


def _sublayer(norm: str, theirs: str, ours: str) -> tuple[Weight, ...]:
    queries = (_kernel(f"{theirs}/{name}", f"{ours}/{name}") for name in ("query", "key", "value"))
    return vector(f"{norm}/scale", f"{ours}_norm/scale"), *queries, _kernel(f"{theirs}/out", f"{ours}/out", inputs=2)


def _stack(name: str, attention: tuple[Weight, ...]) -> tuple[Weight, ...]:
    feed_forward = (_kernel(f"mlp/{matrix}", f"mlp/{matrix}") for matrix in ("wi_0", "wi_1", "wo"))
    block = (*attention, vector("pre_mlp_layer_norm/scale", "mlp_norm/scale"), *feed_forward)
    return (
        *under({f"{name}/layers_{{}}/": f"{name}/blocks/"}, *block),
        Weight(f"{name}/relpos_bias/rel_embedding", f"{name}/relative_bias/embedding"),  # [heads, buckets] there
        vector(f"{name}/{name}_norm/scale", f"{name}/final_norm/scale"),
    )


def _dropped(source: T5XCheckpoint) -> list[tuple[str, str, str]]:
    """Returns table rows of everything left behind; the same array of several layers is one row."""
    layers = collections.defaultdict(list)
    for name, shape in source.dropped.items():
        number = _LAYER.search(name)
        layers[_LAYER.sub("{}", name), shape].append(int(number[0]) if number else 0)
    return [
        (template.replace("{}", f"{min(numbers)}-{max(numbers)}"), "dropped", f"{list(shape)}")
        for (template, shape), numbers in layers.items()
    ]
