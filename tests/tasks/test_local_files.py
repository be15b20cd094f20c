"""Files of a user's own as tasks: each format gives its records, each mistake its file and line."""

import dataclasses
import gzip
import os

import numpy as np
import pytest

from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")

from diffusion_t5x.tasks import local_files, preprocessors, readers, registration  # noqa: E402

LENGTHS = {"inputs": 48, "targets": 48}


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        opened = gzip.open if name.endswith(".gz") else open
        with opened(tmp_path / name, "wb") as file:
            file.write(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path / name)

    return write


def read(files, reader, split="train", **options):
    """(inputs, targets) of a split, as evaluation reads them."""
    options = {"vocabulary_file": None} | options
    dataset = SeqioDataset(local_files.task("mine", files, reader, **options), LENGTHS, split=split, batch_size=4)
    records = [record for _, found in dataset.eval_batches() for record in found]
    return [(record["inputs_pretokenized"], record["targets_pretokenized"]) for record in records]


PAIRS = [("one", "un"), ("été ☃", "deux"), ("3", "trois")]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_every_format_gives_its_records(write, suffix):
    jsonl = write(
        "a.jsonl" + suffix, '{"inputs": "one", "targets": "un"}\n\n{"inputs": "été ☃", "targets": "deux"}\r\n'
    )
    more = write("b.jsonl" + suffix, '{"x": [1], "inputs": 3, "targets": "trois"}')
    assert read({"train": [jsonl, more]}, readers.Jsonl()) == PAIRS
    assert read({"train": jsonl.replace("a.jsonl", "*.jsonl")}, readers.Jsonl()) == PAIRS
    tsv = "".join(f"{a}\t{b}\n" for a, b in PAIRS)
    assert read({"train": write("a.tsv" + suffix, tsv)}, readers.Tsv(("inputs", "targets"))) == PAIRS
    named = write("b.tsv" + suffix, "\ufefftargets\tinputs\n" + tsv)
    assert read({"train": named}, readers.Tsv()) == [(b, a) for a, b in PAIRS]
    sides = tuple(write(f"{i}.txt{suffix}", "".join(pair[i] + "\n" for pair in PAIRS)) for i in (0, 1))
    templates = {"inputs": "en {{fr}}: {source}", "targets": "{target}"}
    assert read({"train": sides}, readers.Parallel(), **templates) == [(f"en {{fr}}: {a}", b) for a, b in PAIRS]


@pytest.mark.parametrize(
    "document,expected",
    [
        ("line", ["  a", "b", "c"]),
        ("paragraphs", ["  a\nb", "c"]),
        ("file", ["  a\nb\n \n\nc"]),
    ],
)
def test_documents_of_plain_text(write, document, expected):
    file = write("text.txt", "\n  a\nb\n \n\nc\n")
    name = local_files.task("mine", {"train": file}, readers.Text(document), None, inputs=None, targets="{text}")
    batches = SeqioDataset(name, {"targets": 32}, batch_size=4).eval_batches()
    assert [record["targets_pretokenized"] for _, found in batches for record in found] == expected


def test_training_shuffles_whole_epochs_and_resumes(write):
    lines = "".join(f"{i}\t{i}\n" for i in range(100))
    file = write("a.tsv", lines)
    name = local_files.task("mine", {"train": file}, readers.Tsv(("inputs", "targets")), None)
    dataset = SeqioDataset(name, {"inputs": 4, "targets": 4}, batch_size=10)
    reader = dataset.train_iterator()
    epochs = []
    for _ in range(2):
        batches = [next(reader) for _ in range(10)]
        epochs.append([int(dataset.to_text(row[:4].tolist())) for batch in batches for row in batch.tokens])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(100))
    assert epochs[0] != epochs[1]
    position = reader.state_dict()
    resumed = dataset.train_iterator()
    resumed.load_state_dict(position)
    assert all(np.array_equal(next(reader).tokens, next(resumed).tokens) for _ in range(15))


def test_held_out_records_are_a_stable_share_without_repeats(write):
    file = write("a.tsv", "".join(f"{i}\t{j}\n" for i in range(1000) for j in "ab"))
    source = local_files.source(
        {"train": file},
        readers.Tsv(("x", "y")),
        {"inputs": "{x}", "targets": "{y}"},
        {"validation": 10.0, "test": 20.0},
    ).in_seqio()
    found = {
        split: [(x["inputs"], x["targets"]) for x in source.get_dataset(split, shuffle=False).as_numpy_iterator()]
        for split in source.splits
    }
    assert sum(map(len, found.values())) == 2000 and len(set().union(*found.values())) == 2000
    for split, share in {"train": 0.7, "validation": 0.1, "test": 0.2}.items():
        assert abs(len(found[split]) / 2000 - share) < 5 * (share * (1 - share) / 1000) ** 0.5
    inputs = [{a for a, _ in pairs} for pairs in found.values()]
    assert sum(map(len, inputs)) == 1000  # both lines of an input are in one split


def test_shots_are_training_examples_the_same_for_all(write):
    train = write("train.tsv", "".join(f"q{i}\ta{i}\n" for i in range(20)))
    test = write("test.tsv", "x\ty\nz\tw\n")
    files = {"train": train, "test": test}
    (first, second) = read(files, readers.Tsv(("inputs", "targets")), "test", num_shots=2)
    *shots, question = first[0].split("\n\n")
    assert (question, first[1]) == ("x", "y")
    assert [shot.replace("q", "").split("\na") for shot in shots] == [
        [shot[1 : shot.index("\n")]] * 2 for shot in shots
    ]
    assert second[0].split("\n\n") == [*shots, "z"]
    with pytest.raises(UserError, match="cannot have shots"):
        local_files.task("mine", {"test": test}, readers.Tsv(("inputs", "targets")), None, num_shots=1)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["full_lm", "ul2"])
@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_documents_are_packed_apart_for_both_architectures(write, objective, architecture):
    file = write("a.txt", "\n\n".join(character * 14 for character in "abcdefghij"))
    name = local_files.task(
        "mine", {"train": file}, readers.Text("paragraphs"), None, targets="{text}",
        objective=getattr(preprocessors, objective),
    )  # fmt: skip
    dataset = SeqioDataset(name, LENGTHS, batch_size=4, pack=True, canvas=False, architecture=architecture)
    batch = next(dataset.train_iterator())
    assert batch.segment_ids.max() > 1
    for row in range(4):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            tokens = batch.tokens[row][batch.segment_ids[row] == segment].tolist()
            if architecture == "encoder_decoder":
                tokens += batch.encoder_tokens[row][batch.encoder_segment_ids[row] == segment].tolist()
            letters = set(dataset.vocabulary().decode([t for t in tokens if 2 < t < 259])) & set("abcdefghij")
            assert len(letters) == 1


@pytest.mark.parametrize(
    "text,message",
    [
        ('{"inputs": "a", "targets": "b"}\n\n{"inputs": \n', r"a\.jsonl:3: not JSON: Expecting value at column 12"),
        ('["a"]\n', r"a\.jsonl:1: not a JSON object"),
        ('{"inputs": "a", "target": "b"}', r"a\.jsonl:1: no field 'targets'\. Did you mean 'target'\?"),
        ('{"inputs": "a", "xyz": "b"}', r"a\.jsonl:1: no field 'targets'\. There are 'inputs', 'xyz'\."),
        ('{"inputs": null, "targets": "b"}', r"a\.jsonl:1: the field 'inputs' is null, not text"),
        (b'{"inputs": "\xe9"}', r"a\.jsonl:1: not UTF-8"),
        ("\n \n", r"a\.jsonl is empty"),
        ("", r"a\.jsonl is empty"),
    ],
)
def test_broken_files_are_told_by_file_and_line(write, text, message):
    file = write("a.jsonl", text)
    with pytest.raises(UserError, match=message):
        read({"train": file}, readers.Jsonl())


def test_other_mistakes(write, tmp_path, caplog):
    with pytest.raises(UserError, match=r"There is no file .*nowhere-\*\.jsonl"):
        read({"train": str(tmp_path / "nowhere-*.jsonl")}, readers.Jsonl())
    with pytest.raises(UserError, match=r"a\.tsv:2: 1 columns, not the 2: inputs, targets"):
        read({"train": write("a.tsv", "a\tb\nc\n")}, readers.Tsv(("inputs", "targets")))
    with pytest.raises(UserError, match=r"one has 2 lines, .*two has 1: they must be equal"):
        read({"train": (write("one", "a\nb\n"), write("two", "a\n"))}, readers.Parallel())
    with pytest.raises(UserError, match="Parallel text needs two files, not 1"):
        read({"train": write("one", "a\nb\n")}, readers.Parallel())
    with pytest.raises(UserError, match="must be one of line, paragraphs, file, not 'book'"):
        read({"train": write("one", "a\nb\n")}, readers.Text("book"))
    with pytest.raises(UserError, match=r"Cannot read .*broken\.gz"):
        (tmp_path / "broken.gz").write_bytes(b"no gzip")
        read({"train": str(tmp_path / "broken.gz")}, readers.Jsonl())
    with pytest.raises(UserError, match="is not a template"):
        local_files.task("mine", {"train": "x"}, readers.Jsonl(), None, inputs="{inputs")
    with pytest.raises(UserError, match="There is no vocabulary file nowhere"):
        local_files.task("mine", {"train": "x"}, readers.Jsonl(), "nowhere.model")
    with pytest.raises(UserError, match="held_out takes percentages"):
        local_files.task("mine", {"test": "x"}, readers.Jsonl(), None, held_out={"validation": 1.0})
    with caplog.at_level("WARNING", logger="diffusion_t5x"):
        files = write("three", "a\n\nb\n"), write("four", "x\ny\nz\n")
        assert read({"train": files}, readers.Parallel(), inputs="{source}", targets="{target}") == [
            ("a", "x"),
            ("b", "z"),
        ]
    assert "1 of 3 pairs have a blank line and are left out" in caplog.text


def test_mixtures(write):
    file = write("a.tsv", "a\tb\n")
    names = [local_files.task(name, {"train": file}, readers.Tsv(("inputs", "targets")), None) for name in "pq"]
    assert registration.mixture("both", [(names[0], 0.8), (names[1], 0.2)]) == "both"
    registration.mixture("both", [(names[0], 1.0)])  # in its place
    with pytest.raises(UserError, match="names 'bath', which is not registered"):
        registration.mixture("another", [("bath", 1.0)])
    with pytest.raises(UserError, match="must be positive"):
        registration.mixture("another", [("p", 0)])
    with pytest.raises(UserError, match="no tasks"):
        registration.mixture("another", [])


def test_longer_texts_are_cut_and_counted(write, caplog):
    file = write("a.tsv", "".join(f"{'x' * i}\t{'y' * 3}\n" for i in range(1, 11)))
    name = local_files.task("cut", {"train": file}, readers.Tsv(("inputs", "targets")), None)
    dataset = SeqioDataset(name, {"inputs": 6, "targets": 4}, batch_size=4)
    with caplog.at_level("WARNING", logger="diffusion_t5x"):
        for _ in range(2):
            records = [record for _, found in dataset.eval_batches() for record in found]
    assert len(records) == 10
    (message,) = caplog.messages  # told once; xxxxx and EOS still fit
    assert message.startswith("cut, split train: the inputs of 5 of 10 examples are longer than 6 tokens and end there")
    counter = dataset.count_cut(1000)
    assert (counter.cut, counter.examples) == ({"inputs": 5, "targets": 0}, 10)
    assert dataclasses.replace(dataset, task_feature_lengths={"inputs": 11, "targets": 3}).count_cut(9).cut == {
        "inputs": 0,
        "targets": 9,
    }


@pytest.mark.parametrize(
    ("line", "template", "text"),
    [
        ('{"meta.text": "right", "meta": "wrong"}', "{meta.text}", "right"),
        ('{"a[0]": "right", "a": "wrong"}', "{a[0]}", "right"),
        ('{"a:b": "right", "a!r": "wrong"}', "{a:b}", "right"),
        ('{"": "right"}', "{{{}}}", "{right}"),
        ('{"price": 1.5, "name": "n"}', "{price:.2f} {name!r} {price}", "1.50 'n' 1.5"),
    ],
)
def test_a_field_s_name_is_its_key_whatever_characters_it_has(write, line, template, text):
    assert read({"train": write("a.jsonl", line)}, readers.Jsonl(), inputs=template, targets="x") == [(text, "x")]


def test_what_would_be_dropped_without_a_word_is_refused_or_said(write, caplog):
    with pytest.raises(UserError, match=r"a\.tsv:2: the header names the column 'text' twice"):
        read({"train": write("a.tsv", "\ntext\tid\ttext\na\tb\tc\n")}, readers.Tsv(), inputs="{text}", targets="{id}")
    with pytest.raises(UserError, match=r"Tsv\.columns names the column 'a' twice"):
        read({"train": write("a.tsv", "b\tc\n")}, readers.Tsv(("a", "a")), inputs="{a}", targets="{a}")
    with pytest.raises(UserError, match="two different names"):
        read(
            {"train": (write("a", "b\n"), write("b", "b\n"))}, readers.Parallel(("a", "a")), inputs="{a}", targets="{a}"
        )
    with pytest.raises(UserError, match=r"a\.jsonl:1: the field 'inputs' occurs twice"):
        read({"train": write("a.jsonl", '{"inputs": "a", "inputs": "b", "targets": "c"}')}, readers.Jsonl())
    with caplog.at_level("INFO", logger="diffusion_t5x"):
        read({"train": write("a.jsonl", '{"inputs": "a", "targets": "b", "id": 1}')}, readers.Jsonl())
    assert "fields that no template names: id" in caplog.text


def test_more_shots_than_records_are_refused(write):
    files = {"train": write("a.tsv", "a\tb\nc\td\n"), "test": write("b.tsv", "x\ty\n")}
    assert len(read(files, readers.Tsv(("inputs", "targets")), "test", num_shots=2)) == 1
    with pytest.raises(UserError, match="There are 2 training examples for 3 shots: lower NUM_SHOTS"):
        read(files, readers.Tsv(("inputs", "targets")), "test", num_shots=3)
    with pytest.raises(UserError, match="NUM_SHOTS must be a number of examples"):
        read(files, readers.Tsv(("inputs", "targets")), "test", num_shots=-1)


@pytest.mark.parametrize("reader", [readers.Jsonl(), readers.Tsv(), readers.Text("file")])
def test_empty_files_among_others_are_left_out_and_named(write, tmp_path, reader, caplog):
    record = '{"text": "a"}\n' if isinstance(reader, readers.Jsonl) else "text\na\n"
    for name, text in (("1", "\n"), ("2", record), ("3", "")):
        write(name, text)
    templates = {"inputs": None, "targets": "{text}"}
    name = local_files.task("mine", {"train": str(tmp_path / "?")}, reader, None, **templates)
    with caplog.at_level("WARNING", logger="diffusion_t5x"):
        assert len(list(SeqioDataset(name, {"targets": 8}).eval_examples())) == 1
    assert "2 of 3 files are empty and left out" in caplog.text
    with pytest.raises(UserError, match=r"1, .*3 are empty"):
        name = local_files.task("mine", {"train": str(tmp_path / "[13]")}, reader, None, **templates)
        list(SeqioDataset(name, {"targets": 8}).eval_examples())


def test_a_long_document_is_read_ahead_a_few_times_only(write):
    file = write("a.txt", "word " * 40_000)
    name = local_files.task(
        "mine", {"train": file}, readers.Text("paragraphs"), None, targets="{text}", objective=preprocessors.full_lm
    )
    batches = SeqioDataset(name, {"inputs": 1, "targets": 64}, batch_size=4, canvas=False).train_iterator()
    next(batches)
    cores = len(os.sched_getaffinity(0))
    # The tokens of a document are 0.8 MB, and each of a few steps holds one a core.
    assert sum(x.nbytes for x in batches.state_dict().values()) < (4 + 4 * cores) * 1_000_000


def test_texts_go_on_in_their_targets_and_end_in_eos_where_a_document_ends(write):
    """Chunks of a text are as long as the targets; nothing stands between their two parts, or behind them."""
    texts = ["".join(chr(97 + (i * k) % 26) for i in range(60)) for k in (1, 3, 5)] + ["q"]
    file = write("texts.txt", "\n".join(texts))
    lengths = {"inputs": 5, "targets": 16}
    local_files.task(
        "goes_on", {"train": file}, readers.Text("line"), None, inputs=None, targets="{text}",
        objective=preprocessors.continuation,
    )  # fmt: skip
    task = seqio.TaskRegistry.get("goes_on")
    found = list(task.get_dataset(lengths, split="train", shuffle=False, num_epochs=1, seed=0).as_numpy_iterator())
    vocabulary = task.output_features["targets"].vocabulary
    tokens = [token for x in found for token in [*x["inputs"], *x["targets"]]]
    assert tokens == [token for text in texts for token in [*vocabulary.encode(text), vocabulary.eos_id]]
    sizes = [len(x["inputs"]) + len(x["targets"]) for x in found]
    assert sizes == [16, 16, 16, 13] * 3 + [2]
    assert {len(x["inputs"]) for x in found} == {1, 2, 3, 4, 5}
    dataset = SeqioDataset("goes_on", lengths, batch_size=2)
    assert dataset.texts()["inputs_end"] is False
    with pytest.raises(UserError, match="2 of targets"):
        dataclasses.replace(dataset, task_feature_lengths={"inputs": 4, "targets": 1}, canvas=False).train_iterator()


def test_inputs_end_in_eos_unless_told_otherwise(write):
    file = write("pairs.jsonl", '{"inputs": "one", "targets": "un"}\n')
    for inputs_end in (True, False):
        local_files.task("ends", {"train": file}, readers.Jsonl(), None, inputs_end=inputs_end)
        task = seqio.TaskRegistry.get("ends")
        (x,) = task.get_dataset({"inputs": 8, "targets": 8}, split="train", num_epochs=1).as_numpy_iterator()
        vocabulary = task.output_features["targets"].vocabulary
        assert (x["inputs"][-1] == vocabulary.eos_id) == inputs_end and x["targets"][-1] == vocabulary.eos_id
        assert SeqioDataset("ends", {"inputs": 8, "targets": 8}).texts()["inputs_end"] == inputs_end


def test_parquet_gives_the_records_of_json_lines(write, tmp_path, caplog):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    lines = '{"inputs": "one", "targets": "un", "n": null}\n{"inputs": "été ☃", "targets": "deux", "n": {"x": [1.5]}}'
    first = [{"inputs": "one", "targets": "un", "n": None}, {"inputs": "été ☃", "targets": "deux", "n": {"x": [1.5]}}]
    table = pa.Table.from_pylist([row | {"image": {"bytes": b"\xff"}} for row in first])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    more = write("b.jsonl", '{"inputs": "3", "targets": "trois"}')
    both = [str(tmp_path / "a.parquet"), more]
    with caplog.at_level("INFO"):
        records = readers.Structured().read(both)
    assert list(records)[:2] == list(readers.Jsonl().read([write("a.jsonl", lines)])) == first
    assert "a.parquet: columns of bytes are left out: image" in caplog.text
    assert [records.where(0).rpartition("/")[2], records.where(2).rpartition("/")[2]] == [
        "a.parquet: row 1",
        "b.jsonl:1",
    ]
    assert read({"train": both}, readers.Structured()) == PAIRS
    with pytest.raises(UserError, match=r"a\.parquet: row 1: the field 'n' is null, not text"):
        read({"train": str(tmp_path / "a.parquet")}, readers.Structured(), inputs="{inputs}{n}", targets="x")
    with pytest.raises(UserError, match="is not a Parquet file that can be read"):
        readers.Structured().read([write("c.parquet", "{}")])
    with pytest.raises(UserError, match=r"Cannot read .*no\.parquet: No such file"):
        readers.Structured().read([str(tmp_path / "no.parquet")])
