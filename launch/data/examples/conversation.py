"""Encoding of conversations with the tokenizer's chat template, which decides the text and where the answers are.

With one answer, the prompt is what the template renders without it. With several, the template has to mark them
(`{% generation %}`), as nothing else tells which tokens the assistant wrote.
"""

import re

from launch.common.errors import Reject
from launch.common.messages import error_line, typed_error_line
from launch.data.examples.kinds import ChatExample
from launch.data.examples.rows import IGNORED, Row, join, strip_left, token_ids
from launch.data.examples.values import unicode
from launch.data.records import DataError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_chat(example: ChatExample, tokenizer, max_length: int) -> Row:
    """Encode a conversation as a row.

    Raises Reject for a conversation that cannot be used, DataError for a tokenizer without a chat template.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"{example.where} is a conversation, which needs a tokenizer with a chat template, but this one "
            "has none; use the tokenizer of an instruction-tuned model, or prompt/completion data."
        )
    if example.template_kwargs:
        raise Reject(
            "tools, documents and chat_template_kwargs are not supported", ", ".join(example.template_kwargs)
        )
    spoken = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    if list(example.learned) != spoken or spoken[-1] < len(example.messages) - 1:
        raise Reject("answers that are not learned, and what follows the last answer, are not supported")
    answers = [message["content"] for message in example.messages if message["role"] == "assistant"]
    if any(tokenizer.eos_token in answer.removesuffix(tokenizer.eos_token) for answer in answers):
        raise Reject("completion holds the end token before its end")
    if len(answers) == 1:
        return _one_answer(example, tokenizer, max_length)
    if not GENERATION.search(_template(tokenizer)):
        raise Reject(
            "several answers, which the chat template does not mark: add {% generation %} to it, or split them",
            f"{len(answers)} answers",
        )
    return _marked_answers(example, tokenizer, max_length)


def _template(tokenizer) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:  # several templates without a default
        raise Reject("the tokenizer has no default chat template", error_line(error, 80)) from None


def _render(tokenizer, messages, **kwargs):
    """Apply the chat template. It is a program that came with the model: it may raise anything."""
    try:
        rendered = tokenizer.apply_chat_template(messages, **kwargs)
        return unicode(rendered, "the rendered conversation") if isinstance(rendered, str) else rendered
    except Reject:
        raise
    except Exception as error:
        raise Reject("the chat template refuses the conversation", typed_error_line(error, 80)) from None


def _one_answer(example: ChatExample, tokenizer, max_length: int) -> Row:
    if len(example.messages) > 1:
        prompt = _render(tokenizer, example.messages[:-1], tokenize=False, add_generation_prompt=True)
    else:
        prompt = ""
    text = _render(tokenizer, example.messages, tokenize=False)
    if not text.startswith(prompt):
        raise Reject("the chat template renders the prompt differently when the answer follows")
    completion = text[len(prompt) :]
    # Many templates end a turn with EOS and a newline; the newline would follow EOS.
    stripped = completion.rstrip()
    if stripped.endswith(tokenizer.eos_token):
        completion = stripped
    return join(token_ids(prompt, tokenizer), token_ids(completion, tokenizer), tokenizer, max_length)


def _marked_answers(example: ChatExample, tokenizer, max_length: int) -> Row:
    encoded = _render(tokenizer, example.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    if 1 not in mask:
        raise Reject("the chat template marks no answer")
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # After the last answer only its EOS matters, which a template may have left outside the mark.
    end = len(mask) - mask[::-1].index(1)
    ids, mask = ids[:end], mask[:end]
    if ids[-1] != eos:
        ids, mask = [*ids, eos], [*mask, 1]
    ids = strip_left(ids, bos)
    mask = mask[len(mask) - len(ids) :]
    start = [] if bos is None else [bos]
    cut = max(0, len(start) + len(ids) - max_length)
    last_answer = len(mask) - [*mask[::-1], 0].index(0)
    if cut > last_answer:
        raise Reject(f"completion longer than max_length {max_length}", f"{len(ids) - last_answer} tokens")
    # An answer that lost its beginning is context only.
    first = cut
    while cut and mask[cut - 1] and first < last_answer and mask[first]:
        first += 1
    labels = [token if learn else IGNORED for token, learn in zip(ids, mask, strict=True)]
    labels[cut:first] = [IGNORED] * (first - cut)
    if all(label == IGNORED for label in (start + labels[cut:])[1:]):
        raise Reject("no label tokens")
    return Row(
        input_ids=start + ids[cut:],
        labels=[IGNORED] * len(start) + labels[cut:],
        prompt_tokens_cut=cut,
    )
