"""Conversations read by the names of their fields."""

import pytest
from chats import message

from diffusion_t5x.data import conversations

ASKED, SAID = message("user", "a?"), message("assistant", "b")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [ASKED, SAID]}, [ASKED, SAID]),
        ({"messages": [ASKED | {"name": None}, SAID], "rejected": "c"}, [ASKED, SAID]),
        ({"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]}, [ASKED, SAID]),
        ({"conversations": [ASKED, SAID], "messages": None}, [ASKED, SAID]),
        (
            {"conversations": [{"from": "human", "value": "a?"}], "system": "Be brief."},
            [message("system", "Be brief."), ASKED],
        ),
        ({"prompt": "a?", "chosen": "b", "rejected": "c"}, [ASKED, SAID]),
        ({"prompt": [ASKED], "chosen": [SAID], "rejected": [message("assistant", "c")]}, [ASKED, SAID]),
        ({"prompt": "a?", "chosen": [ASKED, SAID]}, [ASKED, SAID]),  # the answer repeats the prompt
        ({"chosen": [ASKED, SAID]}, [ASKED, SAID]),
        ({"messages": [message("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "?"}])]}, [ASKED]),
        ({"messages": [message("ipython", "a")]}, [message("ipython", "a")]),  # for the template to judge
    ],
)
def test_fields_by_name(record, expected):
    assert conversations.has_messages(record) and conversations.read(record).messages == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, 'no "messages"'),
        ({"conversations": "a"}, 'no "conversations", a list'),
        ({"conversations": [{"from": "me", "value": "a"}]}, 'message 1 is from "me", not human, gpt'),
        ({"conversations": [{"from": "human", "text": "a"}]}, "message 1 has the content null"),
        ({"messages": [message("user", [{"type": "image_url"}])]}, 'message 1 has a part of the type "image_url"'),
        ({"messages": [message("asistant", "a")]}, "message 1 has the role .* Did you mean 'assistant'"),
        ({"messages": [message("", "a")]}, "message 1 has the role"),
        ({"chosen": "b"}, '"chosen" is a text without a "prompt"'),
        ({"prompt": 1, "chosen": "b"}, '"prompt" and "chosen" are texts, or lists'),
        ({"prompt": "a", "chosen": []}, '"prompt" and "chosen" are texts, or lists'),
    ],
)
def test_what_is_no_conversation(record, reason):
    with pytest.raises(ValueError, match=reason):
        conversations.read(record)


def test_the_question_and_the_answer_given():
    assert conversations.read({"messages": [ASKED, SAID]}).question() == ([ASKED], "b")
    assert conversations.read({"messages": [ASKED, SAID, ASKED]}).question() == ([ASKED, SAID, ASKED], None)
