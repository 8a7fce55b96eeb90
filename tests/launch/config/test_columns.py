"""`--columns` in each of its spellings, on the command line and in a recipe."""

import json

import pytest
import yaml

from launch.common.errors import UserError
from launch.config.columns import column_names
from launch.config.command_line import parse_options

MODEL = ("--model", "somewhere")
BOTH = {"prompt": "question", "completion": "answer"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--columns", "prompt=question,completion=answer"],
        ["--columns", "prompt=question", "completion=answer"],
        ["--columns", "prompt=question", "--columns", "completion=answer"],
        ["--columns=prompt=question, completion = answer,"],
        ["--columns", "prompt=question,prompt=question", "completion=answer"],
        ["--columns", json.dumps(BOTH)],
    ],
)
def test_spellings(argv):
    assert column_names(parse_options([*MODEL, *argv])[0].columns) == BOTH


def test_without_it_no_column_is_renamed():
    assert column_names(parse_options(MODEL)[0].columns) == {}


def test_a_column_may_have_an_equals_sign_and_two_names():
    assert column_names(["a=b=c", "d=b=c"]) == {"a": "b=c", "d": "b=c"}


@pytest.mark.parametrize(
    "value", [BOTH, ["prompt=question", "completion=answer"], "prompt=question,completion=answer"]
)
def test_a_recipe_may_hold_a_mapping(tmp_path, value):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": "somewhere", "columns": value}))
    options, _ = parse_options(["--recipe", str(path)])
    assert column_names(options.columns) == BOTH
    path.write_text(
        yaml.safe_dump({"model": "somewhere", "columns": options.columns})
    )  # as the run's own recipe has it
    assert column_names(parse_options(["--recipe", str(path)])[0].columns) == BOTH


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["question"], "expected name=column.*'question'"),
        (["prompt="], "expected name=column"),
        (["=question"], "expected name=column"),
        ([","], "expected name=column"),
        (["prompt=question,answer"], "expected name=column"),
        (["prompt=question", "prompt=instruction"], "prompt is to be question and instruction"),
        (['{"prompt": '], "not JSON"),
        (['{"prompt": ["question"]}'], "expected the name of a column"),
    ],
)
def test_what_is_no_pair_of_names_is_an_error(words, message):
    with pytest.raises(UserError, match=f"--columns.*{message}"):
        parse_options([*MODEL, "--columns", *words])
