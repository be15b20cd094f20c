"""MBPP and HumanEval: splits, prompts, where a program ends, and references that pass."""

import gzip
import json

import pytest

from diffusion_t5x import train
from diffusion_t5x.command_line import config
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.code.pass_at_k import passed_tests

seqio = pytest.importorskip("seqio")

from diffusion_t5x.tasks import code_synthesis  # noqa: E402

BYTES = seqio.ByteVocabulary()
LENGTHS = {"inputs": 2048, "targets": 512}
# Two problems in HumanEval's form; the second one's prompt has a helper that its test uses.
HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def add(a: int, b: int) -> int:\n    """Adds.\n    >>> add(1, 2)\n    3\n    """\n',
        "entry_point": "add",
        "canonical_solution": "    return a + b\n",
        "test": "METADATA = {}\n\ndef check(candidate):\n    assert candidate(1, 2) == 3\n    assert add(2, 2) == 4\n",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": 'def square(x):\n    return x * x\n\n\ndef root(y):\n    """The root of y."""\n',
        "entry_point": "root",
        "canonical_solution": "    x = 0\n    while square(x) < y:\n        x += 1\n    return x\n",
        "test": "def check(candidate):\n    for y in (0, 1, 4, 9):\n        assert square(candidate(y)) == y\n",
    },
]
# Three gaps in the second program, in the form of the infilling benchmark: a line, two lines, a span of characters.
_PROGRAM = HUMANEVAL[1]["prompt"] + HUMANEVAL[1]["canonical_solution"]
GAPS = {
    "SingleLineInfilling/HumanEval/1/L2": "        x += 1\n",
    "MultiLineInfilling/HumanEval/1/L0_L1": "    x = 0\n    while square(x) < y:\n",
    "RandomSpanInfilling/HumanEval/1/1": "< y:\n        x +",
}


@pytest.fixture
def mbpp_file(test_data):
    return str(test_data / "mbpp" / "mbpp.jsonl.gz")


@pytest.fixture
def humaneval_file(tmp_path):
    path = tmp_path / "HumanEval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HUMANEVAL), encoding="utf-8")
    return str(path)


@pytest.fixture
def infilling_file(tmp_path):
    path = tmp_path / "HumanEval-Infilling.jsonl.gz"
    cuts = [(task_id, gap, *_PROGRAM.split(gap)) for task_id, gap in GAPS.items()]
    rows = [
        HUMANEVAL[1] | {"task_id": task_id, "prompt": before, "suffix": after, "canonical_solution": gap}
        for task_id, gap, before, after in cuts
    ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return str(path)


def records(name, split, num_examples=None):
    dataset = SeqioDataset(name, LENGTHS, split=split, batch_size=16)
    return dataset, [example for _, some in dataset.eval_batches(num_examples) for example in some]


def test_mbpp_has_the_standard_splits(mbpp_file):
    source = seqio.get_mixture_or_task(code_synthesis.mbpp(BYTES, mbpp_file)).source
    for split, size, first in (("prompt", 10, 1), ("test", 500, 11), ("validation", 90, 511), ("train", 374, 601)):
        found = source.get_dataset(split, shuffle=False).as_numpy_iterator()
        assert [example["task_id"].decode() for example in found] == [str(first + i) for i in range(size)]


def test_mbpp_asks_as_the_paper_does(mbpp_file):
    _, (example,) = records(code_synthesis.mbpp(BYTES, mbpp_file), "test", 1)
    prompt = (
        "You are an expert Python programmer, and here is your task: Write a python function to remove first and last "
        "occurrence of a given character from the string. Your code should pass these tests:\n\n"
        'assert remove_Occ("hello","l") == "heo"\nassert remove_Occ("abcda","a") == "bcd"\n'
        'assert remove_Occ("PHP","P") == "H"\n[BEGIN]\n'
    )
    assert example["inputs_pretokenized"] == prompt
    assert example["targets_pretokenized"].startswith("def remove_Occ(s,ch): \n    for i in range(len(s)): \n")
    _, (with_shots,) = records(code_synthesis.mbpp(BYTES, mbpp_file, num_shots=3), "test", 1)
    text = with_shots["inputs_pretokenized"]
    assert text.endswith("[DONE]\n\n" + prompt)
    assert [part.split("def ")[1].split("(")[0] for part in text.split("[BEGIN]\n")[1:4]] == [
        "similar_elements",
        "is_not_prime",
        "heap_queue_largest",
    ]


@pytest.mark.usefixtures("isolation")
def test_mbpp_scores_programs_and_samples(mbpp_file):
    dataset, found = records(code_synthesis.mbpp(BYTES, mbpp_file), "validation", 20)
    for record in found:
        record["prediction"] = record["targets_pretokenized"] + "\n[DONE]\n\nYou are an expert("
    assert dataset.score(found)["pass@1"] == 100
    for number, record in enumerate(found):
        record["predictions"] = ["def nothing(): pass", record["targets_pretokenized"] if number % 2 else "?"]
    scores = dataset.score(found)
    assert (scores["pass@1"], scores["pass@2"], scores["error"]) == (25, 50, 75)


def test_where_a_program_ends():
    assert code_synthesis.mbpp_program("x = 1\n[DONE]\ny", "") == "x = 1\n"
    assert code_synthesis.mbpp_program("x = 1\nYou are an expert Python", "") == "x = 1\n"
    assert code_synthesis.mbpp_program("s = 'You are an expert'", "") == "s = 'You are an expert'"
    for end in ("def g(): pass", "class A: pass", "# next", "if x:", "print(f(1))"):
        text = code_synthesis.humaneval_program(f"    if x:\n        return 1\n{end}", "def f(x):\n")
        assert text == "def f(x):\n    if x:\n        return 1"


@pytest.mark.usefixtures("isolation")
def test_humaneval_runs_the_prompt_and_what_follows(humaneval_file):
    dataset, found = records(code_synthesis.humaneval(BYTES, humaneval_file), "test")
    assert [record["inputs_pretokenized"] for record in found] == [row["prompt"] for row in HUMANEVAL]
    for record in found:
        record["prediction"] = record["targets_pretokenized"] + "\n\ndef broken(:"
    assert dataset.score(found)["pass@1"] == 100
    # What the prompt defines is the test's own, whatever the program makes of it.
    cheat = "    return 0\nsquare = lambda x: next(answers)\nanswers = iter([0, 1, 4, 9])\n"
    for record in found:
        record["prediction"] = cheat
    assert dataset.score(found)["pass@1"] == 0


@pytest.mark.usefixtures("isolation")
def test_infilling_runs_the_whole_program(infilling_file):
    dataset, found = records(code_synthesis.humaneval_infilling(BYTES, infilling_file), "test")
    assert [record["targets_pretokenized"] for record in found] == list(GAPS.values())
    assert [record["inputs_pretokenized"] for record in found] == [
        _PROGRAM.replace(gap, "<hole>") for gap in GAPS.values()
    ]
    for record, text in zip(
        found, ["        x = x + 1\n", "    x = 1\n    while x < y:\n", "< y:\n   x +"], strict=True
    ):
        record["prediction"] = text  # right in another way; the root of 0 is not 1; not indented
    scores = dataset.score(found)
    assert (scores["pass@1"], scores["wrong"], scores["error"]) == pytest.approx((100 / 3, 100 / 3, 100 / 3))
    # The same as texts with holes, which are filled as they stand.
    texts, tests = code_synthesis.infilling_templates(infilling_file, "<hole:8?>")
    filled = [text.replace("<hole:8?>", gap) for text, gap in zip(texts, GAPS.values(), strict=True)]
    assert filled == [_PROGRAM] * 3 and passed_tests(tests, filled)["pass@1"] == 100


def test_the_gin_files_register_the_task(mbpp_file, tmp_path, capsys):
    model = ["models/decoder_only.gin", "sizes/tiny.gin", "objectives/sundae.gin", "decoding/sundae.gin"]
    values = {"MODEL_DIR": str(tmp_path), "INITIAL_CHECKPOINT_PATH": None, "TRAIN_STEPS": 1, "BATCH_SIZE": 2}
    given = [f"--gin.{name}={value!r}" for name, value in values.items()]
    given += [f"--gin_file={file}" for file in [*model, "runs/finetune.gin", "tasks/mbpp.gin"]]
    with pytest.raises(SystemExit):
        config.run(train.train, [*given, "--dry_run"])
    assert "not set: MBPP_PATH" in capsys.readouterr().err
    config.run(train.train, [*given, "--dry_run", f"--gin.MBPP_PATH={mbpp_file!r}", "--gin.NUM_SHOTS=1"])
    assert "tokens int32[2, 512]" in capsys.readouterr().out


def test_mistakes(tmp_path, humaneval_file):
    with pytest.raises(UserError, match="0 to 3 solved problems, not 4"):
        code_synthesis.mbpp(BYTES, humaneval_file, num_shots=4)
    with pytest.raises(UserError, match=r"Problem 1 of .* has no 'text': is it the right file"):
        code_synthesis.mbpp(BYTES, humaneval_file)
    with pytest.raises(UserError, match=r"There is no file .*nowhere"):
        code_synthesis.humaneval(BYTES, str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "bad.jsonl.gz").write_bytes(gzip.compress(b"{"))
    with pytest.raises(UserError, match=r"bad\.jsonl\.gz:1: not JSON"):
        code_synthesis.humaneval(BYTES, str(tmp_path / "bad.jsonl.gz"))
    row = {"task_id": 1, "text": "", "code": "", "test_list": [], "test_setup_code": ""}
    marked = dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), "") | {
        "suffix": "<hole>"
    }
    (tmp_path / "marked.jsonl").write_text(json.dumps(marked), encoding="utf-8")
    with pytest.raises(UserError, match="contains <hole>"):
        code_synthesis.humaneval_infilling(BYTES, str(tmp_path / "marked.jsonl"))
    (tmp_path / "short.jsonl").write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(UserError, match="lacks MBPP's task 2, and 972 others"):
        code_synthesis.mbpp(BYTES, str(tmp_path / "short.jsonl"))
