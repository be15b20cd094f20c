r"""Check that texts depend on their prompts alone: diffusion-t5x certify --checkpoint DIR --prompts FILE

DIR is a MODEL_DIR, a checkpoint or a folder that `convert` wrote. Model, vocabulary, lengths and decoder come from the
checkpoint; gin files and --gin.NAME=VALUE change them. Each prompt is decoded alone, then in a batch, beside other
neighbours with more padding, in slots, on a mesh of all devices, and without a cache, in float32 and in bfloat16. The
table says which texts differ and by what margin. A tiny margin is rounding; a large one is a fault.

  --prompts FILE  prompts, one a line; empty lines are skipped
  --prompt TEXT   a prompt; repeatable. There must be two at least
  --length N      maximum number of tokens to write; for diffusion, the canvas
  --seed N        random seed
  --bound NATS    margin above which a difference is a fault: 0.001 for float32 and 0.5 for bfloat16 unless given
  --output FILE   also write the certificate as JSON
  --tokenizer FILE
                  the vocabulary's file, if the checkpoint does not name it or it has moved

The exit status is 0 if no comparison shows a fault, 1 if one does, and 2 for a mistake in the command.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich.box
import rich.table

import diffusion_t5x
from diffusion_t5x import records
from diffusion_t5x.chat.conversation import say
from diffusion_t5x.chat.opening import about, adds_eos, open_vocabulary
from diffusion_t5x.chat.prompts import Prompts, prompt_lengths
from diffusion_t5x.checkpointing import checkpoints
from diffusion_t5x.command_line import answering
from diffusion_t5x.console import Console, one_line
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.chats import Chat
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.decoding.decoder import Decoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import certificate
from diffusion_t5x.evaluation.certificate import Comparison, Differing
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.training.agreement import Agreement

_WIDTH = 120  # of the table, where it does not go to a terminal


def certify(
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
    prompt: Sequence[str] = (),
    prompts: str | None = None,
    length: int | None = None,
    random_seed: int = 0,
    bound: float | None = None,
    output: str | None = None,
    allow_mismatch: bool = False,
) -> None:
    """Decodes prompts alone and in all other ways, and says where texts differ; exits with status 1 after a fault.

    Args:
      checkpoint_path: a checkpoint folder, a folder of them or a MODEL_DIR.
      model: dimensions of the checkpoint's model; its dtype is compared first.
      decoder: writes the texts.
      vocabulary, vocabulary_file, context_eos, task, task_feature_lengths: as in `generate`.
      template_variables: variables of the chat template, such as {"enable_thinking": False}.
      prompt: prompts.
      prompts: a file with more of them, one a line.
      length: number of tokens to write, instead of the targets' length.
      random_seed: seed of the decoder.
      bound: nats up to which a difference is rounding, whatever the number type; None: see `rounding_bound`.
      output: file for the certificate as JSON.
      allow_mismatch: use the model other than as it was trained, according to the checkpoint's record.

    Raises:
      UserError: settings that do not fit, or fewer than two prompts.
    """
    if jax.process_count() > 1:
        raise UserError("certify decodes on the devices of one process: start it on one host.")
    asked = [*prompt, *(_lines(prompts) if prompts else [])]
    certificate.check_prompts(len(asked))
    if length is not None and length < 1:
        raise UserError(f"--length must be at least 1, not {length}.")
    if bound is not None and not bound >= 0:
        raise UserError(f"--bound must be at least 0, not {bound}.")
    checkpoint = checkpoints.open_checkpoint(checkpoint_path)
    Agreement.of(checkpoint, "certify.certify.allow_mismatch", allow_mismatch).check(model, [decoder])
    most, length = prompt_lengths(task_feature_lengths, length, model)
    dataset = None if task is None else SeqioDataset(task, task_feature_lengths or {})
    vocabulary = open_vocabulary(vocabulary, vocabulary_file, dataset)
    chat = Chat.of(vocabulary, template_variables) if checkpoint.record.may_chat else None
    ends = not chat and adds_eos(context_eos, dataset, model)
    layout = Prompts(vocabulary, ends, most, length, model.architecture, chat)
    rows = [layout.batch(text, number) for number, text in enumerate(asked)]
    mesh = MeshConfig().make(jax.devices()[:1])
    ids = dataclasses.replace(token_ids(vocabulary), end_ids=layout.end_ids)
    definition, params = load_model(checkpoint, dataclasses.replace(model, dtype="float32"), ids, mesh)
    config = dataclasses.replace(definition.config, dtype=model.dtype)
    definition = dataclasses.replace(definition, config=config)
    say(about(checkpoint, definition))
    say(f"{decoder}, {len(asked)} texts of {length} tokens, seed {random_seed}")
    found = certificate.certify(definition, params, decoder, rows, seed=random_seed, bound=bound, say=say)
    page = Page(asked, rows, layout, found)
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(page.table())
    for line in page.lines():
        print(line)
    if output is not None:
        settings = {
            "checkpoint": str(checkpoint),
            "step": checkpoint.metadata["step"],
            "decoder": str(decoder),
            "length": length,
            "seed": random_seed,
            "devices": [device.device_kind for device in jax.devices()],
            "versions": {"diffusion_t5x": diffusion_t5x.__version__, "jax": jax.__version__},
        }
        records.write_json(output, settings | page.record())
    if page.faults:
        sys.exit(1)


@dataclasses.dataclass(frozen=True)
class Page:
    """A certificate for readers.

    Attributes:
      prompts: the prompts.
      rows: their rows.
      layout: returns texts of tokens.
      comparisons: what was compared.
    """

    prompts: Sequence[str]
    rows: Sequence[Batch]
    layout: Prompts
    comparisons: Sequence[Comparison]

    @property
    def faults(self) -> list[Comparison]:
        """The comparisons that show a fault."""
        return [comparison for comparison in self.comparisons if comparison.verdict == "fault"]

    def table(self) -> rich.table.Table:
        """Returns a table with a line for each comparison."""
        found = rich.table.Table(box=rich.box.SIMPLE, title="Texts beside those of each prompt alone")
        for column in ("numbers", "decoded"):
            found.add_column(column)
        for column in ("differ", "largest margin", "log p apart", "bound"):
            found.add_column(column, justify="right")
        found.add_column("verdict")
        for each in self.comparisons:
            if each.reason is not None:
                found.add_row(each.dtype, each.way, "", "", "", "", each.verdict)
                continue
            largest = each.largest_margin
            margin = "" if largest is None else "unknown" if np.isinf(largest) else f"{largest:.2g}"
            gap, bound = ("" if x is None else f"{x:.2g}" for x in (each.gap, each.bound))
            differ = f"{len(each.differing)} of {each.num_texts}"
            found.add_row(each.dtype, each.way, differ, margin, gap, bound, each.verdict)
        return found

    def lines(self) -> list[str]:
        """Returns what the table has no room for: reasons, the texts that differ, and the conclusion."""
        reasons = {each.way: each.reason for each in self.comparisons if each.reason is not None}
        lines = [f"Not possible: {way}: {reason}." for way, reason in reasons.items()]
        for each in self.comparisons:
            for text in each.differing:
                where = f"{each.dtype}, {each.way}: text {text.text + 1}"
                lines.append(one_line(f"{where} ({self.prompts[text.text]!r}): {self._told(text)}", 2 * _WIDTH))
        judged = sum(each.bound is not None for each in self.comparisons)
        if self.faults:
            faults = ", ".join(f"{each.way} ({each.dtype})" for each in self.faults)
            return [*lines, f"Not certified: {len(self.faults)} of {judged} comparisons show a fault: {faults}."]
        return [*lines, f"Certified: {judged} comparisons without a fault."]

    def record(self) -> dict[str, Any]:
        """The certificate as a JSON-serialisable dict; margins and gaps are in nats."""
        return {
            "prompts": list(self.prompts),
            "certified": not self.faults,
            "comparisons": [
                {
                    "dtype": each.dtype,
                    "way": each.way,
                    "verdict": each.verdict,
                    "reason": each.reason,
                    "num_texts": each.num_texts,
                    "gap": each.gap,
                    "bound": each.bound,
                    "differing": [self._record(text) for text in each.differing],
                }
                for each in self.comparisons
            ],
        }

    def _record(self, text: Differing) -> dict[str, Any]:
        first, margin = text.first, text.margin
        return {
            "text": text.text,
            "reference": self.layout.to_text(text.reference),
            "reference_tokens": list(text.reference),
            "other": self.layout.to_text(text.other),
            "other_tokens": list(text.other),
            "step": first and first.step,
            "position": first and self._place(text.text, first.slot),
            "token": first and self._token(first.token),
            "other_position": first and self._place(text.text, first.other_slot),
            "other_token": first and self._token(first.other_token),
            "margin": margin and margin.nats,
            "margin_is_exact": margin and margin.is_exact,
        }

    def _told(self, text: Differing) -> str:
        """Returns where a text differs and by what margin, in words."""
        if text.first is None:
            return "where it parts is not known: the decoder may rewrite tokens"
        first, margin = text.first, text.margin

        def wrote(token: int | None, slot: int) -> str:
            if token is None:
                return "nothing"
            said = self._token(token)
            assert said is not None
            return f"{said['text']!r} ({token}) at {self._place(text.text, slot)}"

        parts = f"{wrote(first.token, first.slot)} became {wrote(first.other_token, first.other_slot)}"
        size = "unknown" if margin is None else f"{'' if margin.is_exact else 'more than '}{margin.nats:.2g} nats"
        return f"in step {first.step}, {parts}; margin {size}"

    def _token(self, token: int | None) -> dict[str, Any] | None:
        return None if token is None else {"id": token, "text": self.layout.cells([token])[0]}

    def _place(self, text: int, slot: int) -> int:
        """Returns a slot's place in its text, counted from 0."""
        return int(slot - np.argmax(self.rows[text].target_mask[0]))


def _lines(file: str) -> list[str]:
    """Returns the lines of a text file that are not empty."""
    try:
        text = pathlib.Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {file} cannot be read: {error}.") from error
    return [line for line in text.splitlines() if line.strip()]


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `certify`."""
    names = ("prompt", "prompts", "length", "bound", "output")
    answering.run(certify, argv, {**{name: name for name in names}, "seed": "random_seed"})


if __name__ == "__main__":
    main()
