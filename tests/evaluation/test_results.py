"""The account in results.json of the settings behind its scores."""

import dataclasses
import hashlib
import json

import pytest

from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import results
from diffusion_t5x.evaluation.evaluator import DecodeEval
from diffusion_t5x.reporting.published import PUBLISHED, matching

LENGTHS = {"inputs": 4, "targets": 8}


@dataclasses.dataclass(frozen=True)
class Dataset:
    mixture_or_task_name: str
    batch_size: int = 2
    task_feature_lengths: dict = dataclasses.field(default_factory=lambda: LENGTHS)


EVAL = DecodeEval(Dataset("squad"), SundaeDecoder(num_steps=10, num_samples=8))


def test_settings_are_structured_and_json_can_hold_them():
    described = results.describe([EVAL])
    assert json.loads(json.dumps(described)) == described
    decoder = {"class": "SundaeDecoder", "num_steps": 10, "num_samples": 8, "temperature": 0.2}
    assert decoder.items() <= described[0]["decoder"].items()
    assert described[0]["dataset"]["task_feature_lengths"] == LENGTHS and described[0]["num_examples"] is None


def test_the_fingerprint_is_of_inputs_and_targets_in_order():
    records = [{"inputs_pretokenized": "a", "targets_pretokenized": "é", "prediction": p} for p in "xy"]
    records[1]["inputs_pretokenized"] = "b"
    expected = hashlib.sha256(b'["a", "\\u00e9"]\n["b", "\\u00e9"]\n').hexdigest()
    assert results.fingerprint(records) == f"sha256:{expected}"
    assert results.fingerprint([r | {"prediction": "z", "score": 1} for r in records]) == f"sha256:{expected}"
    assert results.fingerprint(records[::-1]) != results.fingerprint(records)


def test_results_of_other_settings_are_kept(tmp_path):
    settings = results.describe({"evaluations": [EVAL], "use_ema": True})
    assert not results.is_done(tmp_path, "/m/checkpoint_1", settings)
    results.write_results(tmp_path, {"checkpoint": "/m/checkpoint_1", "settings": settings})
    assert results.is_done(tmp_path, "/m/checkpoint_1", settings)
    larger_batch = dataclasses.replace(EVAL, dataset=Dataset("squad", batch_size=4))
    assert results.is_done(
        tmp_path, "/m/checkpoint_1", results.describe({"evaluations": [larger_batch], "use_ema": True})
    )
    other = dataclasses.replace(EVAL, decoder=SundaeDecoder(num_steps=5), seed=3)
    for checkpoint, changed, named in (
        ("/m/checkpoint_2", settings, r"settings \(checkpoint\)"),
        ("/m/checkpoint_1", settings | {"use_ema": False}, r"settings \(use_ema\)"),
        (
            "/m/checkpoint_1",
            settings | {"evaluations": results.describe([other])},
            r"settings \(evaluations\[0\].decoder.num_steps, evaluations\[0\].seed\)",
        ),
    ):
        with pytest.raises(UserError, match=named):
            results.is_done(tmp_path, checkpoint, changed)
    (tmp_path / "results.json").write_text('{"results": {}}')  # of an earlier version
    with pytest.raises(UserError, match="has results with different settings"):
        results.is_done(tmp_path, "/m/checkpoint_1", settings)


def evaluated(task="squad", size=(768, 12), objective="Sundae", architecture="decoder_only", shifted=False, **decoder):
    """The parts of a results.json that decide which published numbers match."""
    model = {"embed_dim": size[0], "num_layers": size[1], "architecture": architecture, "shifted": shifted}
    evaluation = DecodeEval(Dataset(task), SundaeDecoder(**{"num_steps": 10, "num_samples": 8} | decoder))
    settings = {"evaluations": results.describe([evaluation]), "model": model}
    return {"settings": settings, "training_objective": objective}


def test_published_numbers_stand_beside_scores_of_their_own_setting():
    found = {(paper.source[-7:], paper.method): value for paper, _, value in matching("squad", 10570, evaluated())}
    assert found == {
        ("table 1", "span corruption"): 80.6,
        ("table 2", "diffusion"): 77.41,
        ("table 2", "AR2Diff N=0"): 64.77,
        ("table 2", "AR2Diff N=10K"): 68.12,
        ("table 2", "AR2Diff N=100K"): 71.87,
    }
    ((paper, metric, value),) = matching("squad", 10570, evaluated(num_steps=20))
    assert (paper.method, metric, value) == ("diffusion, 20 steps", "f1", 77.72)
    encoders = matching("wmt14_enfr", 3003, evaluated("wmt14_enfr", architecture="encoder_decoder"))
    assert [(metric, value) for _, metric, value in encoders] == [("bleu", 27.6), ("bleu", 28.7)]


@pytest.mark.parametrize(
    ("task", "num_examples", "report"),
    [
        ("squad", 512, evaluated()),  # not all of it
        ("squad", None, evaluated()),  # a loss
        ("other", 10570, evaluated("other")),
        ("squad", 10570, evaluated("wmt14_enfr")),
        ("squad", 10570, evaluated(size=(64, 4))),
        ("squad", 10570, evaluated(objective="Masked")),
        ("squad", 10570, evaluated(objective=None)),
        ("squad", 10570, evaluated(num_steps=7)),
        ("squad", 10570, evaluated(shifted=True)),
        ("squad", 10570, {}),  # of an earlier version
    ],
)
def test_nothing_is_published_of_other_settings(task, num_examples, report):
    assert matching(task, num_examples, report) == []


def test_published_scores_of_90_problems_are_multiples_of_a_90th():
    scores = [paper.scores["mbpp"] for paper in PUBLISHED if "mbpp" in paper.scores]
    assert len(scores) == 22
    for score in scores:
        assert abs(score - round(score * 0.9) / 0.9) < 0.1, score  # printed with one digit, some cut off
