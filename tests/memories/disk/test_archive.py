import io

import pytest
from safetensors.torch import load

from tests.support.memory_store import OTHER_MODEL, SPEC, S, folder, is_page_of, loads, make, open_store, page_of, read
from vllm_armt.memories.disk.archive import export_memory, import_memory
from vllm_armt.memories.disk.manifest import ExpiresAfter
from vllm_armt.memories.errors import Conflict, Damaged, InvalidInput, NotFound, TooLarge, WrongModel


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "one", grace=0)


@pytest.fixture
def other(tmp_path):
    return open_store(tmp_path / "two", grace=0)


def exported(store, reference="war", **options):
    archive = export_memory(store, reference, **options)
    data = b"".join(archive)
    assert archive.bytes == len(data)
    return data


def imported(store, data, **options):
    return import_memory(store, io.BytesIO(data), expected=SPEC, **options)


def nothing_is_left(store):
    return not any(path.is_file() and path.name != "lock" for path in folder(store).rglob("*"))


@pytest.mark.parametrize("ids", [range(4 * S + 2), range(2)])
def test_a_memory_goes_out_and_in_with_all_that_it_is(store, other, ids):
    expires = ExpiresAfter(anchor="last_used_at", seconds=60)
    made = make(store, ids, name="war", roles=("user",), metadata={"k": "v"}, expires_after=expires)
    got = imported(other, exported(store))
    for field in ("id", "name", "roles", "metadata", "expires_after", "segments", "last", "pending", "tokens"):
        assert getattr(got, field) == getattr(made, field), field
    assert other.get("war") == got
    if made.page is not None:
        tensors = other.pages.load(got.page, SPEC)
        assert is_page_of(made.page, tensors)
    assert other.verify() == []


def test_an_import_can_be_continued_and_exported_again(store, other):
    make(store, range(6), name="war")
    got = imported(other, exported(store))
    longer = make(other, range(6, 12), parent=got)
    assert (longer.name, longer.tokens) == ("war", 12)
    assert imported(store, exported(other), name=None).tokens == 12


def test_an_archive_is_a_safetensors_file_that_tells_no_salt(store):
    made = make(store, name="war", salt="secret")
    data = exported(store, salt="secret")
    assert is_page_of(made.page, load(data))
    assert made.salt.encode() not in data
    got = imported(store, data, name="peace", salt="other")
    assert got.page != made.page
    assert store.get("peace", salt="other") == got
    with pytest.raises(NotFound):
        store.get("peace", salt="secret")


def test_an_id_that_is_taken_is_drawn_anew_and_a_taken_name_refused(store):
    made = make(store, name="war")
    data = exported(store)
    with pytest.raises(Conflict, match="taken"):
        imported(store, data)
    again = imported(store, data, name="peace")
    assert again.id != made.id
    assert (store.get("war").id, store.get("peace")) == (made.id, again)
    assert imported(store, data, name=None).page == again.page


def test_an_import_never_stands_in_for_what_this_model_has_read(store, other):
    """An archive with another state under the content of a text must not change what that text's memories answer."""
    boundary = read(range(6))
    forged = page_of("00" * 32)
    other.pages.save(boundary.page, forged)
    other.create(boundary, name="forged")
    got = imported(store, exported(other, "forged"))
    made = make(store, range(6), name="war")
    assert got.page != made.page
    assert loads(store, made)
    imported(store, exported(other, "forged"), name=None)
    assert loads(store, made)


def test_a_damaged_page_is_not_exported(store):
    made = make(store, name="war")
    path = store.pages.path(made.page)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged):
        export_memory(store, "war")


def test_every_flipped_byte_of_an_archive_is_refused_and_nothing_stays(store, other):
    make(store, name="war")
    data = exported(store)
    for position in range(0, len(data), 3):
        bad = bytearray(data)
        bad[position] ^= 1 << position % 8
        with pytest.raises((InvalidInput, WrongModel)):
            imported(other, bytes(bad))
    assert nothing_is_left(other)
    imported(other, data)


def test_an_archive_cut_or_gone_on_is_refused_and_nothing_stays(store, other):
    make(store, name="war")
    data = exported(store)
    for length in [*range(0, len(data), 41), len(data) - 1]:
        with pytest.raises(InvalidInput):
            imported(other, data[:length])
    with pytest.raises(InvalidInput, match="goes on"):
        imported(other, data + b"\0")
    for junk in (
        b"",
        b"\0" * 100,
        (1 << 40).to_bytes(8, "little"),
        store.pages.path(store.get("war").page).read_bytes(),
    ):
        with pytest.raises(InvalidInput):
            imported(other, junk)
    assert nothing_is_left(other)


def test_an_archive_of_another_model_or_layout_is_refused_by_name(store, tmp_path):
    make(store, name="war")
    elsewhere = open_store(tmp_path / "three", OTHER_MODEL)
    with pytest.raises(WrongModel, match="weights is 'one' there, 'two' here"):
        imported(elsewhere, exported(store))
    with pytest.raises(WrongModel, match="more is absent"):
        import_memory(
            open_store(tmp_path / "four"), io.BytesIO(exported(store)), expected=SPEC | {"more": SPEC["seen"]}
        )


def test_a_large_archive_is_refused_before_its_data_are_read(store, other):
    made = make(store, name="war")
    data = exported(store)
    stream = io.BytesIO(data)
    with pytest.raises(TooLarge, match="at most 10"):
        import_memory(other, stream, limit=10)
    assert stream.tell() < len(data) - 100
    other.max_bytes = made.bytes - 1
    with pytest.raises(TooLarge, match="max_bytes"):
        imported(other, data)
    assert nothing_is_left(other)


def test_only_a_complete_memory_is_exported(store):
    with store.begin(name="war"), pytest.raises(Conflict):
        export_memory(store, "war")
    with pytest.raises(NotFound):
        export_memory(store, "peace")
