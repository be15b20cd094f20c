"""Macros of the shipped gin files: values, the parameters they are bound to, and the docstrings of these.

Files are parsed, not run: the modules that they name are not imported.
"""

import ast
import dataclasses
import functools
import pathlib
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gin import config_parser

from diffusion_t5x.command_line.gin_reading import AsText, Spelled, shipped, shipped_text

PACKAGE = pathlib.Path(__file__).parents[1]
REQUIRED = "%gin.REQUIRED"
# Where a docstring's words about a parameter need the rest of the docstring, or where a macro sets several parameters.
_MEANINGS = {
    "ANNEAL_STEPS": "training steps over which causal attention becomes bidirectional; None: no annealing.",
    "ARCHITECTURE": '"decoder_only" or "encoder_decoder".',
    "AXES": 'sizes that grow, by axis: "length", "batch_size", "vocabulary_size" and "num_layers".',
    "BATCH_SIZE": "examples per step, over all devices.",
    "BENCHMARK_OUTPUT_DIR": "folder that gets the measured times; created if missing.",
    "BEST_METRIC": 'metric by which the best checkpoints are kept, such as "my_task/exact_match".',
    "BLOCK_SIZE": "target tokens per block; decode with the size that the model was trained with.",
    "BLOCKS_FROM": 'where blocks are counted from: the first target ("targets") or the row\'s beginning ("row").',
    "BYTES_PER_TOKEN": "length of a token, in UTF-8 bytes, where texts are measured without a tokenizer.",
    "CACHE_DIR": "folder of the tokenized data that `cache_tasks` writes.",
    "CASES": "what to time, each with a name of your choice.",
    "CHECKPOINT_PATH": "the model: a checkpoint, a folder of checkpoints or a MODEL_DIR (its newest checkpoint).",
    "CODE_FILES": "files of source code, as paths or glob patterns by split.",
    "DATA_SHARE": "probability that an on-policy step trains on the data's targets in place of the model's own text.",
    "DECODER": "how text is decoded; a file of `decoding/` sets it.",
    "DECODERS": "decoders to time, each with a name of your choice.",
    "DROPOUT_RATE": "dropout probability: embedding, residual branches, feed-forward layers, last norm.",
    "EOS_ID": "token id that ends a text.",
    "EVAL_OUTPUT_DIR": "folder that gets scores and predictions; created if missing.",
    "EVAL_STEPS": "batches of held-out data per evaluation of the loss; None takes all.",
    "EVAL_TASKS": "tasks or mixtures to evaluate, instead of MIXTURE_OR_TASK_NAME.",
    "FILES": "your data: paths or glob patterns by split.",
    "GROWTH_ROLLOUTS": "rollouts over which on-policy texts grow to MAX_ROLLOUT_LENGTH.",
    "HELD_OUT": 'percentage of "train" that becomes another split, such as `{"validation": 1.0}`.',
    "INFER_OUTPUT_DIR": "folder that gets the predictions; created if missing.",
    "INITIAL_CHECKPOINT_PATH": "the model to start from: a checkpoint, a folder of them or a MODEL_DIR; None: scratch.",
    "INPUTS": "template of the inputs, with field names in braces; None makes every token a target.",
    "INPUTS_FIELD": "field of TEXT_FILE with the inputs.",
    "LENGTHS": "target lengths to time, in tokens.",
    "LORA": "LoRA settings; None trains the whole model.",
    "MAX_BATCH_SIZE": "largest batch size in the search for one that saturates the device; None skips it.",
    "MAX_ROLLOUT_LENGTH": "longest text that an on-policy step decodes, in tokens.",
    "METRICS": "metrics of decoded text, such as `(@metrics.bleu, @metrics.exact_match)`.",
    "MIN_ROLLOUT_LENGTH": "maximum length of the first on-policy texts, in tokens; it grows to MAX_ROLLOUT_LENGTH.",
    "MIXTURE_OR_TASK_NAME": "SeqIO task or mixture to read; `diffusion-t5x tasks` lists the shipped ones.",
    "MODEL": "the model's dimensions; files of `models/` and `sizes/` set them.",
    "MODEL_DIR": "folder of the run: checkpoints, metrics, configuration.",
    "NTREX_FILES": "NTREX files, as paths or glob patterns by split.",
    "NUM_DECODED_EXAMPLES": "examples to decode, from the start of the split; None takes all.",
    "NUM_DRAWS": "noise draws per example for the likelihood bound (an even number), or for a search of times.",
    "NUM_SAMPLES": "canvases decoded per example; the best by model score is kept.",
    "NUM_SCORED_EXAMPLES": "examples to score, from the start of the split; None takes all.",
    "NUM_SHOTS": "solved examples put before each input.",
    "NUM_STEPS": "denoising steps; None: one per token.",
    "NUM_TEXTS": "texts to time, drawn from TEXT_FILE.",
    "OBJECTIVE": "what training minimises; a file of `objectives/` sets it.",
    "PAD_ID": "token id of padding.",
    "PRETRAINING": "pretraining task on documents: a function of `tasks.preprocessors`.",
    "PROMPTS_FILE": "JSON lines of token ids to train on.",
    "RANDOM_SEED": "seed of initialisation, data order, noise and decoding.",
    "REPEATS": "number of times that each measurement is taken.",
    "SOURCE_LANGUAGE": "language code of the inputs.",
    "STATES": 'noisy states that distillation learns from: "visited" by the student as it wrote, or "random" masks.',
    "TARGETS": "template of the targets, with field names in braces.",
    "TARGETS_FIELD": "field of TEXT_FILE with the targets.",
    "TARGET_LANGUAGE": "language code of the targets.",
    "TARGET_LENGTH": "target tokens per row.",
    "TASK": "name of the task that the predictions are for.",
    "TASK_FEATURE_LENGTHS": "tokens of `inputs` and `targets`; longer ones are truncated.",
    "TASK_NAME": "name under which the task is registered.",
    "TATOEBA_FILE": "Tatoeba file, as a path or glob pattern by split.",
    "TEACHER_CHECKPOINT_PATH": "the autoregressive teacher in distillation: a checkpoint or a MODEL_DIR.",
    "TEMPERATURE": "sampling temperature; 0 is greedy.",
    "PROMPTS_END": "prompts with answers end in EOS: T5 was trained with it, most decoder-only models were not.",
    "TEXT_PRETRAINING": "pretraining task on plain text: a function of `tasks.preprocessors`.",
    "TEXT_FILE": "prompts: a line each in `tasks/stories.gin`, JSON lines in `runs/benchmark_slots.gin`.",
    "TEXT": "the natural-language part of a pretraining mixture.",
    "THRESHOLD": "probability above which a step writes a token at once; None writes a fixed number per step.",
    "TOKENIZER_FILE": "tokenizer of a model imported from llama2.c.",
    "TOP_K": "restricts the divergence to the teacher's k most likely tokens; None takes all.",
    "TRAIN_STEPS": "step to train up to, counting those before a resume and those of the initial checkpoint.",
    "UPPER_WEIGHT": "share of the upper bound for negative advantages; 0 takes the lower bound for all texts.",
    "VALIDATION_FILE": "JSON lines of token ids to evaluate on.",
    "VOCABULARY": "the tokenizer, as a SeqIO vocabulary.",
    "VOCABULARY_FILE": "the tokenizer: a SentencePiece model, a tokenizer.json or llama2.c's .bin; None: bytes.",
    "WARMUP_STEPS": "steps over which the learning rate rises from 0.",
}


@dataclasses.dataclass(frozen=True)
class Use:
    """A parameter that a macro is bound to in a file, such as `data.seqio_source.SeqioDataset.batch_size`.

    Attributes:
      file: the gin file.
      parameter: its full name, without this package's.
      meaning: its entry in the docstring; "" if there is none.
    """

    file: str
    parameter: str
    meaning: str


@dataclasses.dataclass
class Macro:
    """A macro of the shipped gin files.

    Attributes:
      name: in capitals.
      values: its value in each file, as gin text; `REQUIRED` if the user has to set it.
      uses: the parameters that it is bound to, documented ones first.
    """

    name: str
    values: dict[str, str] = dataclasses.field(default_factory=dict)
    uses: list[Use] = dataclasses.field(default_factory=list)

    def meaning(self, files: Sequence[str] = ()) -> str:
        """Returns the docstring entry of the parameter to which these files, or else most files, bind it."""
        if self.name in _MEANINGS:
            return _MEANINGS[self.name]
        own = [use.meaning for use in self.uses if use.meaning and use.file in files]
        meanings = own or [use.meaning for use in self.uses if use.meaning]
        return max(meanings, key=meanings.count, default="")

    def default(self, files: list[str]) -> str:
        """Returns the value that the last of these files to set it gives; "" if none does."""
        return next((self.values[file] for file in reversed(files) if file in self.values), "")


@dataclasses.dataclass
class File:
    """Contents of one gin file.

    Attributes:
      comment: the comment at its top.
      imports: imported modules, by their names in the file.
      includes: the files it includes.
      values: values of macros, as gin text.
      uses: `(macro, selector, parameter)` for each parameter that a macro is bound to.
    """

    comment: str
    imports: dict[str, str]
    includes: list[str]
    values: dict[str, str]
    uses: list[tuple[str, str, str]]


def with_includes(file: str) -> list[str]:
    """Returns a shipped file and all files that it includes, in the order in which gin reads them."""
    found = [inner for included in read(file).includes for inner in with_includes(included)]
    return list(dict.fromkeys([*found, file]))


@functools.cache
def macros() -> Mapping[str, Macro]:
    """Returns all macros of the shipped files, by name."""
    found: dict[str, Macro] = {}
    for name in shipped():
        file = read(name)
        for macro, value in file.values.items():
            found.setdefault(macro, Macro(macro)).values[name] = value
        for macro, selector, parameter in file.uses:
            found.setdefault(macro, Macro(macro)).uses.append(_use(name, selector, parameter))
    for one in found.values():
        one.uses.sort(key=lambda use: not use.meaning)
    return dict(sorted(found.items()))


def of_runs(run_files: list[str]) -> list[Macro]:
    """Returns the macros that these run files set, required ones first."""
    named = list(
        dict.fromkeys(name for file in run_files for inner in with_includes(file) for name in read(inner).values)
    )
    return sorted((macros()[name] for name in named), key=lambda macro: REQUIRED not in macro.default(run_files))


@functools.cache
def read(name: str) -> File:
    """Parses a shipped file."""
    text = shipped_text(name)
    comment = re.match(r"(#.*\n)*", text)
    assert comment is not None, "no lines match, too"
    file = File(re.sub(r"^# ?", "", comment[0], flags=re.MULTILINE).strip(), {}, [], {}, [])
    for statement in config_parser.ConfigParser(text, AsText()):
        if isinstance(statement, config_parser.ImportStatement):
            file.imports[statement.bound_name()] = statement.module
        elif isinstance(statement, config_parser.IncludeStatement):
            file.includes.append(statement.filename)
        elif isinstance(statement, config_parser.BindingStatement):
            if not statement.arg_name:
                file.values[statement.selector] = repr(statement.value)
            else:
                used = dict.fromkeys(_macros_in(statement.value))
                file.uses += [(macro, statement.selector, statement.arg_name) for macro in used]
    return file


def _macros_in(value: Any) -> Iterator[str]:
    """Yields the names of the macros in a value, at any depth."""
    if isinstance(value, Spelled):
        if value.startswith("%") and value != REQUIRED:
            yield value[1:]
    elif isinstance(value, Mapping):
        for item in value.items():
            yield from _macros_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _macros_in(item)


def _use(file: str, selector: str, parameter: str) -> Use:
    """Returns a parameter by its full name, with its docstring entry."""
    first, _, rest = selector.partition(".")
    module = _imports(file).get(first, first)
    name = f"{module}.{rest}".removeprefix(f"{PACKAGE.name}.")
    documented = _docstring(module, rest)
    return Use(file, f"{name}.{parameter}", _entry(documented, parameter))


def _imports(file: str) -> dict[str, str]:
    """Returns the modules that a file can name: its own imports and those of its includes."""
    return {name: module for inner in with_includes(file) for name, module in read(inner).imports.items()}


@functools.cache
def _docstring(module: str, name: str) -> str:
    """Returns the docstring of a function, a class or a verb's settings in this package; "" for other packages."""
    if not module.startswith(f"{PACKAGE.name}."):
        return ""
    path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return ast.get_docstring(node) or ""
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name and isinstance(node.value, ast.Call):
            return _docstring(module, ast.unparse(node.value.args[-1]))  # train = verb("train", Training)
        if isinstance(node, ast.ImportFrom) and node.module and name in [imported.name for imported in node.names]:
            return _docstring(node.module, name)
    return ""


def _entry(docstring: str, parameter: str) -> str:
    """Returns a parameter's entry under "Args:" or "Attributes:" of a docstring, as one line."""
    for section in re.findall(r"^(?:Args|Attributes):\n((?:  .*\n?|\n)+)", docstring, re.MULTILINE):
        for names, text in re.findall(r"^(\w[\w, ]*): (.+(?:\n  .+)*)", textwrap.dedent(section), re.MULTILINE):
            if parameter in names.split(", "):
                return " ".join(text.split())
    return ""
