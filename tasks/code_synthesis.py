"""Code synthesis, scored by running the programs: MBPP, HumanEval and its infilling, from their authors' JSONL files.

A gin file calls `mbpp`, `humaneval` or `humaneval_infilling`, which register a SeqIO task (see gin/tasks/mbpp.gin). An
example has "tests" for its program; the metric runs them (`evaluation.code.execution`) and returns pass@k.
"""

import functools
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diffusion_t5x.data import templates, text_files
from diffusion_t5x.data.vocabulary import AnyVocabulary
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.code.execution import Limits, Tests
from diffusion_t5x.evaluation.code.pass_at_k import passed_tests
from diffusion_t5x.tasks import readers, registration

logger = logging.getLogger(__name__)

MBPP, HUMANEVAL, INFILLING = "mbpp", "humaneval", "humaneval_infilling"
# By task_id; the usual cut of the paper's 974 problems.
MBPP_SPLITS = {"prompt": range(1, 11), "test": range(11, 511), "validation": range(511, 601), "train": range(601, 975)}
SHOTS = (2, 3, 4)  # the task_ids of the paper's prompt
_MBPP_FIELDS = {"task_id": int, "text": str, "code": str, "test_list": list, "test_setup_code": str}
_HUMANEVAL_FIELDS = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), str)
_INFILLING_FIELDS = _HUMANEVAL_FIELDS | {"suffix": str}
_GAP = "<hole>"  # in the inputs of the infilling task
# Where another example of a few-shot prompt would begin.
_MBPP_END = re.compile(r"\[DONE\]|\[BEGIN\]|^You are an expert", re.MULTILINE)
# Where the function ends (Chen et al. 2021, section 2.3).
_HUMANEVAL_END = re.compile(r"\n(?=class|def|#|if|print)")


def mbpp(
    vocabulary: AnyVocabulary, path: str, num_shots: int = 0, limits: Limits = Limits(), allow_unsafe: bool = False
) -> str:
    """Registers the SeqIO task `mbpp`, replacing any earlier one, and returns its name.

    Mostly Basic Python Problems (Austin et al. 2021, arXiv 2108.07732), with the paper's prompt: the description and
    the three tests. The target is the reference program. A model's output is cut before the first `[DONE]`, `[BEGIN]`
    or next prompt.

    Args:
      vocabulary: vocabulary of inputs and targets.
      path: the file mbpp.jsonl of google-research/mbpp, optionally with .gz.
      num_shots: number of solved problems before each prompt, of the paper's three (tasks 2, 3, 4).
      limits: limits of a program that is scored.
      allow_unsafe: score without isolation if there is none (see `evaluation.code.execution.check`).

    Raises:
      UserError: the file cannot be read or is not MBPP's, or there are not that many shots.
    """
    if not 0 <= num_shots <= len(SHOTS):
        raise UserError(f"MBPP's prompt has 0 to {len(SHOTS)} solved problems, not {num_shots}.")
    rows = _read(path, _MBPP_FIELDS)
    if surplus := len(rows.keys() - {task_id for ids in MBPP_SPLITS.values() for task_id in ids}):
        logger.warning("%s: %d problems belong to no split of MBPP and are left out", path, surplus)
    if missing := [task_id for ids in MBPP_SPLITS.values() for task_id in ids if task_id not in rows]:
        raise UserError(f"{path} lacks MBPP's task {missing[0]}, and {len(missing) - 1} others.")
    shots = "".join(_mbpp_prompt(rows[i]) + f"{_source(rows[i]['code'])}\n[DONE]\n\n" for i in SHOTS[:num_shots])
    examples = {
        split: [
            {
                "task_id": str(task_id),
                "inputs": shots + _mbpp_prompt(rows[task_id]),
                "targets": _source(rows[task_id]["code"]),
                "tests": _mbpp_tests(rows[task_id]),
            }
            for task_id in ids
        ]
        for split, ids in MBPP_SPLITS.items()
    }
    return _register(MBPP, vocabulary, examples, mbpp_program, limits, allow_unsafe)


def humaneval(vocabulary: AnyVocabulary, path: str, limits: Limits = Limits(), allow_unsafe: bool = False) -> str:
    """Registers the SeqIO task `humaneval`, replacing any earlier one, and returns its name.

    HumanEval (Chen et al. 2021, arXiv 2107.03374): the input is a function's head and docstring, the target its body. A
    model's output is cut where the body ends, and run after the input. The only split is "test".

    Args:
      vocabulary: vocabulary of inputs and targets.
      path: the file HumanEval.jsonl of openai/human-eval, optionally with .gz.
      limits, allow_unsafe: as in `mbpp`.

    Raises:
      UserError: the file cannot be read or is not HumanEval's.
    """
    examples = [
        {
            "task_id": row["task_id"],
            "inputs": row["prompt"],
            "targets": row["canonical_solution"],
            "tests": _humaneval_tests(row),
        }
        for row in _read(path, _HUMANEVAL_FIELDS).values()
    ]
    return _register(HUMANEVAL, vocabulary, {"test": examples}, humaneval_program, limits, allow_unsafe)


def humaneval_infilling(
    vocabulary: AnyVocabulary, path: str, limits: Limits = Limits(), allow_unsafe: bool = False
) -> str:
    """Registers the SeqIO task `humaneval_infilling`, replacing any earlier one, and returns its name.

    HumanEval's programs with a gap (Bavarian et al. 2022, arXiv 2207.14255): a line, some lines or a random span. The
    input is the program with `<hole>` in the gap, the target what belongs there. A model's output is run in the gap, as
    it is. The only split is "test". `infilling_templates` has the same problems as texts with holes.

    Args:
      vocabulary: vocabulary of inputs and targets.
      path: one of the files of openai/human-eval-infilling, such as HumanEval-SingleLineInfilling.jsonl.gz.
      limits, allow_unsafe: as in `mbpp`.

    Raises:
      UserError: the file cannot be read or is not one of these.
    """
    examples = [
        {
            "task_id": row["task_id"],
            "inputs": row["prompt"] + _GAP + row["suffix"],
            "targets": row["canonical_solution"],
            "tests": json.dumps(_infilling_tests(row)),
        }
        for row in _read_infilling(path)
    ]
    return _register(INFILLING, vocabulary, {"test": examples}, infilled_program, limits, allow_unsafe)


def infilling_templates(path: str, hole: str = "<hole:?>") -> tuple[list[str], list[Tests]]:
    """Returns the problems of `humaneval_infilling` as texts with a hole, and the tests of the whole programs.

    Args:
      path: as in `humaneval_infilling`.
      hole: the hole, see `data.templates`.
    """
    rows = _read_infilling(path)
    texts = [templates.escape(row["prompt"]) + hole + templates.escape(row["suffix"]) for row in rows]
    return texts, [_tests(_infilling_tests(row)) for row in rows]


def mbpp_program(text: str, prompt: str) -> str:
    """Returns the program in a model's output."""
    del prompt
    return _MBPP_END.split(text, maxsplit=1)[0]


def humaneval_program(text: str, prompt: str) -> str:
    """Returns the prompt's beginning of a program with the model's continuation."""
    return prompt + _HUMANEVAL_END.split(text, maxsplit=1)[0]


def infilled_program(text: str, prompt: str) -> str:
    """Returns the program with a model's output in its gap."""
    return prompt.replace(_GAP, text)


def _mbpp_prompt(row: Mapping[str, Any]) -> str:
    tests = "\n".join(row["test_list"])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _source(code: str) -> str:
    return code.replace("\r\n", "\n").rstrip()


def _mbpp_tests(row: Mapping[str, Any]) -> str:
    functions = re.findall(r"^def (\w+)", row["code"], re.MULTILINE)
    return json.dumps({"asserts": row["test_list"], "setup": row["test_setup_code"], "entry_points": functions})


def _humaneval_tests(row: Mapping[str, Any]) -> str:
    """Returns the authors' `check` on the model's function, with the prompt's helpers, not the program's."""
    return json.dumps(_checks(row, row["prompt"]))


def _infilling_tests(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same with the reference program's helpers, as the prompt may end anywhere."""
    return _checks(row, row["prompt"] + row["canonical_solution"] + row["suffix"])


def _checks(row: Mapping[str, Any], helpers: str) -> dict[str, Any]:
    name = row["entry_point"]
    test = f"candidate_ = {name}\n{helpers}\n{name} = candidate_\n{row['test']}\ncheck(candidate_)"
    return {"asserts": [test], "entry_points": [name]}


def _tests(fields: Mapping[str, Any]) -> Tests:
    """Returns the tests with these fields, of which JSON has lists."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return Tests(**values)


def _read_infilling(path: str) -> list[Mapping[str, Any]]:
    rows = list(_read(path, _INFILLING_FIELDS).values())
    if odd := [row["task_id"] for row in rows if _GAP in row["prompt"] + row["suffix"]]:
        raise UserError(f"{path}: the program of {odd[0]} contains {_GAP}, which marks the gap: is it the right file?")
    return rows


def _read(path: str, fields: Mapping[str, type]) -> dict[Any, Mapping[str, Any]]:
    """Returns the problems in a file of JSON lines by task_id; each must have all the fields."""
    records = readers.Jsonl().read(text_files.expand(path))
    rows: dict[Any, Mapping[str, Any]] = {}
    for number, row in enumerate(records, 1):
        if missing := [name for name in fields if name not in row]:
            raise UserError(f"Problem {number} of {path} has no {missing[0]!r}: is it the right file?")
        if odd := [name for name, kind in fields.items() if not _is_a(row[name], kind)]:
            place, value = records.where(number - 1), json.dumps(row[odd[0]])
            raise UserError(f"{place}: {odd[0]!r} is {value[:40]}: is it the right file?")
        if row["task_id"] in rows:
            raise UserError(f"{records.where(number - 1)}: the task_id {row['task_id']!r} occurs twice in {path}.")
        rows[row["task_id"]] = row
    return rows


def _is_a(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    return isinstance(value, kind)


def _register(
    name: str,
    vocabulary: AnyVocabulary,
    examples: Mapping[str, Sequence[Mapping[str, str]]],
    program: Callable[[str, str], str],
    limits: Limits,
    allow_unsafe: bool,
) -> str:
    def postprocess(text: str | Sequence[str], example: Mapping[str, Any], is_target: bool) -> Any:
        """Returns the tests for a target; for a prediction its program, or those of its samples."""
        if is_target:
            return _tests(json.loads(example["tests"]))
        texts = [text] if isinstance(text, str) else text
        programs = [program(text, example["inputs_pretokenized"]) for text in texts]
        return programs[0] if isinstance(text, str) else programs

    def make() -> dict[str, Any]:
        import seqio
        import tensorflow as tf

        def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
            del shuffle_files, seed  # the task's buffer holds a whole split
            columns = {key: [example[key] for example in examples[split]] for key in examples[split][0]}
            return tf.data.Dataset.from_tensor_slices(columns)

        return {
            "source": seqio.FunctionDataSource(dataset, tuple(examples)),
            "preprocessors": [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
            "output_features": dict.fromkeys(("inputs", "targets"), seqio.Feature(vocabulary, add_eos=True)),
            "postprocess_fn": postprocess,
            "metric_fns": [functools.partial(passed_tests, limits=limits, allow_unsafe=allow_unsafe)],
            "shuffle_buffer_size": 512,
        }

    return registration.add(name, make)
