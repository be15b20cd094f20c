"""Rewards by a task's metrics, a program's tests, formats and sums: on real tasks, programs in the real sandbox."""

import dataclasses
import threading
import time

import pytest

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation import metrics
from diffusion_t5x.evaluation.rewards import Format, Metric, PassedTests, Similarity, Sum
from diffusion_t5x.training.rewards import judged

seqio = pytest.importorskip("seqio")

from diffusion_t5x.tasks import code_synthesis, overfit  # noqa: E402, F401

EMPTY = ("", " ", "\n\n")


def test_a_metric_is_that_of_one_text():
    dataset = SeqioDataset("overfit_prefix_lm", {"inputs": 32, "targets": 32}, batch_size=4)
    example = next(dataset.eval_batches(1))[1][0]
    exact = Metric(dataset, metrics.exact_match, "exact_match")
    right = example["targets_pretokenized"]
    assert [exact(text, example) for text in (right, right + ".", *EMPTY)] == [1, 0, 0, 0, 0]
    bleu = Metric(dataset, metrics.bleu, "bleu")
    assert bleu(right, example) == pytest.approx(1) and 0 < bleu(right + " more", example) < 1
    with pytest.raises(UserError, match="no value 'accuracy', only exact_match"):
        dataclasses.replace(exact, name="accuracy")(right, example)


def test_metrics_of_others_are_rewards_too():
    """t5's SQuAD, whose targets are lists; one that returns SeqIO's values; one of samples; not one of scores."""
    t5_metrics = pytest.importorskip("t5.evaluation.metrics")

    class Answers:
        def postprocessed(self, text, example):
            return example["answers"], text.strip()

    example = {"answers": ["the Eiffel Tower", "Eiffel"]}

    def reward(text, metric, name, scale=100.0):
        found = Metric(Answers(), metric, name, scale)
        found.check_here()
        return found(text, example)

    assert [reward(text, t5_metrics.squad, "em") for text in ("Eiffel tower.", "eiffel", "the tower")] == [1, 1, 0]
    assert reward("the tower", t5_metrics.squad, "f1") == pytest.approx(2 / 3)

    def words(targets, predictions):
        return {"words": seqio.metrics.Scalar(len(predictions[0].split()) / len(targets))}

    assert reward("three short words", words, "words", 1.0) == 3

    def best(targets, predictions):
        return {"best": float(max(sample in targets[0] for sample in predictions[0]))}

    best.takes_samples = True
    assert reward("Eiffel", best, "best", 1.0) == 1
    with pytest.raises(UserError, match="rank_classification takes 'scores'"):
        Metric(Answers(), t5_metrics.rank_classification, "accuracy").check_here()


def test_math_is_compared_by_value_not_by_text():
    example = {"inputs_pretokenized": "", "targets_pretokenized": "2 * 21 = 42\n#### 42"}

    class Plain:
        def postprocessed(self, text, example):
            return example["targets_pretokenized"], text

    right = Metric(Plain(), metrics.math_accuracy, "math_accuracy")
    right.check_here()
    texts = ["#### 42", "so it is\n#### 42.0", "#### 41", "####", *EMPTY]
    rewards, failed = judged(right, texts, [example] * len(texts), seconds=10)
    assert rewards.tolist() == [1, 1, 0, 0, 0, 0, 0] and not failed.any()
    # A number too large to compute: the reward's own limit ends it, and it counts as a failure.
    start = time.monotonic()
    rewards, failed = judged(right, ["\\boxed{10^{10^{10}}}", "#### 42"], [example] * 2, seconds=0.3)
    assert rewards.tolist() == [0, 1] and failed.tolist() == [True, False] and time.monotonic() - start < 4
    found = []
    thread = threading.Thread(target=lambda: found.append(right("#### 42.0", example)))
    thread.start()
    thread.join()
    assert found == [1]


@pytest.mark.usefixtures("isolation", "nothing_left")
@pytest.mark.slow
def test_a_program_earns_the_share_of_its_tests_that_pass(test_data):
    name = code_synthesis.mbpp(seqio.ByteVocabulary(), str(test_data / "mbpp" / "mbpp.jsonl.gz"))
    dataset = SeqioDataset(name, {"inputs": 2048, "targets": 512}, split="train", batch_size=2)
    example = next(dataset.eval_batches(1))[1][0]
    reward = PassedTests(dataset)
    reward.check_here()
    tests, program = dataset.postprocessed(example["targets_pretokenized"] + "\n[DONE]\n", example)
    (function,) = tests.entry_points
    nothing = f"{program}\ndef {function}(*args):\n    return None"
    texts = [program, nothing, "def", "import sys; sys.exit(0)", "while True: pass", *EMPTY]
    quick = dataclasses.replace(reward, limits=dataclasses.replace(reward.limits, wall_seconds=1.0, cpu_seconds=1))
    rewards, failed = judged(quick, texts, [example] * len(texts), seconds=60)
    assert rewards.tolist() == [1] + [0] * (len(texts) - 1) and not failed.any()
    assert Sum([quick, Format("x")], [2.0, 1.0]).of_all(texts[:2], [example] * 2, 60).tolist() == [2, 0]
    half = dataclasses.replace(tests, asserts=(*tests.asserts, "assert 1 == 2"))

    class WithAWrongTest:
        def postprocessed(self, text, example):
            return half, text

    share = len(tests.asserts) / (len(tests.asserts) + 1)
    assert PassedTests(WithAWrongTest())(program, example) == pytest.approx(share)


def test_a_task_that_cannot_read_a_text_fails_this_one():
    class Fragile:
        def postprocessed(self, text, example):
            raise ValueError(text)

    rewards, failed = judged(PassedTests(Fragile()), ["a", "b"], [{}, {}], seconds=10)
    assert rewards.tolist() == [0, 0] and failed.all()


def test_programs_need_tests():
    dataset = SeqioDataset("overfit_prefix_lm", {"inputs": 32, "targets": 32}, batch_size=4)
    with pytest.raises(UserError, match="whose targets are tests"):
        PassedTests(dataset)("x", next(dataset.eval_batches(1))[1][0])


def test_formats_match_whole_texts():
    answer = Format(r".*#### -?\d+")
    assert [answer(text, {}) for text in ("2 + 2\n#### 4", "#### 4 or so", "4", "")] == [1, 0, 0, 0]
    with pytest.raises(UserError, match="no regular expression"):
        Format("(")


def test_similarity_is_a_share_of_characters():
    example = {"targets_pretokenized": "3 mars 2024"}
    found = [Similarity()(text, example) for text in ("3 mars 2024", "3 mai 2024", "mars", "xyz", "")]
    assert found == [1, 2 * 9 / 21, 2 * 4 / 15, 0, 0]


def test_tricks_earn_less_than_the_target():
    """Nothing, white space, the target twice or many times, with filling, every answer at once, the prompt again."""
    dataset = SeqioDataset("overfit_prefix_lm", {"inputs": 32, "targets": 32}, batch_size=4)
    example = next(dataset.eval_batches(1))[1][0]
    right, asked = example["targets_pretokenized"], example["inputs_pretokenized"]
    tricks = (*EMPTY, right * 2, f"{right} " * 10, right + " " * 50, right + ".", f"{right} or {asked}", asked)
    exact = Metric(dataset, metrics.exact_match, "exact_match")
    both = Sum([exact, Similarity()], [1.0, 0.5])
    for reward, best_trick in ((exact, 0), (Similarity(), 0.99), (both, 0.5)):
        rewards, failed = judged(reward, [right, *tricks], [example] * (len(tricks) + 1), seconds=10)
        assert rewards[0] == rewards.max() and rewards[1:].max() <= best_trick and not failed.any()
        assert (rewards[1 : 1 + len(EMPTY)] == 0).all()


def test_sums_are_weighted_and_check_their_parts():
    total = Sum([Format("a.*"), Format(".*b")], [1.0, 0.25])
    assert [total(text, {}) for text in ("ab", "a", "b", "c")] == [1.25, 1, 0.25, 0]
    rewards, failed = judged(
        Sum([Format("a"), lambda text, example: 1 / len(text)], [1.0, 1.0]), ["a", ""], [{}] * 2, 1
    )
    assert rewards.tolist() == [2, 0] and failed.tolist() == [False, True]
    with pytest.raises(UserError, match="2 rewards and 1 weights"):
        Sum([Format("a"), Format("b")], [1.0])

    class Elsewhere(Format):
        def check_here(self):
            raise UserError("not here")

    with pytest.raises(UserError, match="not here"):
        Sum([Format("a"), Elsewhere("b")], [1.0, 1.0]).check_here()
