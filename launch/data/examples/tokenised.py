"""Rows that are tokenised already: ids with labels or with a mask of what is learned, and the columns beside them."""

from launch.common.errors import Reject
from launch.common.messages import shortened
from launch.data.examples.kinds import TokenExample
from launch.data.examples.values import Fields
from smoothing.core.options import DEFAULT_IGNORE_INDEX

LEARNED_MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")  # 1: the token is learned
BESIDE = ("attention_mask", "position_ids", "seq_lengths", "token_type_ids")


def tokens(fields: Fields, where: str) -> TokenExample:
    """Token ids with their labels; ids with masks alone are given the labels that the masks mean.

    Raises Reject for a column that says what a row of one text cannot have: hidden tokens, positions of their own.
    """
    ids = _integers(fields, "input_ids")
    masks = [_zeros_and_ones(fields, name, len(ids)) for name in LEARNED_MASKS if fields.get(name) is not None]
    learned = [all(flags) for flags in zip(*masks, strict=True)]
    if fields.get("labels") is not None or not masks:
        labels = _integers(fields, "labels")
        if masks and learned != [label != DEFAULT_IGNORE_INDEX for label in labels]:
            raise Reject("labels and mask disagree about what is learned")
    else:
        labels = [token if learn else DEFAULT_IGNORE_INDEX for token, learn in zip(ids, learned, strict=True)]
    _check_beside(fields, ids)
    return TokenExample(ids, labels, where)


def ids_alone(fields: Fields, where: str) -> TokenExample:
    """Raises Reject: nothing says which of the tokens are learned."""
    raise Reject(
        f"input_ids without labels: add labels ({DEFAULT_IGNORE_INDEX} where nothing is learned) or a "
        "completion_mask; --columns input_ids=input_ids,labels=input_ids learns every token"
    )


def _check_beside(fields: Fields, ids: list[int]) -> None:
    if fields.get("attention_mask") is not None and 0 in _zeros_and_ones(fields, "attention_mask", len(ids)):
        raise Reject("attention_mask hides tokens: remove them (padding is added when rows are batched)")
    if fields.get("position_ids") is not None and _integers(fields, "position_ids") != list(range(len(ids))):
        raise Reject("position_ids do not count from 0: give each text of a packed row a row of its own")
    if fields.get("seq_lengths") is not None and _integers(fields, "seq_lengths") != [len(ids)]:
        raise Reject("seq_lengths says that the row is packed: give each of its texts a row of its own")
    if fields.get("token_type_ids") is not None and any(_integers(fields, "token_type_ids")):
        raise Reject("token_type_ids other than 0 are not supported")


def _integers(fields: Fields, name: str) -> list[int]:
    values = fields.get(name)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise Reject(f"{name} is not a list of integers")
    return values


def _zeros_and_ones(fields: Fields, name: str, length: int) -> list[int]:
    values = fields[name]
    if not isinstance(values, list) or not all(type(value) in (int, bool) and value in (0, 1) for value in values):
        raise Reject(f"{name} is not a list of 0 and 1")
    if len(values) != length:
        raise Reject(f"{name} and input_ids differ in length", shortened(f"{len(values)} and {length}"))
    return values
