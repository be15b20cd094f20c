"""Conversations as ids: those of `transformers` for 1,000 of them, what ends an answer, and texts that go on."""

import gzip
import itertools
import json
import random

import chats
import open_models
import pytest
from chats import message

from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.data.chats import Chat

transformers = pytest.importorskip("transformers")
jinja2 = pytest.importorskip("jinja2")

# Kind of tokenizer, template in place of its own.
TEMPLATES = {
    "chatml": ("chatml", None),
    "thinking": ("thinking", None),
    "tools": ("chatml", chats.TOOLS),
    "reasoning": ("chatml", chats.REASONING),
    "inst": ("inst", None),
    "headers": ("headers", None),
    "dated": ("headers", chats.DATED),
    "turns": ("turns", None),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Météo <now> & \"then\", 'here'",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def texts(test_data):
    """Real texts: questions, code, and French."""
    with gzip.open(test_data / "squad_v1.1" / "dev-v1.1.json.gz", "rt", encoding="utf-8") as file:
        articles = json.load(file)["data"][:8]
    found = [qa["question"] for article in articles for p in article["paragraphs"] for qa in p["qas"]]
    with gzip.open(test_data / "mbpp" / "mbpp.jsonl.gz", "rt", encoding="utf-8") as file:
        found += [json.loads(line)["code"] for line in itertools.islice(file, 200)]
    with gzip.open(test_data / "tatoeba_enfr" / "fra.txt.gz", "rt", encoding="utf-8") as file:
        found += [line.rstrip("\n").partition("\t")[2] for line in itertools.islice(file, 90_000, 90_400)]
    return found


def conversations(test_data, count):
    """Conversations with and without system prompts (some empty), thoughts, tools and calls."""
    said, rng = texts(test_data), random.Random(0)
    for _ in range(count):
        messages, tools = [], [TOOL] * rng.choice([0, 0, 0, 1, 2]) or None
        if rng.random() < 0.5:
            messages.append(message("system", rng.choice(["", rng.choice(said)])))
        for turn in range(rng.randint(1, 3)):
            messages.append(message("user", rng.choice(said)))
            if tools and rng.random() < 0.6:
                call = {
                    "name": "weather",
                    "arguments": {"city": rng.choice(["Orléans", "Łódź"]), "days": rng.randint(1, 9)},
                }
                called = {"role": "assistant", "content": rng.choice(["", None, "Let me look."])}
                messages.append(called | {"tool_calls": [{"type": "function", "id": "abcdefghi", "function": call}]})
                messages.append(message("tool", rng.choice(['{"°C": 21}', "none"]), tool_call_id="abcdefghi"))
            if turn < 2 and rng.random() < 0.8:
                thought = {"reasoning_content": rng.choice(said)} if rng.random() < 0.3 else {}
                content = rng.choice(said)
                content = f"<think>\n{rng.choice(said)}\n</think>\n\n{content}" if rng.random() < 0.2 else content
                messages.append(message("assistant", content, **thought))
        variables = rng.choice([{}, {}, {"enable_thinking": False}, {"enable_thinking": True}])
        yield messages, variables | ({"tools": tools} if tools else {})


def compare(folder, tokenizer, talks):
    """Compares ids with those of `transformers`; returns how many conversations both encode, and both refuse."""
    vocabulary = vocabulary_files.vocabulary(tokenizer)
    ours, theirs = Chat.of(vocabulary), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    encoded = refused = 0
    for messages, variables in talks:
        try:
            expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **variables)
        except (jinja2.TemplateError, TypeError):
            with pytest.raises(ValueError, match="the chat template refuses it"):
                ours.prompt_ids(messages, variables)
            refused += 1
            continue
        begin = [vocabulary.bos_id] if vocabulary.adds_bos and expected[:1] == [vocabulary.bos_id] else []
        assert begin + ours.prompt_ids(messages, variables) == expected, messages
        encoded += 1
    return encoded, refused


def test_ids_of_1000_conversations_are_those_of_transformers(test_data, tmp_path):
    talks, found = list(conversations(test_data, 1000)), {}
    for number, (name, (kind, template)) in enumerate(TEMPLATES.items()):
        tokenizer = chats.save(tmp_path / name, kind, template, in_file=bool(number % 2))
        found[name] = compare(tmp_path / name, tokenizer, talks[number::8])
    assert sum(map(sum, found.values())) == 1000 and sum(encoded for encoded, _ in found.values()) > 700, found
    assert not found["tools"][1] and not found["dated"][1], found  # which take everything
    assert found["turns"][0] and found["turns"][1], found  # which takes no system prompt


@pytest.mark.parametrize(
    ("kind", "named", "expected"),
    [
        ("chatml", None, []),  # EOS ends a turn
        ("headers", None, []),
        ("turns", None, ["<end_of_turn>"]),
        ("turns", ["</s>", "<s>"], ["<s>", "<end_of_turn>"]),
        ("chatml", ["<|pad|>"], ["<|pad|>"]),
    ],
)
def test_what_ends_an_answer(kind, named, expected, tmp_path):
    vocabulary = vocabulary_files.vocabulary(chats.save(tmp_path, kind))

    def ids(tokens):
        return [token for text in tokens for token in vocabulary.encode_part(text, begins=False)]

    if named:
        said = ids(named) if len(named) > 1 else ids(named)[0]
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
    assert Chat.of(vocabulary).end_ids == tuple(sorted(ids(expected)))


def test_a_vocabulary_without_a_template(tmp_path):
    bare = open_models.save_tokenizer(tmp_path, open_models.byte_level(), eos_token="<|end|>")
    assert Chat.of(vocabulary_files.vocabulary(bare)) is None
    assert Chat.of(vocabulary_files.vocabulary(None)) is None


@pytest.mark.parametrize("kind", ["chatml", "headers"])
def test_an_answer_that_is_begun_goes_on(kind, tmp_path):
    vocabulary = vocabulary_files.vocabulary(chats.save(tmp_path, kind))
    chat = Chat.of(vocabulary)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    talk = [message("user", "the a?"), message("assistant", "It is")]
    text = theirs.apply_chat_template(talk, tokenize=False, continue_final_message=True)
    assert chat.template.unfinished(talk) == text
    before, after = chat.encode_continued(text, " a time")
    begin = [vocabulary.bos_id] if vocabulary.adds_bos else []
    assert begin + before == theirs.encode(text, add_special_tokens=False)
    assert begin + before + after == theirs.encode(text + " a time", add_special_tokens=False)
    with pytest.raises(ValueError, match="changes the last message"):
        chat.template.unfinished([talk[0], message("assistant", "  ")])
