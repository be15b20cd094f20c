"""Texts with holes: how they are read, encoded and laid out, and what is said where one does not fit."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_t5x.data import vocabularies
from diffusion_t5x.data.seqio_source import SeqioDataset
from diffusion_t5x.data.templates import Hole, Templates, escape
from diffusion_t5x.errors import UserError

seqio = pytest.importorskip("seqio")


def register(name, vocabulary, features=("inputs", "targets"), add_eos=True):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(lambda split, shuffle_files, seed=None: None, splits=("train",)),
        preprocessors=[],
        output_features={feature: seqio.Feature(vocabulary, add_eos=add_eos) for feature in features},
    )


register("templates_of_bytes", seqio.ByteVocabulary())
register("templates_with_sentinels", seqio.ByteVocabulary(extra_ids=2))
register("templates_without_inputs", seqio.ByteVocabulary(), ("targets",), add_eos=False)
TASK = SeqioDataset("templates_of_bytes", {"inputs": 4, "targets": 12}, split="none", batch_size=2)


def templates(tmp_path, *lines, dataset=TASK):
    path = tmp_path / "some.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return Templates.read(str(path), dataset)


def ids(text):
    return [byte + 3 for byte in text.encode()]


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_holes_of_unknown_length_have_slots_of_their_own(architecture, tmp_path):
    dataset = dataclasses.replace(TASK, mixture_or_task_name="templates_with_sentinels", architecture=architecture)
    lines = {"template": "a<hole:?>b<hole:2?>c<hole:1>", "inputs": "xy"}, {"template": "<hole:3>d<hole:?>e<hole:?>"}
    found = templates(tmp_path, *lines, dataset=dataset)
    found.check()
    ((batch, _),) = found.eval_batches()
    # 12 slots hold a text of three, EOS, holes of two and one: five are left for the first hole. Of the second text's
    # six beside a hole of three, two holes get three each.
    first, second = [0, 1, 1, 1, 1, 1, 0, 2, 2, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 0, 2, 2, 2, 0]
    spare = [-1] * 7
    if architecture == "decoder_only":
        assert batch.holes.tolist() == [[0] * 3 + first + [0] + spare, [0] + second + [0] * 3 + spare[:6] + [0]]
    else:
        assert batch.holes.tolist() == [first + spare, second + spare[:6] + [0]]
    known = np.array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0])
    start = 3 * (architecture == "decoder_only")
    assert batch.target_mask[0, start : start + 12].tolist() == ((np.array(first) > 0) | (known > 0)).tolist()
    assert not batch.tokens[batch.target_mask].any() and not batch.segment_ids[:, -7:].any()
    with pytest.raises(UserError, match="no sentinels"):
        templates(tmp_path, *lines).check()
    plain = templates(tmp_path, {"template": "<hole:3>"}, dataset=dataset)
    assert next(plain.eval_batches())[0].holes is None


def test_an_escaped_text_stands_for_itself(tmp_path):
    text = r"a<hole:3>\<hole:?>\\<hole> <hole:x\>"
    found = templates(tmp_path, {"template": escape(text) + "<hole:1>"})._templates[0]
    assert found.parts == [text, ""] and found.holes == [Hole(1)]


@pytest.mark.parametrize("architecture", ["decoder_only", "encoder_decoder"])
def test_a_row_is_that_of_the_task_with_the_template_for_targets(architecture, tmp_path):
    dataset = dataclasses.replace(TASK, architecture=architecture)
    lines = {"template": "a<hole:2>é<hole:1>", "inputs": "xy"}, {"template": "<hole:3>"}, {"template": "<hole:11>"}
    found = templates(tmp_path, *lines, dataset=dataset)
    found.check()
    assert found.num_eval_examples() == 3 and found.num_eval_examples(2) == 2
    (batch, examples), (last, _) = found.eval_batches()
    assert examples[0] == {"example_id": 0, "inputs_pretokenized": "xy", "template": "a<hole:2>é<hole:1>"}
    assert [example["inputs_pretokenized"] for example in examples] == ["xy", ""]
    text = [*ids("a"), 0, 0, *ids("é"), 0, 1]
    targets = [*text, *[0] * (12 - len(text))]
    holes = [False, True, True, False, False, True]
    if architecture == "decoder_only":
        assert batch.tokens[0].tolist() == [*ids("xy"), 1, *targets, 0]
        assert batch.target_mask[0].tolist() == [*[False] * 3, *holes, *[False] * 7]
        assert batch.segment_ids[0].tolist() == [*[1] * 15, 0]
        assert found.text_mask(batch)[0].tolist() == [*[False] * 3, *[True] * 12, False]
        assert batch.tokens[1].tolist() == [1, 0, 0, 0, 1, *[0] * 11] and batch.target_mask[1].sum() == 3
    else:
        assert batch.tokens[0].tolist() == targets and batch.target_mask[0].tolist() == [*holes, *[False] * 6]
        assert batch.encoder_tokens.tolist() == [[*ids("xy"), 1, 0], [1, 0, 0, 0]]
        assert found.text_mask(batch).all()
    assert last.example_ids.tolist() == [2, 3] and not last.segment_ids[1].any() and not found.text_mask(last)[1].any()
    assert last.target_mask.sum() == 11


def test_a_task_without_inputs_and_eos(tmp_path):
    dataset = SeqioDataset("templates_without_inputs", {"targets": 4}, canvas=False, batch_size=1)
    found = templates(tmp_path, {"template": "a<hole:2>"}, dataset=dataset)
    found.check()
    ((batch, _),) = found.eval_batches()
    assert batch.tokens.tolist() == [[ids("a")[0], 0, 0, 0]] and batch.segment_ids.tolist() == [[1, 1, 1, 0]]
    with pytest.raises(UserError, match=r"some.jsonl:1: templates_without_inputs has no inputs; leave them out"):
        templates(tmp_path, {"template": "<hole:1>", "inputs": ""}, dataset=dataset).check()


@pytest.mark.parametrize(
    ("template", "text", "holes"),
    [
        (r"\<hole:3>.<hole:1>", "<hole:3>.", [1]),
        (r"\\<hole:1>", "\\", [1]),
        (r"\\\<hole:1><hole:1>", r"\<hole:1>", [1]),
        (r"\n<hole:01>\<hole>", r"\n<hole>", [1]),
        ("<hole:2><hole:3>", "", [5]),
        ("<holes><hole:1>", "<holes>", [1]),
    ],
)
def test_what_is_a_hole_and_what_is_text(template, text, holes, tmp_path):
    dataset = dataclasses.replace(TASK, task_feature_lengths={"inputs": 4, "targets": 40})
    ((batch, _),) = templates(tmp_path, {"template": template}, dataset=dataset).eval_batches()
    row, mask = batch.tokens[0], batch.target_mask[0]
    assert np.diff(np.flatnonzero(np.diff(mask.astype(int))))[::2].tolist() == holes
    assert dataset.to_text(row[~mask][1:].tolist()) == text  # behind the EOS of the inputs, up to that of the text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"template": "x', "some.jsonl:2: not JSON: Unterminated string"),
        ("[]", "some.jsonl:2: no template."),
        ({"inputs": "x"}, "some.jsonl:2: no template."),
        ({"template": "<hole:1>", "input": "x"}, "some.jsonl:2: unknown field 'input'. Did you mean 'inputs'?"),
        ({"template": 3}, "some.jsonl:2: template and inputs must be text"),
        ({"template": "nothing"}, "some.jsonl:2: the template has no hole"),
        ({"template": "a<hole:0>"}, "some.jsonl:2: <hole:0> is not a hole"),
        ({"template": "a<hole:-1>"}, "some.jsonl:2: <hole:-1> is not a hole"),
        ({"template": "a<hole>"}, "some.jsonl:2: <hole> is not a hole"),
        ({"template": "a<hole:0?>"}, "some.jsonl:2: <hole:0?> is not a hole"),
        ({"template": "<hole:2><hole:?>"}, "some.jsonl:2: <hole:?> follows another hole"),
        ({"template": "ab<hole:10>"}, "some.jsonl:2: template of 13 tokens (10 in holes, 1 for EOS), but"),
        ({"template": "a<hole:999999999>"}, "TASK_FEATURE_LENGTHS has room for 12 targets"),
        ({"template": "<hole:1>", "inputs": "abcd"}, "some.jsonl:2: inputs of 5 tokens (0 in holes, 1 for EOS)"),
    ],
)
def test_a_line_that_does_not_fit_is_named(line, expected, tmp_path):
    with pytest.raises(UserError) as raised:
        templates(tmp_path, {"template": "<hole:1>"}, line).check()
    assert expected in str(raised.value)


def test_files_that_are_missing_or_empty(tmp_path):
    with pytest.raises(UserError, match=r"Cannot read .*nowhere.jsonl: No such file"):
        Templates.read(str(tmp_path / "nowhere.jsonl"), TASK)
    with pytest.raises(UserError, match="is empty"):
        templates(tmp_path)


@pytest.fixture(scope="module")
def texts_of(test_data):
    """Vocabularies by name."""
    from diffusion_t5x.data.llama2c_vocabulary import Llama2cVocabulary
    from diffusion_t5x.tasks.quickstart import QuickstartVocabulary

    return {
        "bytes": seqio.ByteVocabulary(),
        "t5": seqio.SentencePieceVocabulary(str(test_data / "t5_sentencepiece" / "t5_vocab.model"), extra_ids=100),
        "quickstart": QuickstartVocabulary(),
        "llama2c": Llama2cVocabulary(str(test_data / "stories260k" / "tok512.bin")),
    }


@pytest.mark.parametrize("name", ["bytes", "t5", "quickstart", "llama2c"])
@settings(max_examples=30, deadline=None)
@given(words=st.lists(st.text("abeé12.(", min_size=1, max_size=6), min_size=1), data=st.data())
def test_parts_of_a_text_read_as_the_text_wherever_it_is_cut(name, texts_of, words, data):
    """A dummy prefix in each part would be a space at each cut; spaces dropped at their ends would be missing."""
    vocabulary, text = texts_of[name], " ".join(words)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    # A part that begins the text and is empty puts no space, as a hole before the text may bring one.
    parts = parts[next(number for number, part in enumerate(parts) if part) :]
    encoded = [vocabularies.encode_part(vocabulary, part, number == 0) for number, part in enumerate(parts)]
    tokens = [token for part in encoded for token in part]
    assert vocabulary.decode(tokens) == text
    assert "".join(vocabularies.cells(vocabulary, tokens, {})) == text
    assert vocabularies.encode_part(vocabulary, text, True) == list(vocabulary.encode(text))


def test_borders_of_holes_in_sentencepiece(texts_of):
    vocabulary = texts_of["t5"]

    def pieces(text, begins):
        return [vocabulary.tokenizer.IdToPiece(i) for i in vocabularies.encode_part(vocabulary, text, begins)]

    assert pieces("  return  x ", True) == ["▁return", "▁", "x", "▁"]  # what T5 drops inside a text is dropped here
    assert pieces(" return", False) == ["▁return"] and pieces("return", False) == ["re", "turn"]
    assert pieces("", True) == pieces("", False) == []
    with pytest.raises(UserError, match="no piece for '☃'"):
        pieces("a ☃", False)


def test_cells_show_a_character_at_its_last_byte_and_signs(texts_of):
    vocabulary = texts_of["bytes"]
    tokens = [*vocabulary.encode("é☃"), 1, 0xC3 + 3]
    assert vocabularies.cells(vocabulary, tokens, {1: "¶"}) == ["", "é", "", "", "☃", "¶", "�"]
    assert vocabularies.cells(vocabulary, [0xC3 + 3, 1], {1: "¶"}) == ["�", "¶"]
    assert vocabularies.cells(vocabulary, [], {}) == []
