r"""Serve a model over HTTP: diffusion-t5x serve --checkpoint DIR

DIR is a MODEL_DIR, a checkpoint or a folder that `convert` wrote. Model, vocabulary, lengths and decoder come from the
checkpoint; gin files and --gin.NAME=VALUE change them. Clients of OpenAI's API can use the server: /v1/completions,
/v1/chat/completions and /v1/models. /health and /metrics are for its operator, and / is a page that shows the
canvas as it is written.

  --host ADDRESS  where to listen: 127.0.0.1 unless given, which only this machine can reach
  --port N        8000 unless given; 0 takes a free port
  --api_key KEY   the key that clients must send; better in the environment as DIFFUSION_T5X_API_KEY, where other users
                  of the machine cannot see it
  --slots N       texts that are written at the same time
  --queue N       texts that may wait for a slot; more are refused with status 429
  --length N      maximum number of tokens of an answer, if the request does not say; for diffusion, the canvas
  --context N     tokens of a prompt and its answer together
  --most_bytes N  maximum size of a request
  --grace N       seconds that requests have to end after SIGTERM
  --tokenizer FILE
                  the vocabulary's file, if the checkpoint does not name it or it has moved
"""

import dataclasses
import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diffusion_t5x.chat.conversation import ended_by_signals, say
from diffusion_t5x.chat.opening import about, adds_eos, open_vocabulary
from diffusion_t5x.chat.prompts import Prompts, prompt_lengths
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import answering
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.agreement import Agreement

_API_KEY = "DIFFUSION_T5X_API_KEY"
_CONTEXT = 2048  # of a model that could read more

_FLAGS = ("host", "port", "api_key", "slots", "queue", "length", "context", "most_bytes", "grace")


def serve(
    *,
    checkpoint_path: str,
    model: ModelConfig,
    decoder: Decoder,
    vocabulary: "AnyVocabulary | None" = None,
    vocabulary_file: str | None = None,
    context_eos: bool | None = None,
    task: str | None = None,
    task_feature_lengths: Mapping[str, int] | None = None,
    template_variables: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    slots: int = 8,
    queue: int = 64,
    length: int | None = None,
    context: int | None = None,
    most_bytes: int = 1_000_000,
    grace: int = 60,
    allow_mismatch: bool = False,
) -> None:
    """Serves a model over HTTP on one device, until SIGTERM or SIGINT.

    Args:
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR. Its name is the model's.
      model: dimensions of the checkpoint's model.
      decoder: writes the texts; requests may change its temperature, top_p and top_k, where it has them.
      vocabulary, vocabulary_file, context_eos, task, task_feature_lengths: as in `generate`.
      template_variables: variables of the chat template, such as {"enable_thinking": False}.
      host: address to listen at.
      port: its port; 0 takes a free one.
      api_key: the key that clients must send; None takes that of the environment, if there is one.
      slots: number of texts that are written at the same time.
      queue: number of texts that may wait for a slot.
      length: number of tokens to write, if a request does not say.
      context: number of tokens of a prompt and its answer together. None: all that the model takes, or 2048.
      most_bytes: maximum size of a request.
      grace: seconds that requests have to end after a signal.
      allow_mismatch: use the model other than as it was trained, according to the checkpoint's record.

    Raises:
      UserError: settings that do not fit, or an address that is taken.
    """
    numbers = {"slots": slots, "length": length, "context": context, "most_bytes": most_bytes, "grace": grace}
    for name, value in numbers.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    if not 0 <= port < 2**16:
        raise UserError(f"--port must be at least 0 and at most {2**16 - 1}; got {port}.")
    if queue < 0:
        raise UserError(f"--queue must not be negative; got {queue}.")
    if importlib.util.find_spec("uvicorn") is None or importlib.util.find_spec("starlette") is None:
        raise UserError("serve needs the extra of that name: pip install 'diffusion_t5x[serve]'.")
    from diffusion_t5x.serving.assembly import Loaded, application
    from diffusion_t5x.serving.server import Server
    from diffusion_t5x.serving.service import Limits

    server = Server(host, port, grace)  # before the model is loaded: the address may be taken
    api_key = api_key or os.environ.get(_API_KEY) or None
    if api_key is None and not server.is_local:
        say(f"Anyone who reaches {host} can use this server: set {_API_KEY}.")
    checkpoint = checkpoints.open_checkpoint(checkpoint_path)
    Agreement.of(checkpoint, "serve.serve.allow_mismatch", allow_mismatch).check(model, [decoder])
    context, most_inputs, length = _lengths(task_feature_lengths, context, length, model)
    dataset = None if task is None else SeqioDataset(task, task_feature_lengths or {})
    vocabulary = open_vocabulary(vocabulary, vocabulary_file, dataset)
    ends = adds_eos(context_eos, dataset, model)
    chat = Chat.of(vocabulary, template_variables)
    prompts = Prompts(vocabulary, ends, None, length, model.architecture, chat)
    ids = dataclasses.replace(token_ids(vocabulary), end_ids=prompts.end_ids)
    mesh = MeshConfig().make(jax.devices()[:1])
    limits = Limits(context, most_inputs, slots, queue, most_bytes)
    with server.loading(), ended_by_signals():
        definition, params = load_model(checkpoint, model, ids, mesh)
        loaded = Loaded(_name(checkpoint_path), mesh, definition, params, prompts, decoder)
        say(about(checkpoint, definition))
        say(f"{decoder}, {slots} slots of {context} tokens; compiling…")
        app = application(loaded, limits, api_key, server.fail)
    server.run(app, say)


def _lengths(
    features: Mapping[str, int] | None, context: int | None, length: int | None, model: ModelConfig
) -> tuple[int, int | None, int]:
    """Returns the most tokens of a prompt and its answer together (of an encoder-decoder: of each), the most tokens of
    a prompt if there is another limit, and the tokens of an answer if a request names none."""
    is_apart = model.architecture == "encoder_decoder"
    most, default = prompt_lengths(features, length, model)
    if context is None:
        room = None if most is None else max(most, default) if is_apart else most + default
        context = room if features and room else min(room or _CONTEXT, _CONTEXT)
    else:
        model.check_length(context, "--context")
    if length is None:
        default = min(default, context if is_apart else max(1, context // 2))
    elif length > context:
        raise UserError(f"--length {length} does not fit --context {context}: it is part of it.")
    return context, most if features and "inputs" in features else None, default


def _name(path: str) -> str:
    """Returns the name of a model by its folder: that of a MODEL_DIR, also for one of its checkpoints."""
    folders = [part for part in os.path.abspath(path).split(os.sep) if part]
    return next((part for part in reversed(folders) if not part.startswith("checkpoint")), "model")


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `serve`."""
    answering.run(serve, argv, {name: name for name in _FLAGS})


if __name__ == "__main__":
    main()
