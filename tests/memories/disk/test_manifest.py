import pytest
import torch
from pydantic import ValidationError

from tests.support.memory_store import S, make, open_store, read
from vllm_armt.memories.disk.manifest import Boundary, ExpiresAfter, Model, chain, is_id, root
from vllm_armt.memories.errors import InvalidInput


@pytest.mark.parametrize("name", ["a", "War-and_Peace.2", "0", "x" * 128])
def test_names_of_letters_digits_and_marks_are_allowed(name):
    assert not is_id(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            ".",
            "..",
            "a..b",
            "../x",
            "a/b",
            "a\\b",
            "/etc/passwd",
            ".hidden",
            "-x",
            "a b",
            "a\n",
            "a\0",
            "ä",
            "a@b",
            "a:b",
        ),
        *(
            "x" * 129,
            "mem_",
            "mem_x",
            "mem_" + "0" * 31,
            "mem_" + "0" * 33,
            "mem_" + "A" * 32,
            "mem_" + "0" * 32 + "\n",
        ),
        "mem_" + "../" * 10 + "00",
    ],
)
def test_what_could_leave_the_folder_or_look_like_an_id_is_neither_name_nor_id(name, tmp_path):
    with pytest.raises(InvalidInput) as error:
        is_id(name)
    assert error.value.status == 400
    store = open_store(tmp_path)
    memory = make(store)
    for attempt in (
        lambda: store.get(name),
        lambda: store.use(name),
        lambda: store.delete(name),
        lambda: store.update(name, metadata={}),
        lambda: store.update(memory.id, name=name),
        lambda: store.create(Boundary.start(), name=name),
        lambda: store.begin(name=name),
    ):
        with pytest.raises(InvalidInput):
            attempt()
    assert [found.id for found in store.list()[0]] == [memory.id]


@pytest.mark.parametrize("fingerprint", ["", ".", "..", "a/b", "a.b", "x" * 129])
def test_a_fingerprint_that_is_no_folder_name_is_refused(fingerprint):
    with pytest.raises(InvalidInput):
        Model(fingerprint)


def test_equal_texts_have_equal_contents_read_at_once_or_in_pieces():
    whole = read(range(4 * S + 1))
    pieces = read(range(3 * S, 4 * S + 1), read(range(S + 2, 3 * S), read(range(S + 2))))
    assert pieces == whole
    assert whole.segments == 4
    assert whole.tokens == 4 * S + 1
    assert whole.last == tuple(range(3 * S, 4 * S))
    assert whole.pending == (4 * S,)
    by_hand = None
    for begin in range(0, 4 * S, S):
        by_hand = chain(by_hand, list(range(begin, begin + S)))
    assert whole.content == by_hand


def test_contents_differ_by_any_id_by_order_and_by_salt():
    contents = {
        read(ids, salt=salt).content
        for salt in (None, "a", "b")
        for ids in (range(8), range(1, 9), [1, 0, *range(2, 8)], range(4))
    }
    assert len(contents) == 12
    assert root("a") != root("b")


def test_a_chain_takes_any_sequence_of_ids():
    assert chain(None, [1, 2]) == chain(None, torch.tensor([1, 2])) == chain(None, (1, 2))
    with pytest.raises(OverflowError):
        chain(None, [-1])


def test_a_boundary_is_not_read_on_from_other_ids_or_to_half_a_segment():
    boundary = read(range(S + 1))
    with pytest.raises(ValueError, match="do not begin"):
        boundary.read([9] * 8, 8, S)
    with pytest.raises(ValueError, match="closed segments"):
        boundary.read([*boundary.last, *boundary.pending, 9], 5, S)


@pytest.mark.parametrize(
    "fields",
    [
        {"segments": 1},
        {"last": (1, 2)},
        {"segments": 1, "last": (1, 2)},
        {"pending": (-1,)},
        {"pending": ("1",)},
        {"content": "A" * 64},
    ],
)
def test_a_boundary_that_can_not_be_is_refused(fields):
    with pytest.raises(ValidationError):
        Boundary(**fields)


@pytest.mark.parametrize(
    "metadata",
    [
        {str(i): "" for i in range(17)},
        {"k" * 65: ""},
        {"": "x"},
        {"k": "v" * 513},
        {"k": 1},
    ],
)
def test_metadata_beyond_openai_s_bounds_is_refused(metadata, tmp_path):
    store = open_store(tmp_path)
    memory = make(store, metadata={str(i): "v" * 512 for i in range(16)})
    with pytest.raises(InvalidInput, match="metadata"):
        store.update(memory.id, metadata=metadata)
    with pytest.raises(InvalidInput, match="metadata"):
        make(store, metadata=metadata)


@pytest.mark.parametrize("fields", [("never", 1), ("created_at", 0), ("created_at", 10**10), ("created_at", 1.5)])
def test_an_expiry_that_can_not_be_is_refused(fields):
    with pytest.raises(ValidationError):
        ExpiresAfter(anchor=fields[0], seconds=fields[1])


def test_no_token_ids_stand_in_messages_or_representations(tmp_path):
    store = open_store(tmp_path)
    memory = make(store, [717171, 727272, 737373, 747474, 757575])
    assert "7373" not in repr(memory) + str(memory) + repr(memory.boundary)
    assert "7575" not in repr(memory) + str(memory) + repr(memory.boundary)
    with pytest.raises(InvalidInput) as error:
        memory.change(pending=(717171, -737373))
    assert "7373" not in str(error.value)


def test_an_empty_salt_is_refused(tmp_path):
    with pytest.raises(InvalidInput):
        open_store(tmp_path).get("x", salt="")
