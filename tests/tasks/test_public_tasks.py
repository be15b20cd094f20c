"""Public data sets as tasks: counts as published, texts that can be read, TFDS and files alike."""

import json

import pytest

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")

from small_tfds import SQUAD_FEATURES, TEXT, prepare  # noqa: E402

from diffusion_t5x.tasks import (  # noqa: E402
    local_files,
    math_reasoning,
    preprocessors,
    pretraining,
    question_answering,
    readers,
    sources,
    translation,
)

TRANSLATE = {"inputs": "translate English to French: {english}", "targets": "{french}"}


@pytest.fixture
def vocabulary(test_data):
    return str(test_data / "t5_sentencepiece" / "t5_vocab.model")


def first(name, split, lengths, **options):
    """The first examples of a split: what is kept beside the tokens, and the tokens decoded."""
    dataset = SeqioDataset(name, lengths, split=split, batch_size=4, canvas=False, **options)
    batch, records = next(dataset.eval_batches(4))
    pairs = [
        tuple(dataset.to_text(tokens[mask].tolist()) for mask in (inputs, targets))
        for tokens, inputs, targets in zip(batch.tokens, batch.input_mask, batch.target_mask, strict=True)
    ]
    return records, pairs[: len(records)], dataset


@pytest.mark.slow
def test_tatoeba_and_ntrex(test_data, vocabulary):
    tatoeba = local_files.source(
        {"train": str(test_data / "tatoeba_enfr" / "fra.txt.gz")},
        readers.Tsv(("english", "french")), TRANSLATE, {"validation": 1.0},
    ).in_seqio()  # fmt: skip
    sides = [str(test_data / "ntrex_enfr" / f"newstest2019.{language}.gz") for language in ("en", "fr")]
    sizes = {split: int(tatoeba.get_dataset(split, shuffle=False).cardinality()) for split in tatoeba.splits}
    assert sum(sizes.values()) == 167_130
    assert sizes["validation"] == pytest.approx(1671, abs=200)
    name = local_files.task("ntrex", {"test": sides}, readers.Parallel(("english", "french")), vocabulary, **TRANSLATE)
    records, pairs, dataset = first(name, "test", {"inputs": 128, "targets": 128})
    assert dataset.num_eval_examples() == 1_997
    assert pairs[1] == tuple(records[1][f"{feature}_pretokenized"] for feature in ("inputs", "targets"))
    assert pairs[0][0] == "translate English to French: Welsh AMs worried about 'looking like muppets'"


@pytest.mark.parametrize(
    "file,questions,answers",
    [
        ("squad_v1.1/train-v1.1.json.gz", 87_599, 87_599),
        ("squad_v1.1/dev-v1.1.json.gz", 10_570, 34_726),
        ("xquad_en/xquad.en.json.gz", 1_190, 1_190),
    ],
)
def test_squad_counts(test_data, file, questions, answers):
    found = question_answering.read(str(test_data / file))
    assert len(found) == questions
    assert sum(len(question["answers"]) for question in found) == answers


def test_squad_reads_and_scores_itself(test_data, vocabulary):
    files = {"validation": str(test_data / "squad_v1.1" / "dev-v1.1.json.gz")}
    name = question_answering.squad(vocabulary, files)
    records, pairs, dataset = first(name, "validation", {"inputs": 512, "targets": 32})
    assert records[0]["answers"] == ["Denver Broncos"] * 3
    question, context = pairs[0][0].split(" context: ")
    assert question == "question: Which NFL team represented the AFC at Super Bowl 50 ?"
    assert context.startswith("Super Bowl 50 was an American football game") and pairs[0][1] == "Denver Broncos"
    scores = dataset.score(
        [record | {"prediction": f"The {text}."} for record, (_, text) in zip(records, pairs, strict=True)]
    )
    assert scores["em"] == scores["f1"] == 100


def test_squad_says_what_is_wrong(tmp_path):
    unanswered = {"context": "c", "qas": [{"id": "1", "question": "q", "answers": []}]}
    for text, message in {
        '{"data":\n [}': "squad.json:2: not JSON",
        '{"data": [{"title": "x"}]}': "not in SQuAD's format: KeyError 'paragraphs'",
        '{"data": []}': "has no questions",
        json.dumps({"data": [{"paragraphs": [unanswered]}]}): "1 questions have no answer",
    }.items():
        (tmp_path / "squad.json").write_text(text)
        with pytest.raises(UserError, match=message):
            question_answering.read(str(tmp_path / "squad.json"))
    with pytest.raises(UserError, match="Cannot read"):
        question_answering.read(str(tmp_path / "nowhere.json"))


def test_math_from_json_lines(tmp_path):
    (tmp_path / "gsm.jsonl").write_text('{"question": "2 + 2?", "answer": "It is 4.\\n#### 4"}\n')
    (tmp_path / "math.jsonl").write_text('{"problem": "$1/2+1/2$?", "solution": "$\\\\boxed{1}$", "level": 1}\n')
    name = math_reasoning.gsm8k(None, {"test": str(tmp_path / "gsm.jsonl")})
    assert first(name, "test", {"inputs": 32, "targets": 32})[1] == [("2 + 2?", "It is 4.\n#### 4")]
    name = math_reasoning.math500(None, {"test": str(tmp_path / "math.jsonl")})
    assert first(name, "test", {"inputs": 32, "targets": 32})[1] == [("$1/2+1/2$?", "$\\boxed{1}$")]


def test_tfds_data_sets(tfds_folder):
    pair = {"en": "A cat.", "fr": "Un chat."}
    splits = dict.fromkeys(("train", "validation", "test"), pair)
    prepare(tfds_folder, "wmt14_translate", "fr-en", "1.0.0", {"en": TEXT, "fr": TEXT}, splits)
    lengths = {"inputs": 64, "targets": 32}
    for languages, expected in {
        ("en", "fr"): ("translate English to French: A cat.", "Un chat."),
        ("fr", "en"): ("translate French to English: Un chat.", "A cat."),
    }.items():
        assert first(translation.wmt14(None, *languages), "test", lengths)[1] == [expected]

    gsm = {name: f"{name} #### 1" for name in ("question", "answer", "annotation", "short_answer")}
    prepare(tfds_folder, "gsm8k", None, "1.0.0", dict.fromkeys(gsm, TEXT), {"train": gsm, "test": gsm})
    assert first(math_reasoning.gsm8k(None), "test", lengths)[1] == [("question #### 1", "answer #### 1")]

    question = {"id": "1", "title": "t", "context": "It's me.", "question": "Who?"}
    question["answers"] = {"text": ["me", "It's me"], "answer_start": [5, 0]}
    prepare(tfds_folder, "squad", "v1.1", "3.0.0", SQUAD_FEATURES, {"train": question, "validation": question})
    records, pairs, _ = first(question_answering.squad(None), "validation", lengths)
    assert pairs == [("question: Who ? context: It ' s me . ", "me")] and records[0]["answers"] == ["me", "It ' s me"]


@pytest.mark.slow
def test_c4_and_mc4_mixed(tfds_folder):
    page = {"text": "some words of a page " * 4, "url": "u"}
    splits = {name: page for name in ("en", "fr", "en-validation", "fr-validation")}
    prepare(tfds_folder, "c4", "multilingual", "3.1.0", {"text": TEXT, "url": TEXT}, splits)
    name = pretraining.mc4(None, preprocessors.ul2, ["en", "fr"])
    dataset = SeqioDataset(name, {"inputs": 64, "targets": 64}, batch_size=2, pack=True, canvas=False)
    assert (next(dataset.train_iterator()).segment_ids > 0).any()
    mixture = seqio.MixtureRegistry.get("mc4")
    assert [mixture.get_rate(task) for task in mixture.tasks] == [1, 1]


def test_a_data_set_that_is_not_there(tfds_folder):
    with pytest.raises(
        UserError, match=r"'squad/v1\.1:3\.0\.0' is not in .* Prepare it once with `tfds build squad/v1"
    ):
        SeqioDataset(question_answering.squad(None), {"inputs": 8, "targets": 8}).train_iterator()
    with pytest.raises(UserError, match="TFDS has no data set 'squab"):
        sources.PreparedTfds("squab:1.0.0", {"train": "train"}).in_seqio().get_dataset("train")


@pytest.mark.parametrize("name", ["huggingface:squad", "kubric:x:1.0.0", "squad/data_dir=here", "/tmp/x", "", "a:b"])
def test_a_data_set_s_name_leads_nowhere_else(name):
    with pytest.raises(UserError, match=r"is not a TFDS data set: write its name as in 'squad/v1\.1:3\.0\.0'"):
        sources.PreparedTfds(name, {"train": "train"})


@pytest.mark.parametrize(
    "name", ["gsm8k:1.0.0", "c4/en:3.1.0", "wmt14_translate/de-en:1.*.*", "wikipedia/20220620.en:1.0.0"]
)
def test_names_of_data_sets(name):
    sources.PreparedTfds(name, {"train": "train"})
