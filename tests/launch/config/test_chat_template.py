"""A chat template of the user's own is checked before anything is loaded."""

import inspect

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from launch.common.errors import UserError
from launch.config.chat_template import RESERVED, read_chat_template
from launch.config.command_line import parse_options

MODEL = ("--model", "somewhere")
GOOD = (
    "{% for m in messages %}{% if not m.content %}{% continue %}{% endif %}{{ m.role }}\n"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
)


def test_a_template_with_all_that_transformers_knows(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(GOOD)
    assert read_chat_template(str(path)) == GOOD
    assert parse_options([*MODEL, "--chat_template", str(path)])[0].chat_template == str(path)


def test_none_is_no_file():
    assert parse_options([*MODEL, "--chat_template", "none"])[0].chat_template == "none"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{% for m in messages %}\n{{ m.content }}\n{% if m.role %}\n{% endfor %}\n", r"mine\.jinja:4: .*endfor"),
        (b"\n\n{{ messages[0].content | no_such_filter }}", r"mine\.jinja:3: No filter named 'no_such_filter'"),
        (b"", "never reads `messages`"),
        (b" \n", "never reads `messages`"),
        (b'{"chat_template": null}', "never reads `messages`"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read: .*No such file"),
    ],
)
def test_a_file_that_is_no_template_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "mine.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--chat_template .*{message}"):
        parse_options([*MODEL, "--chat_template", str(path)])


def test_a_folder_is_no_template(tmp_path):
    with pytest.raises(UserError, match=r"--chat_template .* cannot be read"):
        parse_options([*MODEL, "--chat_template", str(tmp_path)])


def test_settings_of_the_template():
    options, _ = parse_options([*MODEL, "--chat_template_kwargs", '{"enable_thinking": false}'])
    assert options.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("enable_thinking=false", "not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"tokenize": true}', "tokenize is an argument of apply_chat_template"),
        ('{"a": 1, "chat_template": "x"}', "chat_template is an argument of apply_chat_template"),
    ],
)
def test_settings_that_are_not_the_templates_are_refused(value, message):
    with pytest.raises(UserError, match=f"--chat_template_kwargs.*{message}"):
        parse_options([*MODEL, "--chat_template_kwargs", value])


def test_every_argument_of_apply_chat_template_is_reserved():
    for function in (PreTrainedTokenizerBase.apply_chat_template, render_jinja_template):
        assert set(inspect.signature(function).parameters) <= RESERVED
