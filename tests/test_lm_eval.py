"""The verb lm_eval: the harness's tasks over local files give the numbers of our own likelihood and decoder."""

import functools
import json
import pathlib
import re
import shlex
import sys

import chats
import jax
import numpy as np
import open_models
import pytest
import tiny
from pages import by_module

from diffusion_t5x import lm_eval
from diffusion_t5x.convert import convert
from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.vocabularies import token_ids
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.errors import UserError
from diffusion_t5x.evaluation.loading import load_model
from diffusion_t5x.models.config import ModelConfig
from diffusion_t5x.objectives.autoregressive import Autoregressive
from diffusion_t5x.partitioning import MeshConfig
from diffusion_t5x.reporting.report import write_report

pytest.importorskip("seqio")


PAGE = pathlib.Path(__file__).parents[1] / "docs" / "lm_eval.md"
CHOICES = [("Once upon", [" a time", " one", " the small model"], 0), ("It learned", [" to write", " é, ☃"], 1)]
QUESTIONS = ["the a?", "Once upon a time there was a small model. It learned", "1,234"]
TEXTS = ["Once upon a time", "It learned to write: " * 12]
TASK = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
output_type: {output_type}
doc_to_text: "{text}"
doc_to_target: "{target}"
{more}
metadata: {{version: 1.0}}
"""


def write_tasks(folder):
    folder.mkdir()

    def write(task, lines, output_type, text, target, more):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = TASK.format(
            task=task, file=folder / f"{task}.jsonl", output_type=output_type, text=text, target=target, more=more
        )
        (folder / f"{task}.yaml").write_text(text)

    choices = [{"begins": begins, "ends": ends, "right": right} for begins, ends, right in CHOICES]
    metric = "metric_list: [{metric: acc}]"
    write("my_choices", choices, "multiple_choice", "{{begins}}", "{{right}}",
          f'target_delimiter: ""\ndoc_to_choice: "{{{{ends}}}}"\n{metric}')  # fmt: skip
    questions = [{"asked": asked, "said": "?"} for asked in QUESTIONS]
    write("my_answers", questions, "generate_until", "{{asked}}", "{{said}}",
          "generation_kwargs: {until: [e], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]")  # fmt: skip
    texts = [{"text": text} for text in TEXTS]
    write("my_texts", texts, "loglikelihood_rolling", "", "{{text}}", "metric_list: [{metric: bits_per_byte}]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An imported model and three tasks."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra lm-eval")
    folder = tmp_path_factory.mktemp("lm_eval")
    chats.save(folder / "Qwen3-0.6B", "chatml")
    open_models.write_qwen2(folder / "Qwen3-0.6B")
    convert(["from_hf", str(folder / "Qwen3-0.6B"), "--output", str(folder / "qwen3")])
    write_tasks(folder / "my_tasks")
    return folder


def flags_of(folder, **settings):
    """The page's command, small."""
    block, *_ = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    command = by_module(block).replace("/tmp/", f"{folder}/").replace("=my_tasks", f"={folder}/my_tasks")
    settings = {"TASK_FEATURE_LENGTHS": '{"inputs": 48, "targets": 16}', "BATCH_SIZE": 2} | settings
    flags = [*shlex.split(command.splitlines()[1])[3:], "--gin_file=hardware/cpu.gin"]
    return flags + [f"--gin.{name}={value}" for name, value in settings.items()]


def model_of(folder, vocabulary):
    gin = (folder / "qwen3" / "model.gin").read_text()
    fields = dict(re.findall(r"^  (\w+) = (.+)$", gin, re.MULTILINE))
    reads_start = "READS_START = True" in gin
    config = ModelConfig(**{name: eval(x) for name, x in fields.items()}, reads_start=reads_start, scan_unroll=1)
    definition, params = load_model(str(folder / "qwen3"), config, token_ids(vocabulary), MeshConfig().make())
    return definition.bind(params)


def log_likelihood_of(model, context, continuation):
    batch = tiny.one_a_row([(context, continuation)])
    return float(Autoregressive().log_likelihood(model, batch, None, 0).log_likelihood[0])


def samples(folder, task):
    lines = (folder / f"{task}_samples.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda record: record["doc_id"])


@pytest.fixture
def offline(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_pages_command_gives_our_own_numbers(folder, offline, tmp_path, capsys):
    flags = flags_of(folder, EVAL_OUTPUT_DIR=tmp_path / "out")
    flags = [flag + ",my_texts" if flag.startswith("--tasks") else flag for flag in flags]
    lm_eval.main(flags)
    vocabulary = vocabulary_files.vocabulary(str(folder / "qwen3" / "tokenizer.json"))
    model = model_of(folder, vocabulary)
    log_likelihood = functools.partial(log_likelihood_of, model)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    right = []
    for (begins, ends, answer), record in zip(CHOICES, samples(tmp_path / "out", "my_choices"), strict=True):
        context = vocabulary.encode(begins)
        expected = [log_likelihood(context, vocabulary.encode(begins + end)[len(context) :]) for end in ends]
        np.testing.assert_allclose([found for ((found, _),) in record["resps"]], expected, rtol=1e-4)
        right.append(int(np.argmax(expected)) == answer)
    assert results["results"]["my_choices"]["acc"] == np.mean(right)
    for asked, record in zip(QUESTIONS, samples(tmp_path / "out", "my_answers"), strict=True):
        batch = tiny.one_a_row([(context := vocabulary.encode(asked), [3] * 6)])
        tokens = AutoregressiveDecoder().decode(model, batch, jax.random.key(0)).tokens[0, len(context) :].tolist()
        assert record["resps"] == [[vocabulary.decode(tokens).partition("e")[0]]]
    bits, begin = 0.0, [token_ids(vocabulary).start_id]  # before a text, where the model reads none by itself
    for text, record in zip(TEXTS, samples(tmp_path / "out", "my_texts"), strict=True):
        tokens = vocabulary.encode(text)
        if len(tokens) <= 63:
            expected = log_likelihood(begin, tokens)
        else:  # a window, and one that begins with as much as it can read of the text before
            rest = len(tokens) - 63
            assert rest < 63
            expected = log_likelihood(begin, tokens[:63]) + log_likelihood(tokens[-64:-rest], tokens[-rest:])
        np.testing.assert_allclose(record["resps"][0][0], expected, rtol=1e-4)
        bits -= expected / np.log(2)
    size = sum(len(text.encode()) for text in TEXTS)
    assert results["results"]["my_texts"]["bits_per_byte"] == pytest.approx(bits / size, rel=1e-4)
    assert results["lm_eval"]["lm_eval_version"] and results["vocabulary"]["mask_id"] == 302
    page = write_report([tmp_path / "out"], tmp_path / "report.html").read_text(encoding="utf-8")
    assert "my_choices" in page and "bits_per_byte" in page
    before = (tmp_path / "out" / "results.json").read_bytes()
    lm_eval.main(flags)
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    with pytest.raises(SystemExit):
        lm_eval.main([*flags, "--limit=1"])
    assert "has results with different settings (limit)" in capsys.readouterr().err


@pytest.mark.parametrize("as_turns", [True, False])
def test_chats_are_those_of_transformers_with_our_own_numbers(as_turns, folder, offline, tmp_path):
    """Few-shot examples as turns or in one, a system prompt, choices and generated texts."""
    transformers = pytest.importorskip("transformers")
    flags = flags_of(folder, EVAL_OUTPUT_DIR=tmp_path / "out", TASK_FEATURE_LENGTHS='{"inputs": 240, "targets": 16}')
    flags += ["--apply_chat_template", "--system_instruction", "Be brief.", "--num_fewshot=1"]
    lm_eval.main([*flags, *([] if as_turns else ["--no-fewshot_as_multiturn"])])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder / "qwen3")
    vocabulary = vocabulary_files.vocabulary(str(folder / "qwen3" / "tokenizer.json"))
    model = model_of(folder, vocabulary)

    def context(shot, shown, asked):
        turns = [chats.message("user", shot), chats.message("assistant", shown), chats.message("user", asked)]
        turns = turns if as_turns else [chats.message("user", f"{shot}{shown}\n\n{asked}")]
        messages = [chats.message("system", "Be brief."), *turns]
        return theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)

    def ids(text):
        return theirs.encode(text, add_special_tokens=False)

    for number, record in enumerate(samples(tmp_path / "out", "my_choices")):
        (shot, ends, right), (asked, choices, _) = CHOICES[1 - number], CHOICES[number]
        expected = context(shot, ends[right], asked)
        assert record["arguments"] == [[expected, choice] for choice in choices]
        numbers = [log_likelihood_of(model, ids(expected), ids(expected + x)[len(ids(expected)) :]) for x in choices]
        np.testing.assert_allclose([found for ((found, _),) in record["resps"]], numbers, rtol=1e-4)
    for record in samples(tmp_path / "out", "my_answers"):
        ((text, _),) = record["arguments"]
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n") and "Be brief.<|im_end|>" in text
        batch = tiny.one_a_row([(ids(text), [3] * 6)])
        tokens = AutoregressiveDecoder().decode(model, batch, jax.random.key(0)).tokens[0, len(ids(text)) :].tolist()
        assert record["resps"] == [[vocabulary.decode(tokens).partition("e")[0]]]
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["settings"]["fewshot_as_multiturn"] is as_turns


@pytest.mark.slow
def test_a_diffusion_model(folder, offline, tmp_path, capsys):
    flags = flags_of(folder, EVAL_OUTPUT_DIR=tmp_path / "out", NUM_DRAWS=4)
    flags += ["--gin_file=objectives/masked.gin", "--gin_file=decoding/masked.gin", "--limit=1"]
    lm_eval.main(flags)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["results"]["my_choices"]["acc"] in (0, 1) and results["settings"]["num_draws"] == 4
    assert all(found < 0 for ((found, _),) in samples(tmp_path / "out", "my_choices")[0]["resps"])
    again = flags_of(folder, EVAL_OUTPUT_DIR=tmp_path / "more", NUM_DRAWS=4, BATCH_SIZE=3)
    lm_eval.main([*again, *flags[-3:], "--tasks=my_choices"])
    one, other = (samples(tmp_path / name, "my_choices")[0]["resps"] for name in ("out", "more"))
    np.testing.assert_allclose([x for ((x, _),) in one], [x for ((x, _),) in other], rtol=1e-5)
    with pytest.raises(SystemExit):
        lm_eval.main([*again, *flags[-3:-1], "--tasks=my_texts", f"--gin.EVAL_OUTPUT_DIR={tmp_path}/texts"])
    assert "Rolling log-likelihoods" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks="], "No tasks. Give --tasks=NAME,NAME"),
        (["--limit=two"], "invalid int value: 'two'"),
        (["--tasks=my_choises"], "knows no task 'my_choises'. Did you mean 'my_choices'"),
        (["--include_path=/no/such"], "There is no folder /no/such"),
        (["--gin.ARCHITECTURE='encoder_decoder'"], "An encoder's inputs end with EOS"),
        (["--fewshot_as_multiturn"], "give --apply_chat_template, too"),
        (["--apply_chat_template", "--gin.CONTEXT_EOS=True"], "this one's inputs end in EOS"),
        (['--gin.TASK_FEATURE_LENGTHS={"inputs": 480, "targets": 16}'], "max_length is 256"),
    ],
)
def test_mistakes(flags, message, folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        lm_eval.main([*flags_of(folder, EVAL_OUTPUT_DIR=tmp_path / "out"), *flags])
    assert message in capsys.readouterr().err and not (tmp_path / "out" / "results.json").exists()


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"cannot be imported .* pip install 'diffusion_t5x\[lm-eval\]'"):
        lm_eval._library()
