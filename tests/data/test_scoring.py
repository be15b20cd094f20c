"""Which metric function of a task sees what."""

import functools

import seqio

from diffusion_t5x.data import scoring


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
