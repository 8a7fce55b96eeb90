"""Encoding of conversations: the chat template's text, tokenised once, of which the answers are learned."""

from collections.abc import Sequence
from dataclasses import replace

from launch.common.errors import Reject
from launch.data.examples.kinds import ChatExample
from launch.data.examples.render import ChatTemplate
from launch.data.examples.rows import Row, labelled, with_end
from launch.data.examples.spans import Rendered, render_with_spans
from launch.data.examples.tokens import Tokeniser, Tokens, Untokenised
from launch.data.examples.tool_calls import with_arguments_as_text
from launch.data.records import DataError

INSTRUCTIONS = ("system", "developer")  # the roles that stay when a conversation loses its first turns


def begin_chat(example: ChatExample, template: ChatTemplate, tokenise: Tokeniser, max_length: int) -> Untokenised:
    """Begin to encode a conversation as a row that ends with its last learned answer.

    A conversation that is too long loses whole turns from the left; system messages stay.

    Raises:
        Reject: The conversation cannot be used.
        DataError: The tokenizer has no chat template.
    """
    check_template(template, example.where)
    whole = _whole(example, template)

    def finish(tokens: Tokens) -> Row:
        row = whole.finish(tokens)
        if len(row["input_ids"]) <= max_length:
            return row
        return _shortened(example, template, tokenise, max_length, len(row["input_ids"]))

    return replace(whole, finish=finish)


def _shortened(
    example: ChatExample, template: ChatTemplate, tokenise: Tokeniser, max_length: int, length: int
) -> Row:
    """Return the row of a conversation of `length` tokens without its first turns. Raises Reject if none fits."""
    turns = _beginnings(example)
    fits: Row | None = None
    first, last = 0, len(turns)
    while first < last:  # the fewest turns to drop
        middle = (first + last) // 2
        part = _whole(_from_turn(example, turns[middle]), template)
        row = part.finish(tokenise(part.text, part.boundaries))
        if len(row["input_ids"]) <= max_length:
            fits, last = row, middle
        else:
            first = middle + 1
    if fits is None:
        raise Reject(f"conversation longer than max_length {max_length}", f"{length} tokens")
    fits["prompt_tokens_cut"] = length - len(fits["input_ids"])
    return fits


def check_template(template: ChatTemplate, where: str) -> None:
    """Raise DataError for a tokenizer without a chat template."""
    if not template.tokenizer.chat_template:
        raise DataError(
            f"{where} is a conversation, which needs a tokenizer with a chat template, but this one has none; use "
            "the tokenizer of an instruction-tuned model, give --chat_template FILE, or prompt/completion data."
        )


def _whole(example: ChatExample, template: ChatTemplate) -> Untokenised:
    for index in example.learned:
        content = example.messages[index].get("content")
        if not isinstance(content, str):
            continue
        if stop := next((stop for stop in template.stops if stop in content.rstrip().removesuffix(stop)), None):
            raise Reject("completion holds the end token before its end", stop)
    rendered = _render(example, template)
    boundaries = sorted({edge for span in rendered.spans for edge in span})
    return Untokenised(rendered.text, boundaries, False, lambda tokens: _row(rendered, tokens, template))


def _row(rendered: Rendered, tokens: Tokens, template: ChatTemplate) -> Row:
    tokenizer = template.tokenizer
    learned = [tokens.overlapping(*span, template.special) for span in rendered.spans]
    learned = [part for part in learned if part.start < part.stop]
    if not learned:
        raise Reject("no label tokens")
    end = learned[-1].stop  # nothing is learned from what follows the last answer
    ids, spans = tokens.ids[:end], tokens.spans[:end]
    if not _stops(rendered, tokens, learned, template):
        ids, spans = with_end(ids, spans, tokenizer.eos_token_id, spans[-1, 1])
        learned.append(slice(len(ids) - 1, len(ids)))
    row = labelled(ids, learned, rendered.text, spans)
    row["notes"] = rendered.notes
    if ids[-1] != tokenizer.eos_token_id:
        stop = tokenizer.convert_ids_to_tokens(int(ids[-1]))
        row["notes"].append(f"the answer ends with {stop}, where the tokenizer's EOS is {tokenizer.eos_token}")
    return row


def _render(example: ChatExample, template: ChatTemplate) -> Rendered:
    """Render a conversation, with the arguments of tools' calls as JSON text if the template takes no objects."""
    try:
        return render_with_spans(example, template)
    except Reject as refusal:
        texts = replace(example, messages=with_arguments_as_text(example.messages))
        if texts == example:
            raise
        try:
            return render_with_spans(texts, template)
        except Reject:
            raise refusal from None


def _stops(rendered: Rendered, tokens: Tokens, learned: Sequence[slice], template: ChatTemplate) -> bool:
    """Return whether the last answer ends with a token that ends an answer, with nothing but blanks behind it."""
    start, end = rendered.spans[-1]
    written = rendered.text[start:end].rstrip()
    if tokens.ids[learned[-1].stop - 1] == template.tokenizer.eos_token_id:
        return True
    return any(token.end() == len(written) for token in template.special.finditer(written))


def _beginnings(example: ChatExample) -> list[int]:
    """Return the user's messages that a shortened conversation can begin with, the first one left out."""
    users = [index for index, message in enumerate(example.messages) if message["role"] == "user"]
    return [index for index in users[1:] if index < example.learned[-1]]


def _from_turn(example: ChatExample, begin: int) -> ChatExample:
    """Return the conversation from a message on, after the system messages that it begins with."""
    kept = 0
    while example.messages[kept]["role"] in INSTRUCTIONS:
        kept += 1
    learned = tuple(index - begin + kept for index in example.learned if index >= begin)
    return replace(example, messages=[*example.messages[:kept], *example.messages[begin:]], learned=learned)
