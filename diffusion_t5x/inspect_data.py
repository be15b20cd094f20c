"""Show what a training run reads: the rows of its first batch as text, with the objective's noise.

Give the run's gin files and flags, followed by runs/inspect_data.gin. With --checkpoint DIR it takes task, lengths,
layout, objective and seed from a checkpoint of the run, and no gin file is needed.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from rich import box
from rich.table import Column, Table
from rich.text import Text

from diffusion_t5x.checkpointing.checkpoints import open_checkpoint
from diffusion_t5x.command_line import config
from diffusion_t5x.command_line.recorded import checkpoint_texts, dataset_text
from diffusion_t5x.command_line.verbs import own_flags
from diffusion_t5x.console import Console
from diffusion_t5x.data.batch import Batch
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.vocabularies import TokenIds, visible
from diffusion_t5x.errors import UserError
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.models.reading import shift_right
from diffusion_t5x.models.transformer import ModelDefinition
from diffusion_t5x.objectives.objective import Objective
from diffusion_t5x.shapes import Array
from diffusion_t5x.training.step import step_key

_STYLES = {
    "inputs": "cyan",
    "targets": "green",
    "changed": "bold red",
    "eos": "bold yellow",
    "pad": "yellow",
    "mask": "bold magenta",
    "sentinel": "magenta",
    "empty": "dim",
}


_COUNTED_EXAMPLES = 1_000  # to tell how many are longer than the features


@dataclasses.dataclass(frozen=True)
class _Sequence:
    """One sequence that the model reads, all arrays `[L]`: the encoder's, or the one with the targets.

    Attributes:
      name: "encoder", "decoder", or "" if there is only one.
      tokens, target_mask, segment_ids, positions: as in `Batch`.
      reads: the tokens that the model reads instead of `tokens`.
      changed: True for noise.
    """

    name: str
    tokens: np.ndarray
    target_mask: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    reads: np.ndarray
    changed: np.ndarray

    def runs(self) -> Iterator[tuple[int, str, np.ndarray]]:
        """Segment, role ("inputs", "targets" or "empty") and indices of contiguous positions."""

        def kind(i):
            return int(self.segment_ids[i]), bool(self.target_mask[i])

        for (segment, is_target), run in itertools.groupby(range(len(self.tokens)), kind):
            role = "targets" if is_target else "inputs"
            yield segment, role if segment else "empty", np.fromiter(run, int)


def inspect_data(
    *,
    dataset: SeqioDataset,
    model: ModelConfig,
    objective: Objective,
    num_rows: int = 2,
    positions: bool = True,
    random_seed: int = 0,
    dry_run: bool = False,
) -> None:
    """Prints the first batch of a run that starts at step 0 on one host, and the model's view of it in that step.

    Each row is shown as text, with inputs and targets separate, then position by position. Control characters of the
    data are shown as symbols and never printed.

    Args:
      dataset: the training data set.
      model: the model to train.
      objective: the training objective.
      num_rows: number of rows of the batch to show.
      positions: also show the table of positions.
      random_seed: seed of the run.
      dry_run: print only the summary of the batch.

    Raises:
      UserError: the data set cannot be read, or has fewer rows than asked for.
    """
    dataset.check()
    if not 1 <= num_rows <= dataset.batch_size:
        raise UserError(f"num_rows must lie between 1 and the {dataset.batch_size} rows of a batch, not {num_rows}.")
    vocabulary = dataset.token_ids()
    batch = next(dataset.train_iterator())
    read = jax.jit(functools.partial(objective.model_inputs, ModelDefinition(model, vocabulary)))
    reads = np.asarray(read(batch, step_key(random_seed, 0)))
    clean, shifted = _clean_reads(batch, reads, vocabulary)
    changed = (reads != clean) & (batch.segment_ids > 0)

    console = Console(markup=False, highlight=False, emoji=False)
    console.print(_summary(dataset, objective, batch, changed, shifted))
    if dry_run:
        return
    writer = _Writer(vocabulary, dataset.piece)
    console.print("", _legend(), sep="\n")
    for row in range(num_rows):
        sequences = _sequences(batch, reads, changed, row)
        console.rule(f"row {row}")
        for sequence in sequences:
            console.print(writer.text(sequence))
        for sequence in sequences if positions else ():
            console.print(writer.table(sequence))


def _clean_reads(batch: Batch, reads: np.ndarray, vocabulary: TokenIds) -> tuple[Array, bool]:
    """Returns the tokens `[B, L]` that the model would read without noise, and True if they are shifted right."""
    later = np.asarray(shift_right(batch.tokens, batch.positions, vocabulary.start_id))
    there = batch.segment_ids > 0
    shifted = bool(np.sum((reads == later)[there]) > np.sum((reads == batch.tokens)[there]))
    return (later if shifted else batch.tokens), shifted


def _sequences(batch: Batch, reads: np.ndarray, changed: np.ndarray, row: int) -> list[_Sequence]:
    """Returns the sequences of a row in the order in which the model reads them."""
    arrays = batch.tokens, batch.target_mask, batch.segment_ids, batch.positions, reads, changed
    if batch.encoder_tokens is None:
        return [_Sequence("", *(np.asarray(x[row]) for x in arrays))]
    tokens, segment_ids, positions = batch.encoder_tokens, batch.encoder_segment_ids, batch.encoder_positions
    assert segment_ids is not None and positions is not None
    never = np.zeros_like(tokens, bool)
    encoder = tokens, never, segment_ids, positions, tokens, never
    both = (("encoder", encoder), ("decoder", arrays))
    return [_Sequence(name, *(np.asarray(x[row]) for x in fields)) for name, fields in both]


def _summary(dataset: SeqioDataset, objective: Objective, batch: Batch, changed: np.ndarray, shifted: bool) -> Table:
    segments = {"decoder": batch.segment_ids}
    if batch.encoder_segment_ids is not None:
        segments = {"encoder": batch.encoder_segment_ids} | segments
    examples = np.max([ids.max(axis=1) for ids in segments.values()], axis=0)
    layout = "packed" if dataset.pack else "each on a canvas" if dataset.canvas else "not packed"
    noise = changed.sum() / max(1, batch.target_mask.sum())
    table = Table.grid(padding=(0, 2))
    for name, value in {
        "task": f"{dataset.name}, split {dataset.split}",
        "architecture": dataset.architecture,
        "objective": repr(objective),
        "attention": objective.attention.name,
        "batch": f"{len(examples)} rows, {examples.sum()} examples, {examples.mean():.1f} per row ({layout})",
    }.items():
        table.add_row(Text(name, "bold"), Text(value))
    for name, ids in segments.items():
        is_target = batch.target_mask if name == "decoder" else np.zeros_like(ids, bool)
        shares = {"inputs": (ids > 0) & ~is_target, "targets (in the loss)": is_target, "empty": ids == 0}
        shown = ", ".join(f"{share.mean():.1%} {role}" for role, share in shares.items() if share.any())
        table.add_row(Text(name if len(segments) > 1 else "positions", "bold"), f"{ids.shape[1]} per row: {shown}")
    counter = dataset.count_cut(_COUNTED_EXAMPLES)
    cut = (f"{count} {name} beyond {counter.lengths[name]} tokens" for name, count in counter.cut.items())
    table.add_row(Text("cut off", "bold"), f"{', '.join(cut)}, of {counter.examples} examples")
    how = "at each position the token before it" if shifted else "each token in its place"
    noisy = f"{noise:.1%} of the targets changed by noise" if noise else "no noise"
    table.add_row(Text("model reads", "bold"), f"{how}, {noisy}")
    return table


class _Writer:
    """Shows tokens: coloured by kind, and with signs, so that nothing is lost without colours."""

    def __init__(self, vocabulary: TokenIds, piece: Callable[[int], bytes]):
        self._piece = functools.cache(piece)
        self._special = {vocabulary.eos_id: "eos", vocabulary.pad_id: "pad", vocabulary.mask_id: "mask"}
        self._content = frozenset(vocabulary.noise_ids().tolist())

    def text(self, sequence: _Sequence) -> Table:
        """The text of each run, and below it what the model reads, if that differs."""
        label = Column(min_width=len("segment 1 targets"), no_wrap=True)
        grid = Table.grid("", label, Column(overflow="fold"), padding=(0, 2))
        for segment, role, run in sequence.runs():
            if role == "empty":
                grid.add_row(sequence.name, role, f"{len(run)} positions", style=_STYLES[role])
                continue
            grid.add_row(sequence.name, f"segment {segment} {role}", self._lines(sequence.tokens[run], role))
            if not np.array_equal(sequence.reads[run], sequence.tokens[run]):
                grid.add_row("", "  model reads", self._lines(sequence.reads[run], role, sequence.changed[run]))
        return grid

    def table(self, sequence: _Sequence) -> Table:
        """A table of positions. What the model reads is shown only if it is another token."""
        numbers = (Column(name, justify="right", no_wrap=True) for name in ("index", "segment", "position", "id"))
        texts = (Column(name, overflow="fold") for name in ("piece", "role", "model reads"))
        table = Table(*numbers, *texts, box=box.SIMPLE_HEAD, title=sequence.name, title_justify="left")
        for segment, runs in itertools.groupby(sequence.runs(), lambda run: run[0]):
            table.add_section()
            for _, role, run in runs:
                if role == "empty":
                    table.add_row(f"{run[0]}-{run[-1]}", "", "", "", "", role, "", style=_STYLES[role])
                    continue
                for i in run:
                    token, read = sequence.tokens[[i]], sequence.reads[[i]]
                    table.add_row(
                        *map(str, (i, segment, sequence.positions[i], token[0])),
                        self._show(token, role, space="␣"),
                        Text(role, _STYLES[role]),
                        "" if read == token else self._show(read, role, sequence.changed[[i]], space="␣"),
                    )
        return table

    def _lines(self, tokens: np.ndarray, role: str, changed: np.ndarray | None = None) -> Text:
        return Text("\n").join(self._show(tokens, role, changed).split("␊", include_separator=True))

    def _show(self, tokens: np.ndarray, role: str, changed: np.ndarray | None = None, space: str = " ") -> Text:
        """Shows tokens of one role; ⟦⟧ around those that noise has changed."""

        def look(token_and_change):
            token, is_changed = token_and_change
            kind = self._special.get(token, role if token in self._content else "sentinel")
            return "changed" if is_changed else kind

        shown = Text()
        pairs = zip(tokens.tolist(), [False] * len(tokens) if changed is None else changed.tolist(), strict=True)
        for kind, group in itertools.groupby(pairs, look):
            text = visible(b"".join(self._piece(token) for token, _ in group)).replace(" ", space)
            shown.append(f"⟦{text}⟧" if kind == "changed" else text, _STYLES[kind])
        return shown


def _legend() -> Text:
    signs = {
        "inputs": "inputs",
        "targets": "targets",
        "changed": "⟦noise⟧",
        "eos": "¶ end of sequence",
        "pad": "· pad",
        "mask": "▢ MASK",
        "sentinel": "sentinel",
    }
    legend = Text("  ").join(Text(sign, _STYLES[role]) for role, sign in signs.items())
    return legend.append(
        "\n␊ line end  ␉ tab  ␛ escape  <U+00A0> not printable  <0xC3> part of a character"
        "\nNothing under “model reads”: it reads the token itself."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Reads the flags and runs `inspect_data`."""
    with config.program():
        flags, rest = own_flags("inspect_data").parse_known_args(argv)
        checkpoint = flags.checkpoint and open_checkpoint(flags.checkpoint)
        rest, texts = checkpoint_texts(checkpoint, rest, "runs/inspect_data.gin")
        if checkpoint:
            texts["the data of the training"] = dataset_text(checkpoint, f"{__package__}.inspect_data.inspect_data")
    config.run(inspect_data, rest, texts=texts)


if __name__ == "__main__":
    main()
