"""The quickstart's SeqIO tasks: nothing to download; the vocabulary is trained on first use.

quickstart_corpus_prefix_lm          the Python standard library: the first part of a chunk is given, the rest predicted
quickstart_corpus_span_corruption    the same: some spans of a chunk are hidden and predicted
quickstart_dates_numbers             the part of quickstart_pairs that is learned first: dates and numbers
quickstart_pairs                     the fine-tuning task: English to French dates, numbers, units, names ...
quickstart_pretrain                  for pretraining: of 10 examples 8 are of the corpus (prefix LM) and 2 are pairs
quickstart_pretrain_span_corruption  the same with span corruption
"""

import functools
import hashlib
import io
import os
import pathlib
import tempfile
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from diffusion_t5x.data.sentencepiece_vocabulary import SentencePieceVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import metrics
from diffusion_t5x.evaluation.code import pass_at_k
from diffusion_t5x.tasks import cldr_pairs, preprocessors, registration, sources, stdlib_corpus

if TYPE_CHECKING:
    import seqio

PIECES = 1_947  # with 100 sentinels and MASK: 2,048 ids
SENTINELS = 100
CORPUS_CHARACTERS = 3_000_000  # of the corpus that the vocabulary is trained on


def cache_folder() -> pathlib.Path:
    """Returns $DIFFUSION_T5X_CACHE, or ~/.cache/diffusion_t5x."""
    return pathlib.Path(os.environ.get("DIFFUSION_T5X_CACHE") or "~/.cache/diffusion_t5x").expanduser()


def _training_text() -> list[str]:
    """Returns every n-th document of the corpus, line by line, and the training side of the pairs."""
    documents = stdlib_corpus.documents("train")
    step = max(1, sum(map(len, documents)) // CORPUS_CHARACTERS)
    lines = [line for document in documents[::step] for line in document.splitlines() if line]
    return lines + [text for pair in cldr_pairs.pairs("train") for text in (pair.english, pair.french)]


@functools.cache
def vocabulary_file() -> str:
    """Returns the path of the SentencePiece model; trains it if the cache has none for this text (2 s, same bytes).

    Raises:
      UserError: the cache folder cannot be written.
    """
    text = _training_text()
    settings: dict[str, Any] = {
        "vocab_size": PIECES,
        "model_type": "bpe",
        "byte_fallback": True,
        "split_digits": True,
        # Text comes back exactly as it went in: no-break spaces, indentation, tabs and line ends are content.
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["\n", "\t"],
        "allow_whitespace_only_pieces": True,
        "character_coverage": 0.9995,
        "pad_id": 0,
        "eos_id": 1,
        "unk_id": 2,
        "bos_id": -1,
        "num_threads": 1,  # recorded in the model: its bytes must not depend on the machine
        "minloglevel": 2,
    }
    fingerprint = hashlib.sha256(repr((settings, text)).encode()).hexdigest()[:16]
    path = cache_folder() / f"quickstart-{fingerprint}.model"
    if not path.exists():
        import sentencepiece

        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **settings)
        _write_atomically(path, model.getvalue())
    return str(path)


def _write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file so that readers see all of it or none, even if two processes write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}): point DIFFUSION_T5X_CACHE elsewhere.") from error


class QuickstartVocabulary(SentencePieceVocabulary):
    """The vocabulary at `vocabulary_file()`, found (or trained) when its first text is encoded."""

    def __init__(self):
        super().__init__("", SENTINELS)

    @functools.cached_property
    def _model(self):
        self.file = vocabulary_file()
        return super()._model

    def source(self):
        self._model  # noqa: B018  (it has a file now)
        return super().source()


VOCABULARY = QuickstartVocabulary()


@functools.cache
def features() -> "dict[str, seqio.Feature]":
    """SeqIO's features of the tasks."""
    import seqio

    return {name: seqio.Feature(VOCABULARY, add_eos=True) for name in ("inputs", "targets")}


def _register() -> None:
    for objective in (preprocessors.prefix_lm, preprocessors.span_corruption):
        registration.add(f"quickstart_corpus_{objective.__name__}", functools.partial(_corpus, objective))
    registration.add("quickstart_pairs", functools.partial(_pairs, None))
    registration.add("quickstart_dates_numbers", functools.partial(_pairs, ("date", "number")))
    for mixture, corpus in (
        ("quickstart_pretrain", "quickstart_corpus_prefix_lm"),
        ("quickstart_pretrain_span_corruption", "quickstart_corpus_span_corruption"),
    ):
        registration.mixture(mixture, [(corpus, 0.8), ("quickstart_pairs", 0.2)])


def _corpus(objective: registration.Preprocessor) -> dict[str, Any]:
    import seqio

    documents = sources.Columns(lambda split: {"targets": stdlib_corpus.documents(split)}, ("train", "validation"))
    tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
    return {
        "source": documents.in_seqio(),
        "preprocessors": [tokenize, objective, seqio.preprocessors.append_eos],
        "output_features": features(),
        "shuffle_buffer_size": 2_048,  # chunks: some 200 documents' worth
    }


def _pairs(kinds: Collection[str] | None) -> dict[str, Any]:
    """Returns the arguments of the task of these kinds of pairs; None: of all."""
    import seqio

    columns = functools.partial(_pair_columns, kinds)
    return {
        "source": sources.Columns(columns, ("train", "validation", "test")).in_seqio(),
        "preprocessors": [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        "output_features": features(),
        "metric_fns": [metrics.bleu, metrics.exact_match, pass_at_k.exact_match_at_k],
        "shuffle_buffer_size": 1,  # the source shuffles
    }


def _pair_columns(kinds: Collection[str] | None, split: str) -> dict[str, list[str]]:
    pairs = [pair for pair in cldr_pairs.pairs(split) if kinds is None or pair.kind in kinds]
    return {
        "inputs": [pair.english for pair in pairs],
        "targets": [pair.french for pair in pairs],
        "kind": [pair.kind for pair in pairs],
    }


_register()
