"""The memories of a checkpoint in a folder, found without vLLM.

What a server keeps them under depends on the dtype and other options that it was started with, which vLLM alone
decides; so one checkpoint may have several stores. They are told by its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vllm_armt.cli.memory.options import MAX_BYTES
from vllm_armt.cli.values import whole_number
from vllm_armt.memories.checkpoint import checkpoint_identity, fingerprint_of, introduce, known_models
from vllm_armt.memories.disk.archive import Beginning
from vllm_armt.memories.disk.files import in_words
from vllm_armt.memories.disk.manifest import Model
from vllm_armt.memories.disk.store import Store
from vllm_armt.memories.errors import Conflict, Expired, InvalidInput, MemoriesError, NotFound, WrongModel


def open_stores(directory: Path, folder: Path, dtype: str | None) -> list[Store]:
    """Every store of a checkpoint, perhaps of one dtype alone.

    Raises:
        ValueError: one of the folders isn't what it has to be.
    """
    if not folder.is_dir():
        raise ValueError(f"--memories is {folder}, which is no folder.")
    weights = checkpoint_identity(directory, folder)["weights"]
    return [
        Store(folder, model)
        for model in known_models(folder)
        if model.identity.get("weights") == weights and dtype in (None, model.identity.get("dtype"))
    ]


def find(stores: Sequence[Store], reference: str, salt: str | None) -> Store:
    """The store that has a memory, in any state.

    Raises:
        NotFound: none has.
        Conflict: several have.
        MemoriesError: as `Store.get`, but for a memory that has expired.
    """
    found = []
    refusal: MemoriesError = NotFound(f"There is no memory {reference!r} of this model in the folder.")
    for store in stores:
        try:
            store.get(reference, salt=salt)
            found.append(store)
        except Expired:
            found.append(store)
        except WrongModel as error:
            refusal = error
        except NotFound:
            continue
    if len(found) > 1:
        kinds = ", ".join(sorted({store.model.identity.get("dtype", "?") for store in found}))
        raise Conflict(f"{reference!r} is the name of several memories, of dtypes {kinds}. Give --dtype, or an id.")
    if not found:
        raise refusal
    return found[0]


def of_archive(beginning: Beginning, directory: Path, folder: Path, max_bytes: str | None) -> Store:
    """The store that an exported memory belongs to, made if the checkpoint has none yet.

    Raises:
        WrongModel: the archive is of another checkpoint.
        InvalidInput: the fingerprint isn't that of what the archive says of its model.
    """
    memory = beginning.memory
    model = Model(memory.fingerprint, memory.model, memory.identity, memory.versions)
    if fingerprint_of(memory.identity) != memory.fingerprint:
        raise InvalidInput("This can't be imported: it does not say of which model it is.")
    with in_words(f"making the folder {folder}"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    ours = checkpoint_identity(directory, folder)
    # a server that was started with hf_overrides has another configuration than the checkpoint
    is_known = any(known.fingerprint == memory.fingerprint for known in known_models(folder))
    differ = [key for key in ours if memory.identity.get(key) != ours[key] and not (key == "config" and is_known)]
    if differ:
        raise WrongModel(f"The archive is of another model than {directory}: its {' and '.join(differ)} differ.")
    store = Store(folder, model, max_bytes=None if max_bytes is None else whole_number(MAX_BYTES, max_bytes))
    introduce(store)
    return store
