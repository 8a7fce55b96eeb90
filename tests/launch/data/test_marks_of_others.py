"""Templates whose `{% generation %}` marks hold what the assistant did not write: such a row is refused."""

import pytest

from launch.common.errors import Reject
from launch.data.encode import encode
from launch.data.examples.kinds import ChatExample
from tests.support.tokenizers import byte_level, learned_texts

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
MARKED = "{% generation %}" + TURN + "{% endgeneration %}"
MESSAGES = [
    {"role": role, "content": content}
    for role, content in [("user", "one"), ("assistant", "yes no"), ("user", "two"), ("assistant", "hello")]
]


@pytest.mark.parametrize(
    "template",
    [
        "{% generation %}{% for m in messages %}" + TURN + "{% endfor %}{% endgeneration %}",
        "{% for m in messages %}" + MARKED + "{% endfor %}",
        "{% for m in messages %}{% if m.role == 'user' and loop.index0 == 0 %}" + TURN + "{% else %}" + MARKED
        + "{% endif %}{% endfor %}",
    ],
    ids=["the whole conversation", "every turn", "every turn but the first"],
)  # fmt: skip
def test_marks_of_another_roles_words_are_refused(template):
    with pytest.raises(Reject, match="marks hold words of another role"):
        encode(ChatExample(MESSAGES, "a:1", (1, 3)), byte_level("<|im_end|>", template=template), 99)


def test_marks_of_answers_alone_are_taken():
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}" + TURN + "{% else %}" + MARKED + "{% endif %}{% endfor %}"
    )
    tokenizer = byte_level("<|im_end|>", template=template)
    row = encode(ChatExample(MESSAGES, "a:1", (1, 3)), tokenizer, 99)
    assert [text.rstrip() for text in learned_texts(row, tokenizer)] == ["yes no<|im_end|>", "hello<|im_end|>"]
