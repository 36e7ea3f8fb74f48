import os
import stat
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.memory_store import MODEL, OTHER_MODEL, SPEC, Clock, flip, folder, is_page_of, open_store, page_of
from vllm_armt.memories.disk import files
from vllm_armt.memories.disk.tensorfile import DTYPES, spec_of
from vllm_armt.memories.errors import Damaged, InvalidInput, Missing, WrongModel

KEY, OTHER_KEY = "ab" * 32, "cd" * 32


@pytest.fixture
def pages(tmp_path):
    pages = open_store(tmp_path, grace=0).pages
    pages.save(KEY, page_of(KEY))
    return pages


def test_a_page_comes_back_as_it_was_in_memory_of_its_own(pages):
    one, other = pages.load(KEY, SPEC), pages.load(KEY, SPEC)
    assert is_page_of(KEY, one)
    one["layers.0.M"].zero_()
    assert is_page_of(KEY, other)
    assert is_page_of(KEY, pages.load(KEY, SPEC))


def test_every_dtype_and_odd_shapes_come_back(pages):
    tensors = {
        f"{code} {shape}": torch.arange(24).remainder(2).to(dtype)[: torch.Size(shape).numel()].reshape(shape)
        for code, dtype in DTYPES.items()
        for shape in ((), (0,), (2, 0, 3), (7,), (2, 3, 4))
    }
    pages.save(OTHER_KEY, tensors)
    loaded = pages.load(OTHER_KEY, spec_of(tensors))
    assert all(loaded[name].equal(tensors[name]) and loaded[name].shape == tensors[name].shape for name in tensors)
    pages.save("00" * 8, {})
    assert pages.load("00" * 8, {}) == {}


def test_tensors_may_be_views_of_one_buffer_and_not_contiguous(pages):
    buffer = torch.arange(12.0)
    tensors = {"a": buffer[:4], "b": buffer[2:8].view(2, 3).T, "c": buffer}
    pages.save(OTHER_KEY, tensors)
    loaded = pages.load(OTHER_KEY, spec_of(tensors))
    assert all(loaded[name].equal(tensors[name]) for name in tensors)


def test_a_dtype_without_a_word_in_the_layout_is_named(pages):
    with pytest.raises(ValueError, match="complex64"):
        pages.save(OTHER_KEY, {"x": torch.zeros(1, dtype=torch.complex64)})


def test_safetensors_reads_the_file(pages):
    assert is_page_of(KEY, load_file(pages.path(KEY)))
    with safe_open(pages.path(KEY), "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["key"], metadata["fingerprint"]) == ("1", KEY, MODEL.fingerprint)


def test_files_are_their_owner_s_alone(pages):
    assert stat.S_IMODE(pages.path(KEY).stat().st_mode) == 0o600
    for made in (pages.directory, pages.directory.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


@pytest.mark.parametrize("key", ["", "..", "../" + KEY, KEY + "/", "AB" * 32, "ab" * 65, KEY + "\n", "x" * 32])
def test_a_key_that_could_leave_the_folder_is_refused(pages, key):
    for attempt in (lambda: pages.load(key, SPEC), lambda: pages.save(key, {}), lambda: pages.hold(key)):
        with pytest.raises(InvalidInput):
            attempt()


def test_a_missing_page_is_said_to_be_missing(pages):
    for attempt in (
        lambda: pages.load(OTHER_KEY, SPEC),
        lambda: pages.verify(OTHER_KEY),
        lambda: pages.hold(OTHER_KEY),
    ):
        with pytest.raises(Missing):
            attempt()
    assert OTHER_KEY not in pages
    assert KEY in pages


def test_every_flipped_byte_is_found(pages):
    path = pages.path(KEY)
    for position in range(path.stat().st_size):
        flip(path, position, position % 8)
        with pytest.raises((Damaged, WrongModel)):
            pages.load(KEY, SPEC)
        flip(path, position, position % 8)
    assert is_page_of(KEY, pages.load(KEY, SPEC))


def test_a_file_cut_or_grown_anywhere_is_found(pages):
    path = pages.path(KEY)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            pages.load(KEY, SPEC)
    path.write_bytes(whole + b"\0")
    with pytest.raises(Damaged, match="instead of"):
        pages.load(KEY, SPEC)


def test_a_header_that_claims_gigabytes_allocates_nothing(pages):
    path = pages.path(KEY)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    with pytest.raises(Damaged, match="header"):
        pages.load(KEY, SPEC)


def test_a_page_in_another_s_place_is_found(pages, tmp_path):
    os.link(pages.path(KEY), pages.path(OTHER_KEY))
    with pytest.raises(Damaged, match="another page"):
        pages.load(OTHER_KEY, SPEC)
    elsewhere = open_store(tmp_path, OTHER_MODEL).pages
    os.link(pages.path(KEY), elsewhere.path(KEY))
    with pytest.raises(WrongModel, match=MODEL.fingerprint) as error:
        elsewhere.load(KEY, SPEC)
    assert error.value.status == 409


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seen": (torch.int32, ())}, r"seen is int64 \[\], expected int32 \[\]"),
        ({"layers.0.M": (torch.float32, (5, 3))}, r"layers.0.M is float32 \[3, 5\], expected float32 \[5, 3\]"),
        ({"more": (torch.float32, (1,))}, r"more is absent, expected float32 \[1\]"),
    ],
)
def test_a_page_of_another_layout_is_refused_by_name(pages, change, words):
    with pytest.raises(WrongModel, match=words):
        pages.load(KEY, {**SPEC, **change})
    with pytest.raises(WrongModel, match=r"seen is int64 .*, expected absent"):
        pages.load(KEY, {name: SPEC[name] for name in SPEC if name != "seen"})


def test_links_are_not_followed(pages, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(pages.path(KEY).read_bytes())
    pages.path(KEY).unlink()
    pages.path(KEY).symlink_to(secret)
    for attempt in (lambda: pages.load(KEY, SPEC), lambda: pages.hold(KEY), lambda: pages.verify(KEY)):
        with pytest.raises(Damaged, match="no regular file"):
            attempt()
    assert KEY not in pages
    before = secret.read_bytes()
    pages.save(KEY, page_of(KEY))
    assert not pages.path(KEY).is_symlink()
    assert secret.read_bytes() == before
    os.mkfifo(pages.path(OTHER_KEY))
    with pytest.raises(Damaged, match="no regular file"):
        pages.load(OTHER_KEY, SPEC)


def test_a_whole_page_is_not_written_again_and_a_damaged_one_is_replaced(pages):
    path = pages.path(KEY)
    inode, size = path.stat().st_ino, path.stat().st_size
    assert pages.save(KEY, page_of(KEY)) == size
    assert path.stat().st_ino == inode
    flip(path, size - 1)
    assert pages.save(KEY, page_of(KEY)) == size
    assert path.stat().st_ino != inode
    assert is_page_of(KEY, pages.load(KEY, SPEC))


def test_a_page_that_is_there_is_noted_as_saved_only_with_the_lock(pages):
    """Who removes pages looks at the time of the last save under the lock: it must not change behind its back."""
    saver = threading.Thread(target=lambda: pages.save(KEY, page_of(KEY)))
    with files.locked(pages.directory.parent / "lock"):
        saver.start()
        saver.join(0.2)
        assert saver.is_alive()
        assert pages.remove(KEY)
    saver.join()
    assert is_page_of(KEY, pages.load(KEY, SPEC))


def test_a_held_page_is_not_removed_and_a_hold_that_came_too_late_says_so(tmp_path):
    one, other = open_store(tmp_path).pages, open_store(tmp_path).pages
    one.save(KEY, page_of(KEY))
    with one.hold(KEY), one.hold(KEY) as second:
        second.release()
        second.release()
        assert not other.remove(KEY)
    assert other.remove(KEY)
    with pytest.raises(Missing):
        one.hold(KEY)


def test_a_page_that_is_being_read_is_read_to_its_end_though_it_is_removed(pages):
    with pages.reading(KEY) as (file, header):
        assert pages.remove(KEY)
        assert len(file.read()) == header.data_bytes
    assert KEY not in pages


def test_two_threads_that_save_one_page_leave_one(pages):
    errors = []

    def save():
        try:
            pages.save(OTHER_KEY, page_of(OTHER_KEY))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert is_page_of(OTHER_KEY, pages.load(OTHER_KEY, SPEC))
    assert len(list(pages.directory.iterdir())) == 2


def test_the_second_tier_keeps_pages_by_key_and_notes_their_use(tmp_path):
    clock = Clock()
    store = open_store(tmp_path, clock=clock)
    store.prefix.save("12" * 16, page_of("12" * 16))
    clock.advance(10)
    assert is_page_of("12" * 16, store.prefix.load("12" * 16, SPEC))
    (entry,) = store.prefix.entries()
    assert entry.used_ns == clock.now * 1e9
    assert store.list() == ([], False)
    assert (folder(store) / "prefix").is_dir()
    with pytest.raises(Missing):
        store.prefix.load("34" * 16, SPEC)


def test_writing_and_reading_take_no_second_copy_of_a_page(pages):
    """Peak of Python's and torch's allocations, measured by the resident set of a process of its own."""
    import subprocess
    import sys

    code = f"""
import resource, sys, torch
from pathlib import Path
from tests.support.memory_store import open_store
pages = open_store(Path({str(pages.directory.parent.parent)!r})).pages
size = 64 << 20
tensors = {{"x": torch.ones(size // 8), "y": torch.ones(size // 8)}}
spec = {{name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}}
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak(); pages.save("{OTHER_KEY}", tensors); saved = peak() - before
before = peak(); loaded = pages.load("{OTHER_KEY}", spec); read = peak() - before
print(saved, read)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    saved, read = map(int, run.stdout.split())
    assert saved < 16 << 20
    assert read < 80 << 20
