"""Readers: what is accepted, how it is tokenized, and what is refused with which words."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_files import CHAT_TEMPLATE, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from u2a_fast.data import BadRowsError, read_negatives, read_positives, read_preferences, read_rewards

SHARED = Path(__file__).resolve().parents[2] / "shared"
EOS, BOS = 1, 2


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    chat = tiny_tokenizer()
    chat.chat_template = CHAT_TEMPLATE
    return chat


def write_jsonl(path: Path, rows) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answer_text(tokenizer, row) -> str:
    return tokenizer.decode([t for t in row["labels"] if t != -100])


def prompt_text(tokenizer, row) -> str:
    return tokenizer.decode([t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("prompt", "response"),
    [("prompt", "response"), ("prompt", "completion"), ("instruction", "output"), ("question", "answer"),
     ("prompt", "rejected")],
)  # fmt: skip
def test_plain_text_columns(tmp_path, tokenizer, prompt, response):
    rows = [{"id": f"n{i}", prompt: f"ask {i}", response: f"say {i}", "kind": "x"} for i in range(3)]
    negatives = read_negatives(write_jsonl(tmp_path / "n.jsonl", rows), tokenizer)
    assert len(negatives) == 3
    got = list(negatives)
    assert [row["id"] for row in got] == ["n0", "n1", "n2"]
    assert got[1]["prompt"] == "ask 1" and got[1]["response"] == "say 1"
    assert prompt_text(tokenizer, got[1]) == "ask 1" and answer_text(tokenizer, got[1]) == " say 1<eos>"
    assert list(negatives) == got, "a second pass gives the same rows"


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved", "saved_dict", "list", "dataset"])
def test_every_form_gives_the_same_rows(tmp_path, tokenizer, form):
    rows = [{"prompt": f"ask {i}", "response": f"say {i}"} for i in range(600)]
    source, split = rows, None
    if form == "jsonl":
        source = write_jsonl(tmp_path / "n.jsonl", rows)
    elif form == "parquet":
        source = tmp_path / "n.parquet"
        pq.write_table(pa.Table.from_pylist(rows), source)
    elif form != "list":
        source = datasets.Dataset.from_list(rows)
    if form == "saved":
        source.save_to_disk(str(tmp_path / "saved"))
        source = tmp_path / "saved"
    elif form == "saved_dict":
        datasets.DatasetDict(train=source, test=source).save_to_disk(str(tmp_path / "saved"))
        source, split = str(tmp_path / "saved"), "test"
    expected = [row | {"line": i} for i, row in enumerate(read_negatives(rows, tokenizer), start=1)]
    got = [row | {"line": i} for i, row in enumerate(read_negatives(source, tokenizer, split=split), start=1)]
    assert got == expected and len(got) == 600
    assert got[0]["id"] == "row-1" and got[-1]["id"] == "row-600"


def test_hub_name_is_streamed(monkeypatch, tokenizer):
    rows = [{"prompt": "a", "response": str(i)} for i in range(4)]
    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        return datasets.IterableDataset.from_generator(lambda: iter(rows))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    negatives = read_negatives("owner/name", tokenizer, split="train", streaming=True)
    assert calls == [("owner/name", "train", True)]
    assert [row["response"] for row in negatives] == ["0", "1", "2", "3"]
    with pytest.raises(TypeError, match="streaming source has no length"):
        len(negatives)


def test_streaming_fails_where_the_bad_row_is(tmp_path, tokenizer):
    rows = [{"prompt": "a", "response": "b"}] * 300 + [{"prompt": "a", "response": None}]
    stream = iter(read_negatives(write_jsonl(tmp_path / "n.jsonl", rows), tokenizer, streaming=True))
    assert sum(1 for _ in zip(range(300), stream, strict=False)) == 300
    with pytest.raises(BadRowsError, match=r"n\.jsonl:301: response is null"):
        next(stream)


def test_explicit_columns(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "n.jsonl", [{"q": "ask", "a": "say", "response": "no", "uid": 7}])
    (row,) = read_negatives(path, tokenizer, columns={"prompt": "q", "response": "a", "id": "uid"})
    assert (row["id"], row["prompt"], row["response"]) == ("7", "ask", "say")
    with pytest.raises(ValueError, match=r"columns names \['z'\]"):
        read_negatives(path, tokenizer, columns={"prompt": "q", "response": "z"})
    with pytest.raises(ValueError, match=r"expected columns to map \['prompt', 'response'\]"):
        read_negatives(path, tokenizer, columns={"prompt": "q", "answer": "a"})


def test_unknown_and_ambiguous_columns_are_named(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "n.jsonl", [{"text": "x", "label": 1}])
    with pytest.raises(
        ValueError, match=r"columns \['text', 'label'\].*prompt/response.*instruction/output.*none fits"
    ):
        read_negatives(path, tokenizer)
    path = write_jsonl(tmp_path / "m.jsonl", [{"prompt": "x", "response": "y", "completion": "z"}])
    with pytest.raises(ValueError, match=r"several fit \(prompt/response, prompt/completion\)"):
        read_negatives(path, tokenizer)


def test_a_pair_of_equal_answers_is_a_bad_row(tokenizer):
    rows = [{"prompt": "q", "chosen": "yes", "rejected": answer} for answer in ("no", "yes")]
    with pytest.raises(BadRowsError, match="rows:2: chosen and rejected are the same"):
        read_preferences(rows, tokenizer)
    assert len(read_preferences(rows, tokenizer, on_bad_row="skip")) == 1


def test_damaged_parquet_is_named(tmp_path, tokenizer):
    path = tmp_path / "n.parquet"
    pq.write_table(pa.table({"prompt": [f"q {i}" for i in range(99)], "response": ["no"] * 99}), path)
    data = path.read_bytes()
    path.write_bytes(data[:40] + b"\xff" * 60 + data[100:])
    with pytest.raises(ValueError, match="expected a Parquet file, got .*n.parquet"):
        read_negatives(path, tokenizer)


def test_preferences_plain(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "ask", "chosen": "good", "rejected": "bad answer"}])
    (row,) = read_preferences(path, tokenizer)
    assert (row["chosen_text"], row["rejected_text"]) == ("good", "bad answer")
    assert answer_text(tokenizer, row["chosen"]) == " good<eos>"
    assert answer_text(tokenizer, row["rejected"]) == " bad answer<eos>"


@pytest.mark.parametrize("implicit", [False, True])
def test_preferences_conversational(tmp_path, chat_tokenizer, implicit):
    prompt, good, bad = [user("hi"), assistant("yes?"), user("how")], [assistant("so")], [assistant("no")]
    row = {"prompt": prompt, "chosen": good, "rejected": bad}
    if implicit:
        row = {"chosen": prompt + good, "rejected": prompt + bad}
    (got,) = read_preferences(write_jsonl(tmp_path / "p.jsonl", [row]), chat_tokenizer)
    assert (
        prompt_text(chat_tokenizer, got["chosen"])
        == "<|user|>hi<eos><|assistant|>yes?<eos><|user|>how<eos><|assistant|>"
    )
    assert answer_text(chat_tokenizer, got["chosen"]) == "so<eos>"
    assert answer_text(chat_tokenizer, got["rejected"]) == "no<eos>"


def test_conversational_negatives_in_parquet(tmp_path, chat_tokenizer):
    rows = [{"messages": [user("hi") | {"name": "x"}, assistant("no")]}, {"messages": [user("yo"), assistant("so")]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "n.parquet")
    got = list(read_negatives(tmp_path / "n.parquet", chat_tokenizer))
    assert [row["response"] for row in got] == ["no", "so"]
    assert got[1]["prompt"] == [user("yo")]
    assert answer_text(chat_tokenizer, got[1]) == "so<eos>"


def test_template_faults(tmp_path, tokenizer, chat_tokenizer):
    path = write_jsonl(tmp_path / "n.jsonl", [{"prompt": [user("a")], "completion": [assistant("b")]}])
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        read_negatives(path, tokenizer)
    unlike = tiny_tokenizer()
    unlike.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(BadRowsError, match="not the beginning of the whole rendering"):
        read_negatives(path, unlike)
    unlike.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRowsError, match="chat template: roles must alternate"):
        read_negatives(path, unlike)


def test_rewards_and_positives(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "response": "b", "reward": 1}])
    assert read_rewards(path, tokenizer)[0]["reward"] == 1.0
    assert answer_text(tokenizer, read_positives(path, tokenizer)[0]["example"]) == " b<eos>"
    bad = [{"prompt": "a", "response": "b", "reward": r} for r in (float("nan"), float("inf"), None, "1", True)]
    with pytest.raises(BadRowsError) as error:
        read_rewards(write_jsonl(tmp_path / "bad.jsonl", bad), tokenizer)
    reasons = [row.reason for row in error.value.rows]
    assert reasons == [
        "expected reward to be finite, got nan",
        "expected reward to be finite, got inf",
        "expected reward to be a number, got null",
        "expected reward to be a number, got str",
        "expected reward to be a number, got bool",
    ]


BAD_ROWS = [
    ("{not json\n", "invalid JSON: Expecting property name enclosed in double quotes at column 2"),
    ("[1, 2]\n", "expected a JSON object, got list"),
    ({"id": "c", "prompt": "a"}, "missing column 'response'"),
    ({"id": "d", "prompt": None, "response": "b"}, "prompt is null"),
    ({"id": "e", "prompt": "a", "response": ""}, "response is empty"),
    ({"id": "f", "prompt": "a", "response": " \n"}, "response is empty"),
    ({"id": "g", "prompt": "", "response": "b"}, "prompt is empty"),
    ({"id": "h", "prompt": 3, "response": "b"}, "expected prompt to be a string or a list of messages, got int"),
    ({"id": "i", "prompt": "a", "response": "b" * 200}, "the answer has 202 tokens and does not fit in max_length 64"),
    ({"id": "ok", "prompt": "a", "response": "b"}, "duplicate id 'ok'"),
    ({"prompt": "a", "response": "b"}, "expected id to be a string or an integer, got None"),
    ({"id": "l", "prompt": [], "response": "b"}, "prompt is empty"),
    (
        {"id": "m", "prompt": [{"text": "x"}], "response": "b"},
        "expected prompt[0] to be a message with role and content",
    ),
    ({"id": "n", "prompt": "a", "response": [assistant("b")]}, "the prompt is a string and an answer is a list"),
    ({"id": "o", "prompt": "\ud800", "response": "b"}, "prompt holds a lone surrogate"),
]


def test_bad_rows_are_reported_by_line(tmp_path, tokenizer):
    good = {"id": "ok", "prompt": "a", "response": "b"}
    path = write_jsonl(tmp_path / "n.jsonl", [good, "\n", *(row for row, _ in BAD_ROWS)])
    with pytest.raises(BadRowsError) as error:
        read_negatives(path, tokenizer, max_length=64)
    assert error.value.total == len(BAD_ROWS)
    for line, (row, (_, reason)) in enumerate(zip(error.value.rows, BAD_ROWS, strict=True), start=3):
        assert (row.file, row.line) == (str(path), line)
        assert row.reason.startswith(reason)
        assert f"{path}:{line}: {row.reason}" in str(error.value)
    negatives = read_negatives(path, tokenizer, max_length=64, on_bad_row="skip")
    assert [row["id"] for row in negatives] == ["ok"]
    assert [bad.line for bad in negatives.report.bad] == list(range(3, 3 + len(BAD_ROWS)))


def test_many_bad_rows_show_twenty_and_count_all(tmp_path, tokenizer):
    rows = [{"prompt": "a", "response": "b"}] + [{"prompt": "a", "response": ""}] * 700
    with pytest.raises(BadRowsError, match=r"700 bad rows[\s\S]*:21: response is empty\n  \.\.\. and 680 more$"):
        read_negatives(write_jsonl(tmp_path / "n.jsonl", rows), tokenizer)


def test_not_utf8_and_byte_order_mark(tmp_path, tokenizer):
    good = json.dumps({"prompt": "a", "response": "b"}).encode()
    path = tmp_path / "n.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n" + good.replace(b"b", b"\xff") + b"\n")
    negatives = read_negatives(path, tokenizer, on_bad_row="skip")
    assert len(negatives) == 1
    at = good.index(b"b")
    assert str(negatives.report.bad[0]).endswith(f"n.jsonl:2: not UTF-8: invalid start byte at byte {at}")


def test_wrong_sources(tmp_path, tokenizer):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "array.json").write_text('[{"prompt": "a", "response": "b"}]')
    (tmp_path / "n.csv").write_text("prompt,response\n")
    (tmp_path / "n.parquet").write_bytes(b"no parquet")
    (tmp_path / "folder").mkdir()
    skipped = write_jsonl(tmp_path / "skipped.jsonl", [{"prompt": "a", "response": ""}])
    for source, error, words in [
        (tmp_path / "absent.jsonl", FileNotFoundError, "no such file or folder"),
        ("absent", FileNotFoundError, "no such file or folder"),
        (tmp_path / "empty.jsonl", ValueError, "expected rows, got the empty source"),
        (tmp_path / "array.json", ValueError, "got a JSON array"),
        (tmp_path / "n.csv", ValueError, "expected a file ending in .jsonl"),
        (tmp_path / "n.parquet", ValueError, "expected a Parquet file"),
        (tmp_path / "folder", ValueError, "written by datasets' save_to_disk"),
        (iter([]), TypeError, "re-iterable collection of rows, got list_iterator"),
    ]:
        with pytest.raises(error, match=words):
            read_negatives(source, tokenizer)
    with pytest.raises(ValueError, match=r"no usable row in .*skipped\.jsonl \(1 bad rows\)"):
        read_negatives(skipped, tokenizer, on_bad_row="skip")
    with pytest.raises(ValueError, match="split 'train' has no meaning for the file"):
        read_negatives(skipped, tokenizer, split="train")
    part = datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])
    datasets.DatasetDict(a=part, b=part).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"expected split to be one of \['a', 'b'\]"):
        read_negatives(tmp_path / "saved", tokenizer)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [("ask", "say", " say<eos>"), ("ask ", "say", "say<eos>"), ("ask\n", "say", "say<eos>"),
     ("ask", " say", " say<eos>"), ("ask", "say<eos>", " say<eos>")],
)  # fmt: skip
def test_joining_space_and_one_eos(tokenizer, prompt, response, expected):
    (row,) = read_negatives([{"prompt": prompt, "response": response}], tokenizer)
    assert answer_text(tokenizer, row) == expected
    assert row["labels"].count(EOS) == 1


@pytest.mark.parametrize(
    ("options", "add_bos", "prompt", "first"),
    [
        ({}, None, "ask", ord("a")),
        ({}, True, "ask", EOS),
        ({"bos": "<bos>"}, None, "ask", ord("a")),
        ({"bos": "<bos>"}, True, "ask", BOS),
        ({"bos": "<bos>", "adds_bos": True}, None, "ask", BOS),
        ({"bos": "<bos>", "adds_bos": True}, False, "ask", ord("a")),
        ({"bos": "<bos>", "adds_bos": True}, None, "<bos>ask", BOS),
        ({"bos": "<bos>", "adds_bos": True}, False, "<bos>ask", ord("a")),
    ],
)
def test_bos(options, add_bos, prompt, first):
    tokenizer = tiny_tokenizer(**options)
    (row,) = read_negatives([{"prompt": prompt, "response": "say"}], tokenizer, add_bos=add_bos)
    expected = tokenizer.convert_tokens_to_ids("a") if first == ord("a") else first
    assert row["input_ids"][0] == expected
    assert row["input_ids"].count(BOS) <= 1
    assert answer_text(tokenizer, row) == " say<eos>"


def test_bos_of_a_template_is_neither_doubled_nor_kept_against_the_users_word():
    tokenizer = tiny_tokenizer(bos="<bos>", adds_bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    rows = [{"prompt": [user("a")], "response": "b"}]
    for add_bos, count in [(None, 1), (True, 1), (False, 0)]:
        (row,) = read_negatives(rows, tokenizer, add_bos=add_bos)
        assert row["input_ids"].count(BOS) == count
    (row,) = read_negatives([{"prompt": [user("a" * 90)], "response": "b"}], tokenizer, max_length=20)
    assert row["input_ids"][0] == BOS and len(row["input_ids"]) == 20


@pytest.mark.parametrize("pad", [None, "<eos>", "<pad>"])
def test_labels_do_not_depend_on_the_pad_token(pad):
    tokenizer = tiny_tokenizer(pad=pad)
    (row,) = read_negatives([{"prompt": "ask", "response": "say"}], tokenizer)
    assert row["labels"][-1] == EOS and answer_text(tokenizer, row) == " say<eos>"


def test_prompt_is_cut_from_the_left_and_the_answer_never():
    tokenizer = tiny_tokenizer(bos="<bos>", adds_bos=True)
    rows = [{"prompt": "0123456789", "response": "abc"}, {"prompt": "0", "response": "abc"}]
    negatives = read_negatives(rows, tokenizer, max_length=9)
    first, second = negatives
    assert prompt_text(tokenizer, first) == "<bos>789" and answer_text(tokenizer, first) == " abc<eos>"
    assert prompt_text(tokenizer, second) == "<bos>0"
    assert negatives.report.truncated == 1
    (alone, _) = read_negatives(rows, tokenizer, max_length=6)
    assert prompt_text(tokenizer, alone) == "<bos>"
    with pytest.raises(BadRowsError, match="the answer has 5 tokens and does not fit in max_length 5"):
        read_negatives(rows, tokenizer, max_length=5)
    with pytest.raises(BadRowsError, match="does not fit in max_length 5"):
        read_negatives(rows, tokenizer, max_length=5, add_bos=False)  # nothing before it would predict its first token


def test_both_answers_of_a_pair_see_the_same_prompt(tokenizer):
    rows = [{"prompt": "0123456789", "chosen": "a", "rejected": "abcdef"}]
    (row,) = read_preferences(rows, tokenizer, max_length=12)
    assert prompt_text(tokenizer, row["chosen"]) == prompt_text(tokenizer, row["rejected"]) == "6789"


def test_tokenizer_limit_is_the_default():
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 8
    (row,) = read_negatives([{"prompt": "0123456789", "response": "abc"}], tokenizer)
    assert len(row["input_ids"]) == 8


def test_tokenizer_that_prepends_a_space_is_not_given_another():
    core = Tokenizer(
        models.WordLevel({"\u2581ask": 0, "\u2581say": 1, "\u2581": 2, "\u2581a": 3, "?": 4}, unk_token="?")
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    (row,) = read_negatives([{"prompt": "ask", "response": "say"}], tokenizer)
    assert row["input_ids"] == [0, 1] and row["labels"] == [-100, 1]


def test_bad_options(tokenizer):
    rows = [{"prompt": "a", "response": "b"}]
    with pytest.raises(ValueError, match="expected max_length of at least 2 tokens, got 1"):
        read_negatives(rows, tokenizer, max_length=1)
    with pytest.raises(ValueError, match='expected on_bad_row to be "error" or "skip"'):
        read_negatives(rows, tokenizer, on_bad_row="ignore")


@pytest.mark.skipif(not (SHARED / "models" / "hh-tiny").is_dir(), reason="../shared/models/hh-tiny is absent")
def test_hh_tiny_is_read_in_the_form_it_was_trained_on():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "hh-tiny")
    data = SHARED / "data" / "hh-harmless"
    with pytest.raises(BadRowsError, match="3 bad rows") as error:
        read_negatives(data / "negatives.jsonl", tokenizer, add_bos=True, max_length=512)
    assert [row.line for row in error.value.rows] == [437, 1388, 1947], "answers longer than the model's context"
    negatives = read_negatives(data / "negatives.jsonl", tokenizer, add_bos=True, max_length=1024)
    assert len(negatives) == 2000 and negatives.report.truncated == 2
    row = next(iter(negatives))
    text = f"<eos>{row['prompt']} {row['response']}<eos>"
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(read_preferences(data / "preferences.jsonl", tokenizer, add_bos=True, max_length=512)) == 150
