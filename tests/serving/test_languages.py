"""Forms are compiled in a process of their own: one that takes too much is refused, and the next one is compiled."""

import chats
import pytest

from diffusion_t5x.data import vocabulary_files
from diffusion_t5x.decoding.language import Language
from diffusion_t5x.errors import UserError
from diffusion_t5x.serving.forms import Form
from diffusion_t5x.serving.languages import Languages

pytest.importorskip("outlines_core")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return vocabulary_files.vocabulary(chats.save(tmp_path_factory.mktemp("languages"), "chatml", chats.TOOLS))


def test_a_form_that_takes_too_long_is_refused(vocabulary):
    compiled = Languages(vocabulary, [3], seconds=3)
    with pytest.raises(UserError, match=r"'\[' is refused"):
        compiled(Form("form", regex="["))
    with pytest.raises(UserError, match=r"more than 3 s to compile.* fewer repetitions"):
        compiled(Form("form", regex="(a|b)*a(a|b){40}"))
    found, expected = compiled(Form("form", regex="[0-9]{3}")), Language("[0-9]{3}", vocabulary, end_ids=[3])
    assert found == expected and found is compiled(Form("form", regex="[0-9]{3}"))
    assert (
        found.shortest.tolist() == expected.shortest.tolist() and found.class_of.tolist() == expected.class_of.tolist()
    )


def nested(depth):
    schema = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.slow
def test_a_form_that_takes_too_much_memory_is_refused(vocabulary):
    compiled = Languages(vocabulary, [], seconds=30, most_bytes=2**30)
    with pytest.raises(UserError, match="too much memory to compile"):
        compiled(Form("form", regex="[a-z]{1000000000}"))
    with pytest.raises(UserError, match="too much memory to compile"):
        compiled(Form("form", schema=nested(60)))  # its regular expression is twice as long for each list
