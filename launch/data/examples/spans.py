"""Which characters of a rendered conversation are learned: every answer as the template writes it, and its stop.

The template's own marks (`{% generation %}`) say it where it has them. Without marks, an answer is what the template
adds between the conversation up to it, with a generation prompt, and the conversation including it. Templates that
write earlier turns differently once others follow are asked again, with other words in the answer's place.
"""

from itertools import pairwise
from typing import Any

from launch.common.errors import Reject
from launch.data.examples.kinds import ChatExample
from launch.data.examples.render import ChatTemplate, Span
from launch.data.examples.rendered import (
    OTHER_ANSWERS,
    WAY_OUT,
    Rendered,
    check_alone,
    check_tools,
    check_variables,
    left_out,
    render_or_none,
    squeezed,
)


def render_with_spans(example: ChatExample, template: ChatTemplate) -> Rendered:
    """Render a conversation and find its learned answers.

    Raises Reject where these cannot be told for certain, or where the template leaves out tools or their calls.
    """
    if template.has_marks(example.template_kwargs):
        rendered = _marked(example, template)
    else:
        rendered = _unmarked(example, template)
    rendered.spans = [_one_stop(rendered.text, span, template) for span in rendered.spans]
    check_tools(rendered, example, template)
    check_variables(example, template)
    check_alone(rendered, example, template)
    rendered.notes += left_out(rendered.text, example, template)
    return rendered


def _marked(example: ChatExample, template: ChatTemplate) -> Rendered:
    text, marks = template.render_with_marks(example.messages, example.template_kwargs)
    answers = [index for index, message in enumerate(example.messages) if message["role"] == "assistant"]
    if not marks:
        raise Reject("the chat template marks no answer", "its {% generation %} holds none of this conversation")
    for index in example.learned:
        content = example.messages[index].get("content")
        if not any(_holds(text[start:end], content, template) for start, end in marks):
            raise Reject("the chat template's {% generation %} marks do not hold the answers", WAY_OUT)
    _check_marks(example, template)
    marks = [_without_header(text, mark, template) for mark in marks]
    if len(example.learned) == len(answers):
        return Rendered(text, marks)
    if len(marks) == len(answers):
        return Rendered(text, [mark for index, mark in zip(answers, marks, strict=True) if index in example.learned])
    unlearned = tuple(index for index in answers if index not in example.learned)
    skipped = [_unmarked_span(index, text, example, template)[0] for index in unlearned]
    words = [(start, end) for start, end in marks if template.special.sub("", text[start:end]).strip()]
    return Rendered(text, [mark for mark in words if not any(_overlap(mark, span) for span in skipped)])


def _check_marks(example: ChatExample, template: ChatTemplate) -> None:
    """Raise Reject for marks that hold the words of another role: other words in their place stand in a mark."""
    others = [
        message if message["role"] == "assistant" else {**message, "content": OTHER_ANSWERS[0]}
        for message in example.messages
    ]
    try:
        text, marks = template.render_with_marks(others, example.template_kwargs)
    except Reject:
        return
    if any(OTHER_ANSWERS[0] in text[start:end] for start, end in marks):
        raise Reject("the chat template's {% generation %} marks hold words of another role", WAY_OUT)


def _without_header(text: str, mark: Span, template: ChatTemplate) -> Span:
    """Return a mark without the part of an answer's header that it holds: the model does not write that."""
    start, end = mark
    header = template.answer_header
    place = text.find(header, max(0, start - len(header)), start + len(header)) if header else -1
    return (max(start, place + len(header)), end) if start < place + len(header) < end else mark


def _unmarked(example: ChatExample, template: ChatTemplate) -> Rendered:
    text = template.render(example.messages, example.template_kwargs)
    places = _places_of_contents(text, example, template) if len(example.learned) > 1 else {}
    spans: list[Span] = []
    notes: list[str] = []
    for index in example.learned:
        span = _between_header_and_stop(text, places.get(index), spans, template)
        note = ""
        if span is None:
            span, note = _unmarked_span(index, text, example, template)
        spans.append(span)
        notes += [note] if note and note not in notes else []
    if any(span[0] < previous[1] for previous, span in pairwise(spans)):
        raise Reject("the chat template writes two answers in one place", WAY_OUT)
    return Rendered(text, spans, notes)


def _unmarked_span(index: int, text: str, example: ChatExample, template: ChatTemplate) -> tuple[Span, str]:
    """Return the characters of one answer, and a note where its generation prompt is no part of the text."""
    messages, arguments = example.messages, example.template_kwargs
    prompt = render_or_none(template.prompt, messages[:index], arguments)
    last = index == len(messages) - 1
    answered = (
        template.up_to_stop(text) if last else render_or_none(template.answered, messages[: index + 1], arguments)
    )
    if prompt and answered and answered.startswith(prompt) and text.startswith(answered) and prompt != answered:
        return (len(prompt), len(answered)), ""
    shown = prompt is not None and len(prompt) < len(text) and text.startswith(prompt)
    if shown and messages[index].get("tool_calls") and (stop := _first_stop(text, len(prompt), template)):
        return (len(prompt), stop), ""
    place, unclear = _place_of_content(index, text, example, template)
    if place is None:
        raise Reject(unclear, WAY_OUT)
    start, end = place
    if messages[index].get("tool_calls"):
        end = _first_stop(text, end, template) or end
    end = _with_stop(text, end, template)
    if shown and len(prompt) <= start:
        return (len(prompt), end), ""  # the model writes all that follows its prompt
    hidden = prompt[_alike(prompt, text) :].strip() if prompt else ""
    hidden = hidden if template.answer_header.rstrip().endswith(hidden) else ""
    return (start, end), f"the generation prompt opens with {hidden!r}, which answers do not show" if hidden else ""


def _places_of_contents(text: str, example: ChatExample, template: ChatTemplate) -> dict[int, Span]:
    """Return where each learned answer's content stands in `text`; empty if the text cannot be put together of them.

    The conversation is written twice more with other words in place of the answers; what stands around these is the
    template's. Two renderings for all answers instead of two for each.
    """
    answers = [index for index in example.learned if example.messages[index].get("content")]
    around: list[list[str]] = []
    for words in OTHER_ANSWERS:
        messages = [
            {**message, "content": words} if index in answers else message
            for index, message in enumerate(example.messages)
        ]
        written = render_or_none(template.render, messages, example.template_kwargs)
        if written is None:
            return {}
        around.append(written.split(words))
    if around[0] != around[1] or len(around[0]) != len(answers) + 1 or not text.startswith(around[0][0]):
        return {}
    places, reached = {}, len(around[0][0])
    for index, after in zip(answers, around[0][1:], strict=True):
        content = example.messages[index]["content"]
        found = next((c for c in (content, content.strip()) if text.startswith(c + after, reached)), None)
        if not found:
            return {}
        if not example.messages[index].get("tool_calls"):
            places[index] = (reached, reached + len(found))
        reached += len(found) + len(after)
    return places if reached == len(text) else {}


def _between_header_and_stop(
    text: str, place: Span | None, earlier: list[Span], template: ChatTemplate
) -> Span | None:
    """Return an answer that stands between a header of answers and an end of turn, None where one is missing."""
    if place is None or not template.answer_header:
        return None
    start, end = place
    header = text.rfind(template.answer_header, earlier[-1][1] if earlier else 0, start)
    begin = header + len(template.answer_header)
    stop = _with_stop(text, end, template)
    return (begin, stop) if header >= 0 and not text[begin:start].strip() and stop > end else None


def _place_of_content(index: int, text: str, example: ChatExample, template: ChatTemplate) -> tuple[Span | None, str]:
    """Return where the content of a message stands in `text`, found by writing other words in its place."""
    unclear = "the chat template does not show where an answer begins and ends"
    content, calls = example.messages[index].get("content"), example.messages[index].get("tool_calls")
    if not content and not calls:
        return None, unclear
    others = []
    for words in OTHER_ANSWERS:
        messages = [*example.messages]
        messages[index] = {**messages[index], "content": words}
        written = render_or_none(template.render, messages, example.template_kwargs)
        if written is None:
            return None, unclear
        others.append(written)
    start = _alike(text, *others)
    if not content:  # only calls, which begin where words would stand
        found = all(each.startswith(words, start) for words, each in zip(OTHER_ANSWERS, others, strict=True))
        return ((start, start), "") if found else (None, unclear)
    ending = _alike(*(each[start:][::-1] for each in (text, *others)))
    end = len(text) - ending
    shown = [each[start : len(each) - ending] for each in others]
    if not all(words in seen for words, seen in zip(OTHER_ANSWERS, shown, strict=True)) or end <= start:
        return None, unclear
    if not _holds(text[start:end], content, template):
        return None, "the chat template writes an answer's words differently"
    return (start, end), ""


def _holds(written: str, content: Any, template: ChatTemplate) -> bool:
    """Return whether a template wrote a message's content, or a part of it (without its thoughts), as it is."""
    if not isinstance(content, str) or not content.strip():
        return True
    parts = (written, content, content.rpartition("</think>")[2])
    shown, whole, said = (squeezed(template.special.sub("", part)) for part in parts)
    return bool(shown) and (shown in whole or whole[-40:] in shown or (bool(said) and said[-40:] in shown))


def _with_stop(text: str, end: int, template: ChatTemplate) -> int:
    """Return the end of the stop that follows an answer after blanks only, else `end`."""
    after = text[end:]
    blank = len(after) - len(after.lstrip())
    found = template.special.match(after, blank)
    return end + found.end() if found and found[0] in template.stops else end


def _first_stop(text: str, start: int, template: ChatTemplate) -> int:
    """Return the end of the first stop from `start` on, 0 if there is none."""
    found = template.special.finditer(text, start)
    return next((token.end() for token in found if token[0] in template.stops), 0)


def _one_stop(text: str, span: Span, template: ChatTemplate) -> Span:
    """Extend a span to a stop that stands behind it, or end it at the first of several; blanks after a stop go."""
    start, end = span
    found = template.special_tail.search(text[start:end])
    if found is None:
        return start, _with_stop(text, end, template)
    first = _first_stop(text[:end], start + found.start(), template)
    if first:
        return start, first
    stop = _with_stop(text, end, template)
    return start, stop if stop != end else start + len(text[start:end].rstrip())


def _alike(first: str, *others: str) -> int:
    """Return how many characters the texts begin with alike."""
    low, high = 0, min(map(len, (first, *others)))
    while low < high:
        middle = (low + high + 1) // 2
        if all(each.startswith(first[low:middle], low) for each in others):
            low = middle
        else:
            high = middle - 1
    return low


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
