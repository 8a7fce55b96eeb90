"""`--chat_template` and `--chat_template_kwargs`: a template of the user's own, and what it is given."""

from collections.abc import Iterable
from pathlib import Path

from launch.common.errors import UserError
from launch.common.messages import error_line, shortened, typed_error_line

NONE = "none"  # instead of a file: questions and answers are written as text
# Arguments of `apply_chat_template` itself: neither a row nor a flag sets them, least of all the template, a program.
RESERVED = {
    *("self", "conversation", "conversations", "messages", "tools", "documents", "kwargs"),
    *("chat_template", "add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}


def read_chat_template(file: str) -> str:
    """Return the text of a template. Raises UserError for a file that is not one, with the line that is wrong."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template  # imports torch

    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"--chat_template {shortened(file)} cannot be read: {error_line(error)}") from None
    try:
        render_jinja_template(conversations=[], chat_template=text)  # compiles it, and renders nothing
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"--chat_template {file}:{error.lineno}: {error_line(error)}") from None
    except Exception as error:  # the compiler meets what nobody meant to be a template
        raise UserError(f"--chat_template {file} is no template: {typed_error_line(error)}") from None
    if "messages" not in text:
        raise UserError(f"--chat_template {file} is no template of a conversation: it never reads `messages`")
    return text


def reserved(names: Iterable[str]) -> str | None:
    """The first of these variables that is not a template's own."""
    return next((name for name in names if name in RESERVED), None)
