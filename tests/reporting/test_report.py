"""The report: what it reads, what it shows, and that names and model text stay text."""

import html.parser
import json
import pathlib
import re

import pytest

from diffusion_t5x import report as verb
from diffusion_t5x.checkpointing.record import in_words
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.inference import write_jsonl
from diffusion_t5x.evaluation.metrics import exact_match
from diffusion_t5x.reporting import shown
from diffusion_t5x.reporting.report import score_table, write_report
from diffusion_t5x.reporting.runs import Scores, read_runs
from diffusion_t5x.training.metrics import JsonlWriter

EVIL = "<script>alert(1)</script>\"><img src=x onerror='alert(2)'>{{ 7 * 7 }}</svg></style>"
EVIL_NAME = EVIL.replace("/", "\\")  # a folder's name has no slash
SUNDAE = "SundaeDecoder(num_steps=5, num_samples=4, temperature=0.2)"
SUNDAE_SETTINGS = {"class": "SundaeDecoder", "num_steps": 5, "num_samples": 4, "temperature": 0.2}
SORTED_SUNDAE = "SundaeDecoder(num_samples=4, num_steps=5, temperature=0.2)"


class Page(html.parser.HTMLParser):
    """The tags, attributes and text of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


def trained(folder, task="pairs", steps=30):
    """A MODEL_DIR, by the writers of training."""
    writer = JsonlWriter(folder)
    for step in range(1, steps + 1):
        writer.write(step, "train", {"loss": 5 / step, "accuracy": 1 - 1 / step, "tokens_per_second": 100.0 + step})
    writer.write(steps, f"training_eval/{task}", {"loss": 0.3, "accuracy": 0.9})
    (folder / "model-info.txt").write_text("model: 38,224 parameters\n  embedding [8]\n")
    return folder


def records(predictions, trace=None):
    texts = [("6:09 AM", "06:09"), ("3 t", "3 tonnes"), ("Navajo", "navajo")]
    made = [
        {"example_id": n, "inputs_pretokenized": i, "targets_pretokenized": t, "prediction": p, "score": 0.0}
        for n, ((i, t), p) in enumerate(zip(texts, predictions, strict=False))
    ]
    if not trace:
        return made
    steps = [[[0, canvas, 0.5]] for canvas in trace[1:]]
    return [record | {"trace": {"tokens": [trace[0]], "given": [], "steps": steps}} for record in made]


def evaluated(folder, predictions, task="pairs", model="finetuned", decoder=SUNDAE_SETTINGS, step=30, split="test"):
    """An EVAL_OUTPUT_DIR in the form of eval.py."""
    made = records(predictions)
    scores = exact_match([r["targets_pretokenized"] for r in made], [r["prediction"] for r in made])
    write_jsonl(str(folder / f"{task}_predictions.jsonl"), made)
    results = {
        "results": {task: scores | {"decode_seconds": 41.1, "num_examples": len(made)}},
        "checkpoint": f"/somewhere/secret/{model}/checkpoints/checkpoint_{step}",
        "step": step,
        "settings": {
            "evaluations": [
                {"class": "LossEval", "dataset": {"mixture_or_task_name": task}, "num_batches": None},
                {
                    "class": "DecodeEval",
                    "dataset": {"mixture_or_task_name": task, "split": split},
                    "decoder": decoder,
                    "seed": 0,
                },
            ],
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def inferred(folder, trace, task="pairs", predictions=("06:09",)):
    """An INFER_OUTPUT_DIR in the form of infer.py."""
    write_jsonl(str(folder / f"{task}-test.jsonl"), records(predictions, trace))
    (folder / f"{task}-test.settings.json").write_text(json.dumps({"task": task, "split": "test", "decoder": SUNDAE}))
    return folder


def timed(folder):
    folder.mkdir()
    settings = {"label": "ten", "decoder": "SundaeDecoder", "settings": SUNDAE, "device": "cpu, jax 0.10.2"}
    times = [
        settings
        | {"length": n, "batch_size": 8, "saturating": False, "forwards": 10, "seconds": [n / 110, n / 90, n / 100]}
        for n in (24, 48, 96)
    ]
    (folder / "decode_time.json").write_text(json.dumps({"times": times}))
    return folder


@pytest.fixture
def runs(tmp_path):
    """A folder with a run of every kind."""
    folder = tmp_path / "runs"
    trained(folder / "adapted")
    trained(folder / "finetuned", steps=40)
    evaluated(folder / "eval_a", ["06:09", "3 tonnes", "navajo"])
    evaluated(folder / "eval_b", ["06:09", "3 t", "navajo"], model="other")
    inferred(folder / "inferred", ["noise", "06:10¶··", "06:09¶··", "06:09¶··"])
    timed(folder / "timed")
    (folder / "results.json").write_text('{"scores": {}}')  # the quickstart's own summary
    (folder / "compiled").mkdir()
    return folder


def test_every_section_shows_what_the_files_hold(runs, tmp_path):
    page = Page(write_report([runs], tmp_path / "report.html"))
    for name in ("adapted", "finetuned", "eval_a", "eval_b", "inferred", "timed"):
        assert name in page.text
    assert "trained to step 40 · model: 38,224 parameters" in page.text
    assert "pairs (test): 3 examples, other at step 30" in page.text
    # Wilson's interval of 3 in 3 is [43.85, 100], of 2 in 3 [20.77, 93.85]: textbook values.
    assert "100.0 [43.9, 100.0]" in page.text and "66.7 [20.8, 93.9]" in page.text
    assert SORTED_SUNDAE in page.text and SUNDAE not in page.text and "LossEval" not in page.text
    assert "secret" not in page.text and str(tmp_path) not in page.text
    verdicts = [value for name, value in page.attributes if name == "title"]
    # The table of the first: 2 × 3 and the one of infer. That of those with a ✗: one example, two runs.
    assert verdicts.count("right") == 6 + 1 and verdicts.count("wrong") == 1 + 1
    assert page.tags.count("svg") == 3 + 1 + 1  # loss, accuracy, tokens per second; exact match; decode time
    assert page.tags.count("mark") == 3  # the legend's, and two steps that changed something
    assert "0.240 [0.218, 0.267]" in page.text


def test_sections_without_content_are_left_out(tmp_path):
    page = Page(write_report([trained(tmp_path / "only")], tmp_path / "report.html"))
    headings = re.findall("Learning curves|Results|Examples|Canvases|Decode time", page.text)
    assert headings == ["Learning curves"] * 2  # the link and the heading


def test_the_same_runs_give_the_same_bytes_and_only_a_report_is_overwritten(runs, tmp_path):
    output = tmp_path / "deep" / "report.html"
    first = write_report([runs], output).read_bytes()
    assert write_report([runs], output).read_bytes() == first
    (tmp_path / "thesis.html").write_text("<p>mine")
    with pytest.raises(UserError, match=r"thesis\.html exists and is not a report"):
        write_report([runs], tmp_path / "thesis.html")
    assert (tmp_path / "thesis.html").read_text() == "<p>mine"


def test_names_and_model_text_are_text_and_nothing_is_fetched(tmp_path):
    folder = tmp_path / EVIL_NAME
    trained(folder / EVIL_NAME, task=EVIL_NAME)
    evaluated(folder / f"eval{EVIL_NAME}", [EVIL, EVIL, EVIL], task=EVIL_NAME, decoder={"class": "D", "x": EVIL})
    inferred(folder / f"infer{EVIL_NAME}", [EVIL, EVIL[1:]], task=EVIL_NAME, predictions=[EVIL])
    page = Page(write_report([folder], tmp_path / "report.html"))
    assert not {"script", "img", "iframe", "object", "embed", "link", "base", "form"} & set(page.tags)
    assert page.text.count("<script>alert(1)</script>") > 5 and "{{ 7 * 7 }}" in page.text
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "xlink:href", "src"):
            assert value.startswith("#"), value
        if name not in ("content", "d"):
            assert "url(" not in (value or "").replace("url(#", "")
    policy = next(value for _, value in page.attributes if value and value.startswith("default-src"))
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_of_a_run_that_is_still_going_what_is_whole_is_read(tmp_path):
    file = trained(tmp_path / "going") / "train" / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + '{"step": 31, "loss": "é'.encode()[:-1])  # in the middle of a character
    (run,) = read_runs([tmp_path / "going"])
    assert [step for step, _ in run.curves[0].points["loss"]] == list(range(1, 31))
    (tmp_path / "begun" / "train").mkdir(parents=True)
    (tmp_path / "begun" / "train" / "metrics.jsonl").touch()
    write_report([tmp_path / "begun"], tmp_path / "report.html")


def test_the_last_evaluation_of_training_counts_as_scores(tmp_path):
    folder = trained(tmp_path / "run")
    writer = JsonlWriter(folder)
    for step, value in ((10, 20.0), (20, 60.0)):
        writer.write(
            step,
            "inference_eval/pairs",
            {"exact_match": value, "exact_match_low": value - 5, "exact_match_high": value + 5},
        )
        write_jsonl(str(folder / "inference_eval" / "pairs" / f"predictions_{step}.jsonl"), records([f"{step}"]))
    (folder / "config.gin").write_text("DECODER = @s.SundaeDecoder()\ns.SundaeDecoder.num_steps = 5\nA = 1\n")
    (run,) = read_runs([folder])
    (scores,) = run.scores
    assert (scores.step, scores.metrics["exact_match"], scores.num_examples) == (20, 60.0, 1)
    assert scores.decoder.startswith("SundaeDecoder(method=") and "num_steps=5" in scores.decoder
    assert [record["prediction"] for record in run.predictions[0].records] == ["20"]
    page = Page(write_report([folder], tmp_path / "report.html"))
    assert "60.0 [55.0, 65.0]" in page.text and page.tags.count("svg") == 4


def test_what_a_run_started_from_is_beside_what_it_made_of_it(tmp_path):
    folder = trained(tmp_path / "rl")
    writer = JsonlWriter(folder)
    for step, right, text in ((0, 0.0, "6:09"), (10, 50.0, "6:9"), (20, 100.0, "06:09")):
        interval = {"pass@8": right, "pass@8_low": right / 2, "pass@8_high": 100.0}
        writer.write(step, "inference_eval/pairs", interval)
        write_jsonl(str(folder / "inference_eval" / "pairs" / f"predictions_{step}.jsonl"), records([text]))
    (run,) = read_runs([folder])
    assert [(scores.step, scores.metrics["pass@8"]) for scores in run.scores] == [(0, 0), (20, 100)]
    page = Page(write_report([folder], tmp_path / "report.html"))
    assert "0.0 [0.0, 100.0]" in page.text and "100.0 [50.0, 100.0]" in page.text and "50.0 [" not in page.text
    assert "rl, at its startrl\n6:09 AM06:09\n6:0906:09\n" in page.text


def test_evaluated_checkpoints_are_one_run_with_a_curve(tmp_path):
    folder = tmp_path / "scores"
    for step, predictions in ((9, ["x", "3 t", "x"]), (30, ["06:09", "3 t", "x"]), (100, ["06:09", "3 t", "navajo"])):
        evaluated(folder / f"checkpoint_{step}", predictions, step=step)
    (folder / "checkpoint_200").mkdir()  # killed before its results
    (run,) = read_runs([folder])
    assert [scores.step for scores in run.scores] == [9, 30, 100]
    (curve,) = run.curves
    assert (curve.kind, curve.task) == ("inference_eval", "pairs")
    assert curve.points["exact_match"] == [(9, 0), (30, pytest.approx(100 / 3)), (100, pytest.approx(200 / 3))]
    (found,) = run.predictions  # the last checkpoint's
    assert [record["prediction"] for record in found.records] == ["06:09", "3 t", "navajo"]
    page = Page(write_report([folder], tmp_path / "report.html"))
    assert "pairs (test): 3 examples, finetuned at step 100 and 2 earlier" in page.text
    assert page.tags.count("svg") == 1 and "66.7 [20.8, 93.9]" in page.text


def test_rewards_of_rollouts_are_learning_curves(tmp_path):
    folder = trained(tmp_path / "rl")
    writer = JsonlWriter(folder)
    for step, reward in ((1, 0.25), (5, 0.5), (9, 0.75)):
        writer.write(step, "rollout", {"reward": reward, "best_reward": 1.0, "reward_seconds": 0.1})
    (run,) = read_runs([folder])
    (curve,) = (curve for curve in run.curves if curve.kind == "rollout")
    assert curve.task == "" and curve.points["reward"] == [(1, 0.25), (5, 0.5), (9, 0.75)]
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert all(f"<title>{name}" in text or f">{name}<" in text for name in ("reward", "best_reward"))
    assert "reward_seconds" not in text and "trained to step 30" in text


def test_predictions_made_elsewhere_have_no_step(tmp_path):
    evaluated(tmp_path / "scores", ["06:09"], step=None)
    file = tmp_path / "scores" / "results.json"
    elsewhere = {"checkpoint": None, "predictions": "/somewhere/made.jsonl", "evaluations": ["SeqioDataset(seed=0)"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | elsewhere))
    page = Page(write_report([tmp_path / "scores"], tmp_path / "report.html"))
    assert "pairs (test): 1 example, made.jsonl" in page.text and "secret" not in page.text


def test_a_difference_of_less_than_one_example_is_pointed_out(tmp_path):
    def scores(f1, num_examples=50):
        return Scores("squad", "m", 3, "", num_examples, {"f1": f1, "bleu": f1})

    table = score_table(
        "squad", [("a", scores(50.0)), ("b", scores(51.5)), ("c", scores(60.0)), ("d", scores(50.1, 9))]
    )
    assert [warning.partition(":")[0] for warning in table["warnings"]] == ["f1 of a and b"]


def test_markdown_has_the_tables_of_scores(runs, tmp_path):
    evaluated(tmp_path / "runs" / "eval|c", ["06:09"], task="<b>_*", model="m", decoder={"class": "D", "x": "|"})
    text = write_report([runs], tmp_path / "report.md").read_text(encoding="utf-8")
    assert text == write_report([runs], tmp_path / "report.md").read_text(encoding="utf-8")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} == {8}  # seven cells in each row
    assert r"| eval\_b | other | 30 | 3 | 66.7 [20.8, 93.9] | 41.1 |" in text
    assert r"## \<b\>\_\*" in text and r"| eval\|c | m |" in text and "D(x='\\|')" in text
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"notes\.md exists and is not a report"):
        write_report([runs], tmp_path / "notes.md")


@pytest.mark.parametrize(
    ("break_it", "named"),
    [
        (lambda runs: (runs / "eval_a" / "results.json").write_text('{"results": {"pai'), "eval_a/results.json"),
        (lambda runs: (runs / "eval_a" / "results.json").write_text('{"results": []}'), "eval_a/results.json"),
        (lambda runs: (runs / "eval_b" / "pairs_predictions.jsonl").unlink(), "eval_b/pairs_predictions.jsonl"),
        (lambda runs: (runs / "adapted" / "train" / "metrics.jsonl").write_text("x\n{}\n"), "train/metrics.jsonl"),
        (
            lambda runs: (runs / "adapted" / "train" / "metrics.jsonl").write_text('{"loss": 1}\n'),
            "train/metrics.jsonl",
        ),
        (lambda runs: (runs / "timed" / "decode_time.json").write_text("[{}]"), "timed/decode_time.json"),
        (lambda runs: (runs / "inferred" / "pairs-test.settings.json").write_text("{}"), "pairs-test.settings.json"),
    ],
)
def test_a_broken_file_is_named(runs, tmp_path, break_it, named):
    break_it(runs)
    with pytest.raises(UserError, match=re.escape(named)):
        write_report([runs], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_runs_of_one_name_are_told_apart_and_none_counts_twice(tmp_path):
    a, b = trained(tmp_path / "a" / "tuned"), trained(tmp_path / "b" / "tuned")
    assert [run.name for run in read_runs([a.parent, b])] == ["a/tuned", "b/tuned"]
    assert [run.name for run in read_runs([a, a.parent, a / ".." / "tuned"])] == ["tuned"]


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys):
    for flags, expected in (
        ([str(tmp_path / "nowhere")], "There is no folder"),
        ([str(tmp_path)], "has no output of train"),
        (["--ouput=x", str(tmp_path)], "'--output'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            verb.main(flags)
        message = capsys.readouterr().err
        assert stopped.value.code == 2 and expected in message and message.count("\n") == 1
    trained(tmp_path / "run")
    verb.main([str(tmp_path / "run"), f"--output={tmp_path / 'r.html'}"])
    assert str(tmp_path / "r.html") in capsys.readouterr().out and (tmp_path / "r.html").exists()


def test_the_quickstart_s_summary_is_no_run(runs):
    assert [run.name for run in read_runs([runs])] == ["adapted", "eval_a", "eval_b", "finetuned", "inferred", "timed"]
    assert pathlib.Path(runs, "results.json").exists()


def evaluated_in_training(folder, split):
    """A MODEL_DIR whose run has decoded its `split` at steps 10 and 20."""
    writer = JsonlWriter(trained(folder))
    for step, value in ((10, 20.0), (20, 60.0)):
        interval = {"exact_match": value, "exact_match_low": value - 5, "exact_match_high": value + 5}
        writer.write(step, "inference_eval/pairs", interval)
        write_jsonl(str(folder / "inference_eval" / "pairs" / f"predictions_{step}.jsonl"), records([f"{step}"]))
    (folder / "config.gin").write_text(
        f"SPLIT = {split!r}\nloss_eval/seqio_source.SeqioDataset.split = 'validation'\n"
        "decode_eval/seqio_source.SeqioDataset.split = %SPLIT\nDECODER = @s.SundaeDecoder()\n"
        "s.SundaeDecoder.temperature = 0.2\ns.SundaeDecoder.num_samples = 4\ns.SundaeDecoder.num_steps = 5\n"
    )
    return folder


def test_validation_during_training_and_a_test_set_are_never_in_one_table_or_plot(tmp_path):
    a = evaluated_in_training(tmp_path / "run", "validation")
    for step, predictions in ((10, ["x", "3 t", "x"]), (20, ["06:09", "3 tonnes", "x"])):
        evaluated(tmp_path / "scores" / f"checkpoint_{step}", predictions, step=step, model="run")
    runs = read_runs([a, tmp_path / "scores"])
    assert [[scores.data_set for scores in run.scores] for run in runs] == [
        ["pairs (validation)"],
        ["pairs (test)"] * 2,
    ]
    page = Page(write_report([a, tmp_path / "scores"], tmp_path / "report.html"))
    charts = re.findall(r"exact_match, pairs \(\w+\)", page.text)
    assert charts == ["exact_match, pairs (validation)", "exact_match, pairs (test)"]
    markdown = write_report([a, tmp_path / "scores"], tmp_path / "report.md").read_text(encoding="utf-8")
    tables = re.split("^## ", markdown, flags=re.MULTILINE)[1:]
    assert [table.partition("\n")[0] for table in tables] == ["pairs (validation)", "pairs (test)"]
    assert "60.0 [55.0, 65.0]" in tables[0] and "60.0 [55.0, 65.0]" not in tables[1]
    # A split of the same name is comparable, wherever it was decoded.
    b = evaluated_in_training(tmp_path / "other", "test")
    markdown = write_report([b, tmp_path / "scores"], tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall("^## .+", markdown, re.MULTILINE) == ["## pairs (test)"]


def test_runs_stay_in_the_order_given_and_numbers_in_names_count_as_numbers(tmp_path):
    for name in ("zero", "alpha", "mid"):
        evaluated(trained(tmp_path / name), ["06:09", "3 t", "x"])
    given = ["zero", "alpha", "mid"]
    page = Page(write_report([tmp_path / name for name in given], tmp_path / "report.html"))
    # In the head, in the charts' labels, in the tables and beside the examples.
    assert [name for name in re.findall("zero|alpha|mid", page.text)][:3] == given
    text = write_report([tmp_path / name for name in given], tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (zero|alpha|mid) ", text, re.MULTILINE) == given
    for name in ("run_10", "run_9", "run_1"):
        trained(tmp_path / "many" / name)
    assert [run.name for run in read_runs([tmp_path / "many"])] == ["run_1", "run_9", "run_10"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (SUNDAE_SETTINGS, dict(sorted(SUNDAE_SETTINGS.items()))),
        (
            {"class": "D", "a": 1, "b": {"class": "E", "y": "z", "x": None}},
            {"class": "D", "b": {"class": "E", "x": None, "y": "z"}, "a": 1},
        ),
    ],
)
def test_the_same_decoder_with_its_fields_in_another_order_is_one(one, other, tmp_path):
    assert shown.decoder(in_words(one)) == shown.decoder(in_words(other))
    # The latest checkpoint was evaluated by itself and then among all: one row, and one column of examples.
    evaluated(tmp_path / "scores", ["06:09", "3 t", "x"], decoder=one)
    evaluated(tmp_path / "scores" / "checkpoint_30", ["06:09", "3 t", "x"], decoder=other)
    text = write_report([tmp_path / "scores"], tmp_path / "report.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| scores ", text, re.MULTILINE)) == 1
    evaluated(tmp_path / "scores" / "checkpoint_30", ["06:09", "3 t", "navajo"], decoder=other)  # other results
    text = write_report([tmp_path / "scores"], tmp_path / "report.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^\| scores ", text, re.MULTILINE)) == 2
