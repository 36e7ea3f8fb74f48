"""Memories over HTTP: the routes that make, show and change them."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from tests.server.conftest import QUESTION, TEXT, UPLOAD_BYTES
from tests.support.http_memories import TOLERANCE, complete, probabilities
from tests.support.small_model import S, random_prompt
from tests.support.tiny_checkpoint import MODEL, encode, random_text
from vllm_armt.memories.http.uploads import JSON_BYTES

pytestmark = pytest.mark.server


def test_a_text_becomes_a_memory_while_the_client_goes_on(memories):
    begun = memories.call("POST", "", 202, json={"input": TEXT, "name": "letters", "metadata": {"by": "Anna"}})
    assert (begun["object"], begun["status"], begun["name"]) == ("memory", "in_progress", "letters")
    assert begun["progress"] == {"read": 0, "total": len(TEXT)}
    deadline = time.monotonic() + 30
    while (memory := memories.get("letters"))["status"] == "in_progress":
        assert time.monotonic() < deadline
        assert memory["progress"]["read"] <= memory["progress"]["total"] == len(TEXT)
        time.sleep(0.05)
    assert memory == memories.get(begun["id"])
    assert memory["usage"] == {"total_tokens": len(TEXT)}
    assert memory["progress"] == {"read": len(TEXT), "total": len(TEXT)}
    assert memory["segments"] == 20
    assert memory["bytes"] > 0
    assert memory["model"] == MODEL
    assert memory["metadata"] == {"by": "Anna"}
    assert memory["error"] is memory["expires_at"] is memory["parent"] is None


def test_texts_messages_and_token_ids_are_read(memories, client):
    ids = random_prompt(5 * S, seed=33)
    by_ids = memories.read(ids)
    assert by_ids["usage"]["total_tokens"] == len(ids)
    (choice,) = complete(client, QUESTION, by_ids["id"]).choices
    assert choice.token_ids == complete(client, ids + encode(QUESTION)).choices[0].token_ids
    said = memories.read([{"role": "user", "content": "hello"}])
    assert said["usage"]["total_tokens"] == len("user: hello")


def test_a_file_is_read(memories, client, book):
    form = {
        "name": "file",
        "metadata[kind]": "novel",
        "expires_after[anchor]": "created_at",
        "expires_after[seconds]": 60,
    }
    uploaded = memories.call("POST", "", data=form, files={"file": ("novel.txt", TEXT.encode())}, params={"wait": True})
    assert (uploaded["name"], uploaded["metadata"]) == ("file", {"kind": "novel"})
    assert uploaded["expires_at"] == uploaded["created_at"] + 60
    # a page belongs to a text, however that came
    assert uploaded["usage"] == memories.get(book)["usage"]
    assert probabilities(complete(client, QUESTION, "file")) == pytest.approx(
        probabilities(complete(client, QUESTION, book)), abs=TOLERANCE
    )
    appended = memories.call(
        "POST", "/file/append", files={"file": ("more.txt", QUESTION.encode())}, params={"wait": True}
    )
    assert (appended["parent"], appended["name"]) == (uploaded["id"], "file")
    assert appended["usage"]["total_tokens"] == len(TEXT + QUESTION)


@pytest.mark.parametrize(
    ("request_", "status", "named"),
    [
        ({"json": {}}, 400, "input"),
        ({"json": {"input": ""}}, 400, "empty"),
        ({"json": {"input": []}}, 400, "empty"),
        ({"json": {"input": [""]}}, 400, "token ids alone"),
        ({"json": {"input": [1, {"role": "user"}]}}, 400, "token ids alone"),
        ({"json": {"input": [3, -1]}}, 400, "-1"),
        ({"json": {"input": [3, 100_000]}}, 400, "100000"),
        ({"json": {"input": [{"role": "user", "content": "a"}, {"content": "no role"}]}}, 400, "role"),
        ({"json": {"input": "text", "naem": "typo"}}, 400, "naem"),
        ({"json": {"input": "text", "name": "../../etc/passwd"}}, 400, "name of a memory"),
        ({"json": {"input": "text", "name": "mem_1"}}, 400, "name of a memory"),
        ({"json": {"input": "text", "metadata": {str(i): "" for i in range(17)}}}, 400, "metadata"),
        ({"json": {"input": "text", "expires_after": {"anchor": "never", "seconds": 1}}}, 400, "anchor"),
        ({"json": {"input": "text", "cache_salt": ""}}, 400, "cache_salt"),
        ({"json": {"input": "text", "model": "other"}}, 404, "other"),
        ({"json": {"input": "text", "if_parent": "mem_1"}}, 400, "append"),
        ({"json": {"input": "t" * UPLOAD_BYTES}}, 413, "multipart"),
        ({"content": b"{not JSON", "headers": {"Content-Type": "application/json"}}, 400, "JSON"),
        ({"content": b"text", "headers": {"Content-Type": "text/plain"}}, 400, "application/json"),
        ({"files": {"file": b"t" * UPLOAD_BYTES}}, 413, "memories_max_upload_bytes"),
        ({"files": {"file": b"\xff\xfe"}}, 400, "UTF-8"),
        ({"files": {"file": b""}}, 400, "empty"),
        ({"files": {"book": b"text"}}, 400, "'file'"),
        ({"files": {"file": b"text"}, "data": {"colour": "red"}}, 400, "colour"),
    ],
)
def test_what_is_no_text_is_refused_and_leaves_nothing(memories, request_, status, named):
    before = memories.list()["data"]
    error = memories.call("POST", "", status, **request_)["error"]
    assert error["code"] == status
    assert named in error["message"]
    assert memories.list()["data"] == before


def test_json_is_bounded_where_files_are_not():
    assert UPLOAD_BYTES < JSON_BYTES


def test_memories_are_listed_page_by_page_the_newest_first(memories):
    made = [memories.read(f"text {i}", f"page-{i}")["id"] for i in range(3)]
    first = memories.list(limit=2)
    assert [memory["id"] for memory in first["data"]] == made[:0:-1]
    assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, made[1])
    assert memories.list(after=first["last_id"], limit=1)["data"][0]["id"] == made[0]
    assert memories.call("GET", "", 400, params={"limit": 0})["error"]["code"] == 400
    assert memories.call("GET", "", 404, params={"after": "mem_" + "0" * 32})["error"]["type"] == "NotFoundError"


def test_a_memory_is_renamed_described_and_given_an_end(memories):
    made = memories.read("short", "before", metadata={"a": "1"})
    changed = memories.call("POST", "/before", json={"name": "after", "metadata": {"b": "2"}})
    assert (changed["id"], changed["name"], changed["metadata"]) == (made["id"], "after", {"b": "2"})
    memories.get("before", 404)
    expiring = memories.call("POST", "/after", json={"expires_after": {"anchor": "created_at", "seconds": 3600}})
    assert expiring["expires_at"] == made["created_at"] + 3600
    assert expiring["metadata"] == {"b": "2"}
    assert memories.call("POST", "/after", json={"expires_after": None})["expires_at"] is None
    assert memories.call("POST", "/after", json={"name": None})["name"] is None
    memories.call("POST", f"/{made['id']}", 400, json={"status": "completed"})


def test_an_expired_memory_is_gone_and_can_be_deleted(memories, client):
    memories.read("short", "brief", expires_after={"anchor": "created_at", "seconds": 1})
    time.sleep(1.5)
    assert memories.get("brief", 410)["error"]["type"] == "GoneError"
    with pytest.raises(openai.APIStatusError, match="has expired") as refused:
        complete(client, QUESTION, "brief")
    assert refused.value.status_code == 410
    memories.delete("brief")
    memories.get("brief", 404)


def test_a_deleted_memory_is_gone(memories, client):
    made = memories.read("short", "doomed")
    assert memories.delete("doomed") == {"id": made["id"], "object": "memory.deleted", "deleted": True}
    memories.delete("doomed", 404)
    with pytest.raises(openai.NotFoundError, match="doomed"):
        complete(client, QUESTION, "doomed")


def test_a_name_that_is_taken_is_refused(memories, book):
    error = memories.call("POST", "", 409, json={"input": "text", "name": book})["error"]
    assert error["type"] == "ConflictError"
    assert memories.get(book)["id"] in error["message"]


def test_what_is_appended_is_a_new_memory_to_which_the_name_moves(memories, client):
    old = memories.read(TEXT, "diary")
    new = memories.append("diary", QUESTION)
    assert (new["parent"], new["name"]) == (old["id"], "diary")
    assert new["id"] != old["id"]
    assert memories.get(old["id"])["name"] is None
    question = random_text(5, seed=40)
    expected = complete(client, TEXT + QUESTION + question)
    answer = complete(client, question, "diary")
    assert answer.choices[0].token_ids == expected.choices[0].token_ids
    assert probabilities(answer) == pytest.approx(probabilities(expected), abs=TOLERANCE)
    # who was slower is told
    assert memories.append("diary", "late", 409, if_parent=old["id"])["error"]["message"].startswith(
        "Somebody was faster"
    )
    assert memories.get("diary")["id"] == new["id"]


def test_clients_that_append_at_once_lose_nothing(memories):
    memories.read("begin", "shared")
    words = [random_text(7, seed=50 + i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda word: memories.append("shared", word), words))
    assert memories.get("shared")["usage"]["total_tokens"] == len("begin") + sum(map(len, words))


def test_a_memory_goes_out_and_in_as_one_file(memories, client, book, http):
    response = http.get(f"/v1/memories/{book}/content")
    assert response.status_code == 200
    assert len(response.content) == int(response.headers["content-length"])
    assert 'filename="book.safetensors"' in response.headers["content-disposition"]
    memories.call("POST", "/import", 409, content=response.content)
    copy = memories.call("POST", "/import", content=response.content, params={"name": "copy"})
    assert copy["usage"] == memories.get(book)["usage"]
    assert (
        complete(client, QUESTION, "copy").choices[0].token_ids == complete(client, QUESTION, book).choices[0].token_ids
    )
    damaged = bytearray(response.content)
    damaged[-5] ^= 1
    assert (
        "damaged"
        in memories.call("POST", "/import", 400, content=bytes(damaged), params={"name": "bad"})["error"]["message"]
    )
    memories.get("bad", 404)
    memories.call("POST", "/import", 413, content=b"0" * (UPLOAD_BYTES + 1))


def test_a_memory_made_with_a_salt_is_nobody_elses(memories, client, http):
    salt = {"cache_salt": "tenant a"}
    made = memories.read(TEXT, "secret", **salt)
    for wrong in ({}, {"cache_salt": "tenant b"}):
        memories.get("secret", 404, **wrong)
        memories.get(made["id"], 404, **wrong)
        memories.delete("secret", 404, **wrong)
        assert made["id"] not in [memory["id"] for memory in memories.list(**wrong)["data"]]
        assert http.get("/v1/memories/secret/content", params=wrong).status_code == 404
        memories.append("secret", "more", 404, **wrong)
        with pytest.raises(openai.NotFoundError):
            complete(client, QUESTION, "secret", extra_body=wrong)
    listed = http.get("/v1/models", params=salt).json()["data"]
    assert [card["id"] for card in listed if card["parent"]] == [f"{MODEL}:secret"]
    own = complete(client, QUESTION, "secret", extra_body=salt)
    assert own.choices[0].token_ids == complete(client, TEXT + QUESTION).choices[0].token_ids
    # the same name is free for others
    memories.read("mine", "secret")
    memories.delete("secret")
    memories.delete_all(**salt)
