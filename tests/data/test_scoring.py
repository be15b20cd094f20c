"""A task's metric functions get the first sample or all of them, and run only where they can."""

import functools
import sys
import types

import pytest
import seqio

from diffusion_t5x.data import scoring
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import metrics
from diffusion_t5x.evaluation.code import execution as code_execution
from diffusion_t5x.evaluation.code.pass_at_k import passed_tests


def first_is_right(targets, predictions):
    assert all(isinstance(prediction, str) for prediction in predictions)
    return {"first": sum(map(str.__eq__, targets, predictions))}


def any_is_right(targets, predictions, at_least=1):
    return {"any": sum(some.count(target) >= at_least for target, some in zip(targets, predictions, strict=True))}


any_is_right.takes_samples = True


def test_a_metric_takes_the_first_sample_or_all_if_it_says_so():
    features = {"targets": seqio.Feature(seqio.ByteVocabulary())}
    task = seqio.Task(
        "samples",
        source=seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, ["test"]),
        output_features=features,
        preprocessors=[],
        postprocess_fn=lambda text, example, is_target: text.upper() if is_target else text.strip().upper(),
        metric_fns=[first_is_right, functools.partial(any_is_right, at_least=2)],
    )
    records = [
        {"targets_pretokenized": "a", "prediction": "b", "predictions": ["b", " a", "a "]},
        {"targets_pretokenized": "c", "prediction": "c ", "predictions": ["c ", "d", "d"]},
        {"targets_pretokenized": "e", "prediction": "e"},
    ]
    assert scoring.score(task, records) == {"first": 2, "any": 1}


def test_metrics_say_whether_they_can_run_here():
    def plain(targets, predictions):
        return {}

    def picky(targets, predictions, limit=0):
        return {}

    def check_here(limit=0):
        if limit:
            raise UserError(f"not with {limit}")

    picky.check_here = check_here
    scoring.check_metrics([plain, picky, functools.partial(plain)])
    with pytest.raises(UserError, match="not with 3"):
        scoring.check_metrics([plain, functools.partial(picky, limit=3)])


@pytest.mark.parametrize("found", [None, types.ModuleType("math_verify")])  # nothing; a folder that has the name
def test_a_metric_whose_package_is_missing_says_how_to_get_it(monkeypatch, found):
    monkeypatch.setitem(sys.modules, "math_verify", found)
    with pytest.raises(UserError, match=r"pip install diffusion_t5x\[math\]"):
        scoring.check_metrics([metrics.math_accuracy])


def test_programs_that_nothing_holds_in_are_refused_before_there_are_any(monkeypatch):
    unsafe = code_execution.Protections(isolation=False, reason="no namespaces")
    monkeypatch.setattr(code_execution, "protections", lambda: unsafe)
    with pytest.raises(UserError, match="Programs cannot be isolated here: no namespaces"):
        scoring.check_metrics([functools.partial(passed_tests, limits=code_execution.Limits())])
    scoring.check_metrics([functools.partial(passed_tests, allow_unsafe=True)])
