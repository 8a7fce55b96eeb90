"""`--preview`: what it shows is what rows hold, and nothing that it shows can run."""

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from urllib.parse import quote

import pytest

from launch.common.errors import UserError
from launch.common.paths import PREVIEW_HTML, PREVIEW_JSONL
from launch.config.command_line import parse_options
from launch.data.encode import Encoder
from launch.data.encode_batch import BatchEncoder
from launch.data.examples.kinds import TextExample
from launch.data.preview.choose import MOST_DROPPED, MOST_SHORTENED, choose
from launch.data.preview.cut import cut_between
from launch.data.preview.decoded import decoded
from launch.data.preview.describe import describe_example
from launch.data.preview.pieces import Cut, Kind, Piece, Token, learned_texts, pieces_of
from launch.data.preview.shown import tokens_of
from launch.data.preview.visible import visible
from launch.data.preview.write import write_preview
from launch.data.read import sources_of
from launch.run.claim import claim
from tests.support.data import prepared
from tests.support.forked import ForkedRuns
from tests.support.processes import ROOT, environment
from tests.support.tokenizers import CHATML, byte_level, llama_2_like, without_offsets

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOKENIZERS = {
    "byte-level": lambda: byte_level("<|im_end|>"),
    "byte-level, another EOS, and BOS": lambda: byte_level("<|endoftext|>", "<s>"),
    "sentencepiece": lambda: llama_2_like(ZEPHYR),
    "without offsets": lambda: without_offsets(ZEPHYR),
}
OFFSETS = [name for name in TOKENIZERS if name != "without offsets"]
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(1)></div></details>&lt;&#60;\"' "
    "{{ 7*7 }} \x00\x07\x1b[31m\x7f\x85\xa0\xad\u200b\u200d\u202egnp.exe\u202c\u2066\u2069\u2028\ufeff\r\n\tend"
)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more) -> dict:
    return {"role": "assistant", "content": text} | more


def preview(
    folder: Path, rows: list, tokenizer, count=10, seed=0, max_length=64, out: Path | None = None, **options
) -> tuple[str, list]:
    """Write the rows as a file, prepare it, and return the page and the lines of its preview."""
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepared(str(source), tokenizer, max_length, **options)
    encoder = BatchEncoder(tokenizer, Encoder(tokenizer, max_length))
    page, lines = write_preview(out or folder / "out", data, encoder, sources_of([str(source)]), count, seed)
    return page.read_text("utf-8"), [json.loads(line) for line in lines.read_text("utf-8").split("\n")[:-1]]


def stripped(html: str) -> str:
    """The text of a page or a part of it."""
    return "".join(part for tag, part in parsed(html) if tag is None)


def parsed(html: str) -> list[tuple[str | None, str]]:
    """Tags with their attributes, and texts, as a browser reads them."""
    found: list[tuple[str | None, str]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            found.append((tag, " ".join(f"{name}={quote(value or '')}" for name, value in attrs)))

        def handle_data(self, data):
            found.append((None, data))

    Parser().feed(html)
    return found


def section(html: str, name: str) -> str:
    return re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)[0]


def dropped_texts(html: str) -> list[str]:
    return [stripped(part) for part in re.findall(r"<del>(.*?)</del>", html, re.DOTALL)]


# What is learned, as texts


@pytest.mark.parametrize("name", TOKENIZERS)
def test_lines_hold_the_rows_and_what_is_learned_of_them(tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    eos = tokenizer.eos_token
    stop = "<|im_end|>" if name in ("byte-level", "byte-level, another EOS, and BOS") else eos
    rows = [
        {"prompt": "hello two", "completion": " yes, three."},
        {"text": "one two"},
        {"messages": [user("hello"), assistant("yes no"), user("one"), assistant(" two"), user("yes")]},
        {"messages": [user("hello"), assistant("no", weight=0), user("one"), assistant("two")]},
        {"input_ids": [5, 9, 30, 31, 32], "labels": [-100, 9, -100, 31, 32]},
    ]
    _, lines = preview(tmp_path, rows, tokenizer)
    stored = prepared(str(tmp_path / "rows.jsonl"), tokenizer, 64).train
    for key in ("where", "input_ids", "labels"):
        assert [line[key] for line in lines] == list(stored[key])
    blank = "" if tokenizer.is_fast else " "  # tokens alone do not tell a line break from a blank
    assert [line["learned"] for line in lines[:4]] == [
        [f" yes, three.{eos}"],
        [f"one two{eos}"],
        [f"{blank}yes no{stop}", f" two{stop}"],
        [f"{blank}two{stop}"],
    ]
    ids = lines[4]["input_ids"]
    whole = tokenizer.decode(ids)
    assert len(lines[4]["learned"]) == 2 and all(text in whole for text in lines[4]["learned"])


@pytest.mark.parametrize("name", OFFSETS)
def test_blanks_of_the_text_are_those_of_the_data(tmp_path, name):
    answers = ["  yes", "yes  no ", "\tyes\n\n  no", "yes\n", "\u3000yes", "héé 😀 no", "می‌خواهم", "早上好", HOSTILE]
    rows = [{"messages": [user("one"), assistant(answer)]} for answer in answers]
    rows += [{"prompt": "one\n", "completion": answer} for answer in answers]
    tokenizer = TOKENIZERS[name]()
    _, lines = preview(tmp_path, rows, tokenizer, 99, max_length=999)
    stop = tokenizer.eos_token if name == "sentencepiece" else "<|im_end|>"
    assert [line["learned"] for line in lines] == [
        *([answer + stop] for answer in answers),
        *([answer + tokenizer.eos_token] for answer in answers),
    ]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_alone_are_decoded_in_their_context(name):
    tokenizer = TOKENIZERS[name]()
    texts = ["hello  yes, no", "one two three.", " two", "<|user|>\nhello", "héé😀 two"]
    draws = random.Random(0).choices(range(5, 300), k=40)  # with bytes that are no characters
    for ids in [*(tokenizer(text)["input_ids"] for text in texts), draws]:
        text, spans = decoded(ids, tokenizer)
        if ids is not draws:
            assert text == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert len(spans) == len(ids) and spans[0][0] == 0 and spans[-1][1] == len(text)
        assert all(after in (before, (before[1], after[1])) for before, after in pairwise(spans))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_row_in_the_log_has_the_blanks_of_its_text(name):
    tokenizer = TOKENIZERS[name]()
    row = Encoder(tokenizer, 64)(TextExample("hello one,", " two three", "f:1"))
    lines = describe_example({**row, "where": "f:1"}, tokenizer).splitlines()
    learned = sum(label != -100 for label in row["labels"])
    assert lines[0] == f"f:1: {len(row['input_ids'])} tokens, {learned} of them learned"
    assert lines[-1] == f"  learned | {' two three' + tokenizer.eos_token!r}"
    assert len(lines) == 3 and lines[1].startswith("  read    | ") and lines[1].endswith("hello one,'")


# Pieces


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("text", ["hello  yes", "héé😀\n two ", "<|im_start|>user\nhi<|im_end|>\n", " ", "é" * 9])
def test_pieces_are_the_text_and_every_token_once(name, text):
    tokenizer = TOKENIZERS[name]()
    row = Encoder(tokenizer, 64)(TextExample(text, "yes", "f:1"))
    tokens = tokens_of(row["input_ids"], tokenizer)
    pieces = pieces_of(tokens, row["labels"], row["text"], row["spans"])
    assert "".join(piece.text for piece in pieces) == row["text"]
    assert [token for piece in pieces for token in piece.tokens] == tokens
    for piece in pieces:
        kinds = {Kind.READ if row["labels"][token.position] == -100 else Kind.LEARNED for token in piece.tokens}
        assert kinds == {piece.kind}


def test_tokens_of_one_character_are_one_piece():
    tokenizer = byte_level("<|im_end|>")
    row = Encoder(tokenizer, 64)(TextExample("a😀", "b", "f:1"))
    tokens = tokens_of(row["input_ids"], tokenizer)
    for text, spans in [(row["text"], row["spans"]), decoded(row["input_ids"], tokenizer)]:
        pieces = pieces_of(tokens, row["labels"], text, spans)
        assert [(piece.shown, len(piece.tokens)) for piece in pieces] == [
            ("a", 1),
            ("😀", 4),
            ("b", 1),
            ("<|im_end|>", 1),
        ]


def test_what_no_token_stands_for_is_dropped():
    tokens = [Token(0, 7, "b"), Token(1, 8, "d"), Token(2, 2, "</s>", special=True)]
    pieces = pieces_of(tokens, [-100, 8, 2], "ab cde", [(1, 2), (4, 5), (5, 5)])
    assert [(piece.kind, piece.text) for piece in pieces] == [
        ("dropped", "a"), ("read", "b"), ("dropped", " c"), ("learned", "d"), ("learned", ""), ("dropped", "e"),
    ]  # fmt: skip
    assert learned_texts(pieces) == ["d</s>"]


def test_turns_that_were_cut_stand_where_they_were():
    tokens = [Token(0, 7, "ab"), Token(1, 8, "cd")]
    for place, texts in [(0, ["X", "ab", "cd"]), (2, ["ab", "X", "cd"]), (4, ["ab", "cd", "X"])]:
        pieces = pieces_of(tokens, [-100, 8], "abcd", [(0, 2), (2, 4)], Cut(place, "X"))
        assert [piece.text for piece in pieces] == texts
        assert [piece.kind for piece in pieces if piece.text == "X"] == [Kind.DROPPED]


def test_learned_texts_keep_blanks_between_their_tokens():
    """A tokenizer that splits at blanks has no tokens for them."""
    learned, read, gap = (
        Piece(Kind.LEARNED, "a", (Token(0, 5, "a"),)),
        Piece(Kind.READ, "b", (Token(0, 6, "b"),)),
        Piece(Kind.DROPPED, " "),
    )
    assert learned_texts([gap, learned, gap, learned, gap, read, gap, learned, gap]) == ["a a", "a"]
    assert learned_texts([read, gap]) == []


@pytest.mark.parametrize(
    ("whole", "short", "cut"),
    [
        ("<a>S<e>\n<a>1<e>\n<a>2<e>\n", "<a>S<e>\n<a>2<e>\n", (8, "<a>1<e>\n")),
        ("<a>1<e>\n<a>2<e>\n", "<a>2<e>\n", (0, "<a>1<e>\n")),
        ("<a>S<e><a>1<e><a>1<e>", "<a>S<e><a>1<e>", (7, "<a>1<e>")),
        ("Q: 1\nA: 2\nQ: 3\nA: 4\n", "Q: 3\nA: 4\n", (3, "1\nA: 2\nQ: ")),
        ("<a>S 1<e><a>2<e>", "<a>S 2<e>", (5, "1<e><a>")),
        ("one two", "one 2", (4, "two")),  # written differently
        ("same", "same", None),
    ],
)
def test_what_was_cut_is_found_between_turns(whole, short, cut):
    found = cut_between(whole, short, re.compile("<a>|<e>"))
    assert (found and (found.place, found.text)) == cut
    if found and len(short) + len(found.text) == len(whole):
        assert short[: found.place] + found.text + short[found.place :] == whole


# Which rows


def many(count: int) -> list[dict]:
    return [{"prompt": f"{n} ", "completion": "1" * (1 + n % 7)} for n in range(count)]


def test_rows_are_drawn_from_all_by_seed(tmp_path):
    tokenizer = byte_level("<|im_end|>")
    first, again, other = (preview(tmp_path, many(200), tokenizer, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [line["where"] for line in first[1]] != [line["where"] for line in other[1]]
    numbers = [int(line["where"].rpartition(":")[2]) for line in first[1][:10]]
    assert len(set(numbers)) == 10 and numbers == sorted(numbers) and numbers[-1] > 100
    _, lines = preview(tmp_path, [*many(100), {"prompt": "0" * 40, "completion": "1"}, *many(99)], tokenizer, 5)
    assert len(lines) == 6 and lines[5]["where"].endswith(":101")  # the longest
    assert len(preview(tmp_path, many(30), tokenizer, count=99, fraction=0)[1]) == 30


def test_shortened_and_dropped_rows_are_chosen_by_reason(tmp_path):
    rows = [{"prompt": "0" * 80, "completion": "1"}] * 5 + [{"prompt": "0", "completion": ""}] * 9
    rows += [{"prompt": "0", "completion": "1" * 80}, {"other": 1}, *many(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = prepared(str(tmp_path / "rows.jsonl"), byte_level("<|im_end|>"), 64, fraction=0)
    chosen = choose(data, 5, 0)
    reasons = [rejected.reason for rejected in chosen.dropped]
    assert reasons[:3] == ["empty completion", "completion longer than max_length 64", "unrecognised fields"]
    assert len(reasons) == MOST_DROPPED and set(reasons[3:]) == {"empty completion"}
    assert len({rejected.where for rejected in chosen.dropped}) == MOST_DROPPED
    assert chosen.shortened == [0, 1, 2] and len(chosen.shortened) == MOST_SHORTENED


# The page


def test_what_was_dropped_is_shown_with_its_reason(tmp_path):
    turns = [user("one"), assistant("two"), user("yes"), assistant("no")]
    rows = [
        {"messages": [{"role": "system", "content": "hello"}, *turns * 3]},
        {"messages": [user("one"), assistant("too long " * 30)]},
        {"messages": [user("no answer")]},
        {"prompt": "<b>&", "completion": ""},
    ]
    page, lines = preview(tmp_path, rows, byte_level("<|im_end|>"), max_length=60)
    assert [line["where"] for line in lines] == [f"{tmp_path}/rows.jsonl:1"]
    assert lines[0]["learned"][-1] == "no<|im_end|>"
    drawn, dropped = section(page, "drawn"), section(page, "dropped")
    (cut, end) = dropped_texts(drawn)
    assert cut.startswith("<|im_start|>user\none<|im_end|>\n") and cut.endswith("<|im_end|>") and end == ""
    assert "tokens dropped to fit --max_length 60" in drawn
    texts = dropped_texts(dropped)
    assert texts[0].startswith("<|im_start|>")  # as it would be read, not as its record
    assert [text.count("too long") for text in texts] == [30, 0, 0]
    assert "no answer" in texts[1] and json.loads(texts[2]) == {"prompt": "<b>&", "completion": ""}
    for number, reason in [(2, "longer than max_length 60"), (3, "no assistant message"), (4, "empty completion")]:
        assert re.search(rf"rows\.jsonl:{number}<.*?{reason}", dropped, re.DOTALL)


@pytest.mark.parametrize("place", ["prompt", "completion", "where", "dropped"])
def test_nothing_in_the_data_runs_or_turns_the_page(tmp_path, place):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c"}]
    folder = tmp_path
    if place == "where":
        folder = tmp_path / "<img src=x onerror=alert(1)>\u202e'\"&"
        folder.mkdir()
    elif place == "dropped":
        rows[1] = {HOSTILE: 1}
    else:
        rows[0][place] = HOSTILE
    page, _ = preview(folder, rows, byte_level("<|im_end|>"), max_length=999)
    plain, _ = preview(tmp_path, [{"prompt": "a", "completion": "b"}, {"prompt": "c"}], byte_level("<|im_end|>"))
    assert {tag for tag, _ in parsed(page)} <= {tag for tag, _ in parsed(plain)} | {"b", "u"}
    names = {name for tag, attributes in parsed(page) if tag for name in re.findall(r"(\S+)=", attributes)}
    assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in names)
    links = [attributes for tag, attributes in parsed(page) if tag == "a"]
    assert links and all(re.fullmatch(r"href=%23\w+", link) for link in links)
    unseen = {character for character in page if character < " " or "\x7f" <= character <= "\x9f"}
    assert unseen <= {"\n", "\t"} and not set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(page)
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("a b", "a<u> </u>b"),
        ("a\n", "a<u class=n></u>\n"),
        ("\t", "<u class=t>\t</u>"),
        ("<a href='x'>&amp;", "&lt;a<u> </u>href=&#39;x&#39;&gt;&amp;amp;"),
        ("\u202e", '<b class=c title="U+202E">RLO</b>'),
        ("\x1b", '<b class=c title="U+001B">U+001B</b>'),
        ("\xa0", '<b class=c title="U+00A0">NBSP</b>'),
        ("\ud800", r"\ud800"),
        ("شלّ早👩‍👧🇨🇭é", "شלّ早👩‍👧🇨🇭é"),
    ],
)
def test_texts_in_html(text, html):
    assert visible(text) == html


def test_texts_in_html_read_as_they_are():
    draw = random.Random(0)
    alphabet = "<>&\"'ab \n\té早ש;#/u=" + "😀"
    for _ in range(300):
        text = "".join(draw.choices(alphabet, k=draw.randint(0, 12)))
        assert stripped(str(visible(text))) == text


def test_what_holds_for_all_rows_is_said_once(tmp_path):
    rows = [{"messages": [user("one"), assistant("two")]}] * 3
    page, _ = preview(tmp_path, rows, byte_level("<|endoftext|>"))
    assert page.count("the answer ends with") == 1 < page.index("the answer ends with") < page.index("<main>")
    page, _ = preview(tmp_path, [*rows, {"prompt": "one", "completion": "two"}], byte_level("<|endoftext|>"))
    assert page.count("the answer ends with") == 3 and page.index("<main>") < page.index("the answer ends with")


def test_a_page_tells_kinds_apart_without_colours(tmp_path):
    rows = [{"messages": [user("one"), assistant("two"), user("yes")]}]
    page, _ = preview(tmp_path, rows, byte_level("<|im_end|>"))
    drawn = section(page, "drawn")
    (learned,) = re.findall(r"<mark>(.*?)</mark>", drawn, re.DOTALL)
    assert stripped(learned) == "two<|im_end|>"
    assert dropped_texts(drawn) == ["\n<|im_start|>user\nyes<|im_end|>"]
    (chip,) = re.findall(r'<i class="s" title="id (\d+) at \d+">', learned)
    assert int(chip) == byte_level("<|im_end|>").convert_tokens_to_ids("<|im_end|>")


# Starts


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Data, and a model of which only the tokenizer is there."""
    folder = tmp_path_factory.mktemp("preview")
    byte_level("<|im_end|>").save_pretrained(folder / "model")
    rows = [{"question": f"one {n}", "answer": "two " * (1 + n % 5)} for n in range(40)] + [{"question": "one"}] * 20
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_start_loads_no_model_and_claims_no_run(folder):
    flags = ["--preview", "3", "--model", str(folder / "model"), "--data", "train.jsonl", "--tp", "2"]
    command = [sys.executable, str(ROOT / "launch/sft.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("preview: runs/preview/preview.html and preview.jsonl")
    assert "a run would stop: 20 of 60 rows" in done.stdout  # --max_dropped 0.2
    written = folder / "runs" / "preview"
    assert [path.name for path in (folder / "runs").iterdir()] == ["preview"]
    assert sorted(path.name for path in written.iterdir()) == [PREVIEW_HTML, PREVIEW_JSONL]
    assert len((written / PREVIEW_JSONL).read_text().splitlines()) in (3, 4)

    (folder / "begun").mkdir()
    (folder / "begun/started.txt").write_text("2020-02-29\n")
    (folder / "dated.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    dated = [*flags, "--output_dir", "begun", "--chat_template", "dated.jinja"]
    log = folder / "ranks.log"
    runs = ForkedRuns(2, [[*flags, "--output_dir", "named"], dated], log, cwd=folder)
    try:
        assert runs.wait(120) == 0, log.read_text()
    finally:
        runs.end()
    assert log.read_text().count("preview: ") == 2
    assert "2020-02-29" in stripped((folder / "begun" / PREVIEW_HTML).read_text())
    for name in (PREVIEW_HTML, PREVIEW_JSONL):
        assert (folder / "named" / name).read_bytes() == (written / name).read_bytes()
    assert claim(str(folder / "named"), {}) == (folder / "named", False)


def test_a_folder_that_cannot_be_written_to_is_said(tmp_path):
    (tmp_path / "out").write_text("")
    rows = [{"prompt": "a", "completion": "b"}]
    with pytest.raises(UserError, match=r"no preview can be written into .*--output_dir"):
        preview(tmp_path, rows, byte_level("<|im_end|>"))
    with pytest.raises(UserError, match=r"no preview can be written into .*--output_dir"):
        preview(tmp_path, rows, byte_level("<|im_end|>"), out=Path("~nobody-of-this-name"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--preview", "-1"], "at least 0"), (["--preview", "3", "--sanity"], "give one")],
)
def test_flags_that_contradict(flags, message):
    with pytest.raises(UserError, match=message):
        parse_options(flags)
