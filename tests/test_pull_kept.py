"""What was pulled, in the store: evicted, invalidated, pulled again, read by threads, and without its dataset."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest

import actcache as ac
from actcache.errors import DatasetFormatError, DatasetNotFoundError, NotCachedError
from actcache.share import fetching
from actcache.store.given import read as read_given
from made_datasets import make
from pull_helpers import fetched, pulled


@pytest.fixture
def store(tmp_path):
    with ac.Store(tmp_path / "there", index_dir=tmp_path / "there-index") as store:
        yield store
    fetching._open.clear()


def test_texts_whose_ids_are_not_told_are_told_apart(tmp_path, store):
    made = make(tmp_path / "set", "2.0 split", longest=1, labels=list(range(11)))
    # The digests of these agree in the 31 bits that stand for the one token of each.
    alike = ["word 17675", "word 126757"]
    made.columns["text"][3], made.columns["text"][7] = alike
    made.write()
    assert ac.pull_dataset(made.folder, store=store) == 11
    space = pulled(store)
    for texts in (alike, alike[::-1]):
        found = store.read(space, texts, "resid_post.2")
        for mine, text in zip(found, texts, strict=True):
            assert np.array_equal(mine.numpy(), made.vectors[made.columns["text"].index(text)][:, 1])
    table = store.prompts(space)
    assert len(table) == 11
    said = dict(zip(table.texts, read_given(store, space.space, "label", table), strict=True))
    assert said == dict(zip(made.columns["text"], range(11), strict=True))
    assert store.verify().ok


def test_metadata_of_a_folder_that_changed_are_another_dataset(tmp_path, store):
    made = make(tmp_path / "set", "1.2 pooled")
    ac.pull_dataset(made.folder, store=store)
    path = made.folder / "lmprobe_info.json"
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DatasetFormatError, match="was changed since it was pulled"):
        store.read(pulled(store), made.texts[:2], "resid_post.0", pooling="last_token")
    ac.pull_dataset(made.folder, store=store)
    assert len(store.spaces()) == 2


def test_it_works_without_the_dataset_once_it_was_read(tmp_path, store):
    made = make(tmp_path / "set")
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    store.read(space, made.texts[:4], "resid_post.0", pooling="last_token")
    shutil.rmtree(made.folder)
    fetching._open.clear()
    found = store.read(space, made.texts[:4], "resid_post.0", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(made.expected())[:4, 0])
    with pytest.raises(DatasetNotFoundError, match=r"can no longer be read.*clear_cache\("):
        store.read(space, made.texts, "resid_post.0", pooling="last_token")


def test_what_was_evicted_is_fetched_again(tmp_path, store):
    made = make(tmp_path / "set", n=200, dim=64, k=0, labels=list(range(200)))
    ac.pull_dataset(made.folder, store=store, materialize=True)
    space = pulled(store)
    registered = sum(p.stat().st_size for p in store.root.rglob("*.safetensors"))
    store.evict(60_000 / 2**30)
    assert sum(p.stat().st_size for p in store.root.rglob("*.safetensors")) < registered
    assert "last_token" not in fetched(store, space) and store.verify().ok
    found = store.read(space, made.texts, "resid_post.2", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(made.expected())[:, 1])
    assert len(store.prompts(space, site="label")) == 200, "what was said of prompts stays while they can be read"
    store.evict(0)
    assert store.spaces() == [] and store.info().total_size_bytes == 0


def test_invalidate_and_clear(tmp_path, store):
    made = make(tmp_path / "set", labels=list(range(11)))
    ac.pull_dataset(made.folder, store=store, materialize=True)
    space = pulled(store)
    assert store.invalidate(space, made.texts[:3]) == 3
    assert not store.contains(space, made.texts[:3]).any() and store.contains(space, made.texts[3:]).all()
    with pytest.raises(NotCachedError):
        store.read(space, made.texts[:1], "resid_post.0", pooling="last_token")
    # Whoever pulls again wants them back.
    assert ac.pull_dataset(made.folder, store=store) == 11
    assert np.array_equal(
        store.read(space, made.texts[:1], "resid_post.0", pooling="last_token").numpy(),
        np.stack(made.expected())[:1, 0],
    )
    assert store.clear("org/model") == 11 and store.spaces() == []
    assert made.folder.is_dir(), "what was pulled from is nobody's cache"


def test_overwrite_forgets_what_was_pulled_of_this_dataset_alone(tmp_path, store):
    made, other = make(tmp_path / "set"), make(tmp_path / "other", seed=1)
    for dataset in (made, other):
        ac.pull_dataset(dataset.folder, store=store, materialize=True)
    changed = make(tmp_path / "set", seed=2)
    ac.pull_dataset(made.folder, store=store, overwrite=True)
    names = sorted(space.pulled.rpartition("@")[0] for space in store.spaces())
    assert names == [str(other.folder), str(made.folder)]
    space = next(space for space in store.spaces() if space.pulled.startswith(f"{made.folder}@"))
    found = store.read(space, made.texts, "resid_post.0", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(changed.expected())[:, 0])


def test_a_folder_that_changed_is_not_mixed_with_what_was_read_of_it(tmp_path, store):
    made = make(tmp_path / "set")
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    store.read(space, made.texts[:1], "resid_post.0", pooling="last_token")
    make(tmp_path / "set", seed=3)
    for _ in range(2):
        with pytest.raises(DatasetFormatError, match="changed since it was pulled: pull it again"):
            store.read(space, made.texts, "resid_post.0", pooling="last_token")
        fetching._open.clear()
    ac.pull_dataset(made.folder, store=store)
    assert len([s for s in store.spaces() if s.pulled]) == 2, "another commit is another space"


def test_threads_that_read_the_same_fetch_it_once(tmp_path, store, monkeypatch):
    made = make(tmp_path / "set", "2.0 split", n=40)
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    read = []
    original = fetching.Dataset.read

    def counted(self, rows, *args, **options):
        read.append(len(rows))
        return original(self, rows, *args, **options)

    monkeypatch.setattr(fetching.Dataset, "read", counted)
    gate = threading.Barrier(6)
    found: list = [None] * 6

    def work(i):
        gate.wait()
        found[i] = store.read(space, made.texts, "resid_post.0")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(read) == 40
    for rows in found:
        assert all(np.array_equal(a.numpy(), b[:, 0]) for a, b in zip(rows, made.vectors, strict=True))


def test_a_prompt_that_is_there_several_times(tmp_path, store, caplog):
    made = make(tmp_path / "set", labels=list(range(11)))
    made.columns["text"][4] = made.columns["text"][1]
    made.columns["text"][6] = made.columns["text"][2]
    made.columns["label"][6] = 2
    made.write()
    assert ac.pull_dataset(made.folder, store=store) == 9
    space = pulled(store)
    found = store.read(space, made.texts[1:3], "resid_post.0", pooling="last_token")
    assert np.array_equal(found.numpy(), np.stack(made.expected())[1:3, 0])
    from actcache.store.given import read

    said = [read(store, space.space, "label", store.find_prompt(space, made.texts[i]))[0] for i in (0, 1, 2)]
    assert said == [0, None, 2]
    assert "two labels" in caplog.text and made.texts[1] in caplog.text


def test_whoever_waited_for_what_failed_asks_anew(tmp_path, store, monkeypatch):
    """Two threads, one dataset: what stops the first must not leave the second with rows that nobody has read."""
    made = make(tmp_path / "set", n=30)
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    begun, waiting, failed = threading.Event(), threading.Event(), []
    original = fetching.Dataset.read

    def fails_once(self, *args, **options):
        if not failed:
            failed.append(True)
            begun.set()
            assert waiting.wait(10)
            self.index.source.stop.set()
        return original(self, *args, **options)

    monkeypatch.setattr(fetching.Dataset, "read", fails_once)
    results: dict[int, object] = {}

    def work(i):
        try:
            results[i] = store.read(space, made.texts, "resid_post.0", pooling="last_token").numpy()
        except ac.ActCacheError as error:
            results[i] = error

    first = threading.Thread(target=work, args=(0,))
    first.start()
    assert begun.wait(10)
    second = threading.Thread(target=work, args=(1,))
    second.start()
    waiting.set()
    first.join()
    second.join()
    assert "reading was stopped" in str(results[0])
    assert np.array_equal(results[1], np.stack(made.expected())[:, 0])


def test_a_store_that_lies_elsewhere(tmp_path):
    made = make(tmp_path / "set", labels=list(range(11)))
    backend = ac.MemoryBackend()
    with ac.Store(backend, index_dir=tmp_path / "one") as one:
        ac.pull_dataset(made.folder, store=one)
        one.read(pulled(one), made.texts[:4], "resid_post.0", pooling="last_token")
    with ac.Store(backend, index_dir=tmp_path / "two") as two:
        space = pulled(two)
        assert space.label["pulled"]["forms"]["resid_post"] == "last_token"
        shutil.move(made.folder, tmp_path / "moved")
        found = two.read(space, made.texts[:4], "resid_post.0", pooling="last_token")
        assert np.array_equal(found.numpy(), np.stack(made.expected())[:4, 0])
        shutil.move(tmp_path / "moved", made.folder)
        assert two.read(space, made.texts, "resid_post.5", pooling="last_token").shape == (11, 6)


def test_statistics_are_of_what_is_here(tmp_path, store):
    made = make(tmp_path / "set", k=0)
    ac.pull_dataset(made.folder, store=store)
    space = pulled(store)
    assert store.summaries(space) == []
    store.read(space, made.texts, "resid_post.2", pooling="last_token")
    (summary,) = store.summaries(space)
    assert (summary.site, summary.rows) == ("resid_post.2", 11)
