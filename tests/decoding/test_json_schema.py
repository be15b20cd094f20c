"""JSON schemas as regular expressions, judged by jsonschema."""

import json
import re

import jax
import numpy as np
import pytest
import spelled
import tiny

from diffusion_t5x.data.plain_vocabularies import ByteVocabulary
from diffusion_t5x.data.vocabularies import to_text
from diffusion_t5x.decoding.autoregressive import AutoregressiveDecoder
from diffusion_t5x.decoding.block import BlockDecoder
from diffusion_t5x.decoding.json_schema import any_object, pattern_of
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.decoding.masked import MaskedDecoder
from diffusion_t5x.decoding.sundae import SundaeDecoder
from diffusion_t5x.errors import UserError

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("outlines_core")

POINT = {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x", "y"]}
# Five references, one within the other.
CHAIN = {
    "definitions": {
        **{
            f"{name}/~": {
                "type": "object",
                "properties": {"a": {"$ref": f"#/definitions/{name + 1}~1~0"}},
                "required": ["a"],
            }
            for name in range(4)
        },
        "4/~": {"type": "boolean"},
    },
    "$ref": "#/definitions/0~1~0",
}
SCHEMAS = [
    {"type": "integer"},
    {"type": "number"},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "string", "pattern": "^[A-Z]{2}|x[0-9]+$"},
    *({"type": "string", "format": name} for name in ("date", "time", "date-time", "uuid")),
    {"enum": ['red "x"', "a.b*", 3, None, True, "ü\\n", 1.5, {"a": 1}, [1, 2]]},
    {"type": "string", "enum": ["a", 1, "b"]},
    {"const": "a+b"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string"}}]},
    {"type": "object", "additionalProperties": {"type": "integer"}},
    {"properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    {"$defs": {"point": {**POINT, "additionalProperties": False}}, "type": "array", "items": {"$ref": "#/$defs/point"}},
    {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Person",
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "all of it"},
            "address": {"type": "object", "properties": {"street": {"type": "string"}}, "required": ["street"]},
            "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
            "end": {"type": "array", "maxItems": 0, "items": {"type": "null"}},
        },
        "required": ["name", "tags"],
    },
    CHAIN,
    {"properties": {"a": {"title": "Any"}, "b": {"type": "integer"}}, "required": ["a", "b"]},
]


def draw(language, rng, most):
    """A random text of a language over bytes."""
    state, text = language.start, []
    ids = [np.flatnonzero(language.class_of == label) for label in range(language.class_of.max() + 1)]
    while True:
        left = most - len(text)
        choices = [
            (label, target)
            for label, target in zip(language.labels[state], language.targets[state], strict=True)
            if label >= 0 and language.shortest[target] < left and ids[label][0] > 1
        ]
        if language.shortest[state] == 0 and (not choices or rng.random() < 0.3):
            return bytes(text).decode()
        label, state = choices[rng.integers(len(choices))]
        text.append(int(rng.choice(ids[label])) - 3)


def check(schema, texts):
    """All are valid, and not all the same if they need not be."""
    judge = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for text in texts:
        judge.validate(json.loads(text))
    assert len(set(texts)) > 1 or schema in ({"type": "null"}, {"const": "a+b"})


@pytest.mark.parametrize("schema", SCHEMAS, ids=json.dumps)
def test_all_texts_are_valid(schema):
    language = Language(pattern_of(schema, "schema"), ByteVocabulary())
    rng = np.random.default_rng(0)
    check(schema, [draw(language, rng, most=120) for _ in range(20)])


def test_any_object():
    language, rng = Language(any_object(depth=2), ByteVocabulary()), np.random.default_rng(0)
    check({"type": "object"}, [draw(language, rng, most=120) for _ in range(50)])
    assert len(language.shortest) < 200  # states of a vocabulary of 50,000 tokens take milliseconds each
    for value in ({"a": [1, -2.5e-3, None], "b": {"é": "\\n"}}, {}, {"a": {}, "b": [], "c": True}):
        assert re.fullmatch(any_object(depth=2), json.dumps(value, ensure_ascii=False))
    assert not re.fullmatch(any_object(depth=2), '{"a": [[1]]}') and re.fullmatch(any_object(), '{"a": [[1]]}')


WRITERS = [
    MaskedDecoder(6, temperature=1.0, order="random"),
    BlockDecoder(16, MaskedDecoder(2, temperature=1.0)),
    SundaeDecoder(2, 2, temperature=1.0),
    AutoregressiveDecoder(temperature=1.0),
]
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "rows"), [(19, 8), *(pytest.param(number, 50, marks=slow) for number in range(len(SCHEMAS)))]
)
def test_what_a_model_writes_is_valid(number, rows):
    """A thousand texts of a model with random parameters, 50 by each schema."""
    schema, vocabulary = SCHEMAS[number], ByteVocabulary()
    definition, params = spelled.make_model(vocabulary)
    decoder = WRITERS[number % len(WRITERS)].within(Language(pattern_of(schema, "schema"), vocabulary))
    batch = tiny.one_a_row([([3 + row, 5] * (row % 3), [3] * 64) for row in range(rows)], 68)
    run = jax.jit(lambda batch: decoder.decode(definition.bind(params), batch, jax.random.key(0)))
    tokens = jax.device_get(run(batch).tokens)
    check(
        schema, [to_text(vocabulary, row[mask].tolist()) for row, mask in zip(tokens, batch.target_mask, strict=True)]
    )


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (True, "a schema is an object, not true"),
        ({"type": "integer", "minimum": 3}, "'minimum' cannot be kept"),
        ({"oneOf": [{"type": "null"}]}, 'give a "type"'),
        ({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}, r"\$\.a: 'uniqueItems'"),
        ({"type": "string", "pattern": ".*"}, "allows the character"),
        ({"type": "string", "format": "email"}, "must be one of date, time"),
        ({"properties": {"a": {}}, "required": ["b"]}, "'b' is required"),
        ({"type": "objekt"}, 'got "objekt"'),
        ({"$ref": "#/$defs/nothing"}, "'#/\\$defs/nothing' is not in the schema"),
        ({"type": []}, "got \\[\\]"),
        ({"type": "string", "minLength": 10**30}, "'minLength' cannot be 1000"),
        ({"$ref": "http://x/y"}, "must be a path in the schema"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, "'#' refers to itself"),
        ({"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, "refers to itself"),
        ({"enum": [1], "type": "string"}, "no value is of the type"),
        ({"anyOf": [{"type": "null"}], "type": "null"}, "'type' cannot be kept"),
        ({"anyOf": []}, r"'anyOf' cannot be \[\]"),
        ({"enum": 5}, "'enum' cannot be 5"),
        ({"enum": [float("inf")], "type": "integer"}, "is refused"),
        ({"type": "object", "properties": 5}, "'properties' cannot be 5"),
        ({"type": "string", "pattern": 5}, "'pattern' cannot be 5"),
        ({"type": "string", "format": []}, "is refused"),
        ({"type": "array", "items": {"type": "null"}, "minItems": -1}, "'minItems' cannot be -1"),
    ],
)
def test_what_cannot_be_kept_exactly_is_refused(schema, message):
    with pytest.raises(UserError, match=message):
        pattern_of(schema, "person.json")
