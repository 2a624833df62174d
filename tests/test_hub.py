"""The loopback Hub, as the unmodified client and other people's requests meet it."""

from __future__ import annotations

import hashlib
import http.client
import json
import time
from urllib.parse import urlsplit

import pytest

from actcache.testing.hub import Fault, LoopbackHub
from hub_client import READ_TOKEN, TOKEN, ClientError

SETUP = """
import hashlib, io, os
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
api = HfApi()
def commit(repo, files, **more):
    add = [CommitOperationAdd(path, data.encode()) for path, data in files.items()]
    return api.create_commit(repo, add, commit_message="m", repo_type="dataset", **more).oid
"""


@pytest.fixture(scope="module")
def client(client):
    client.run(SETUP)
    return client


@pytest.fixture
def hub(hub):
    yield hub
    hub.multipart_bytes = None
    hub.page = 1000


@pytest.fixture
def repo(hub, client):
    name = f"user/set{len(hub.repositories)}"
    client.run("api.create_repo(repo, repo_type='dataset'); None", repo=name)
    return name


def puts(hub, since):
    return [r for r in hub.requests[since:] if r.origin == "storage" and r.method == "PUT" and r.status == 200]


class TestRepositories:
    def test_who_asks(self, client):
        assert client.run("api.whoami()['auth']['accessToken']['role']") == "write"

    def test_a_repository_that_exists_is_a_conflict_unless_that_is_expected(self, hub, client, repo):
        with pytest.raises(ClientError) as error:
            client.run("api.create_repo(repo, repo_type='dataset')")
        assert "409" in error.value.message
        url = client.run("str(api.create_repo(repo, repo_type='dataset', exist_ok=True))")
        assert url == f"{hub.url}/datasets/{repo}"

    def test_models_and_datasets_of_one_name_are_two(self, hub, client, repo):
        client.run("api.create_repo(repo); api.upload_file(path_or_fileobj=b'x', path_in_repo='a', repo_id=repo); None")
        assert "a" in hub.repositories[repo].files() and "a" not in hub.dataset(repo).files()

    def test_private_ones_are_seen_with_a_token_only(self, hub, client):
        client.run("api.create_repo('user/secret', repo_type='dataset', private=True); None")
        assert hub.dataset("user/secret").private
        assert client.run("api.repo_exists('user/secret', repo_type='dataset')")
        assert not client.run("HfApi(token=False).repo_exists('user/secret', repo_type='dataset')")

    @pytest.mark.parametrize(("token", "status"), [(False, "401"), (READ_TOKEN, "403"), ("hf_unknown", "401")])
    def test_who_may_not_write_does_not(self, hub, client, repo, token, status):
        before = hub.dataset(repo).refs["main"]
        code = "api.upload_file(path_or_fileobj=b'x', path_in_repo='a', repo_id=repo, repo_type='dataset', token=t)"
        with pytest.raises(ClientError) as error:
            client.run(code, t=token)
        assert status in error.value.message
        assert hub.dataset(repo).refs["main"] == before

    def test_deleting_and_making_private(self, hub, client, repo):
        client.run("api.update_repo_settings(repo, repo_type='dataset', private=True); None")
        assert hub.dataset(repo).private
        client.run("api.delete_repo(repo, repo_type='dataset')")
        assert f"datasets/{repo}" not in hub.repositories

    def test_branches_and_tags(self, hub, client, repo):
        first = client.run("commit(repo, {'a.txt': '1'})")
        client.run("api.create_branch(repo, branch='try/it', repo_type='dataset')")
        client.run("api.create_tag(repo, tag='v1', repo_type='dataset')")
        second = client.run("commit(repo, {'a.txt': '2'}, revision='try/it')")
        refs = client.run(
            "r = api.list_repo_refs(repo, repo_type='dataset')\n"
            "[{b.name: b.target_commit for b in r.branches}, {t.name: t.target_commit for t in r.tags}]"
        )
        assert refs == [{"main": first, "try/it": second}, {"v1": first}]
        read = "open(hf_hub_download(repo, 'a.txt', repo_type='dataset', revision=rev)).read()"
        assert [client.run(read, rev=rev) for rev in ("v1", "try/it", second)] == ["1", "2", "2"]


class TestCommits:
    def test_small_and_large_files_arrive_and_come_back(self, hub, client, repo, tmp_path):
        large = bytes(range(256)) * 5000
        (tmp_path / "tensors").mkdir()
        (tmp_path / "tensors" / "a.safetensors").write_bytes(large)
        (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nhello")
        since = len(hub.requests)
        client.run("api.upload_folder(folder_path=folder, repo_id=repo, repo_type='dataset').oid", folder=str(tmp_path))
        files = hub.dataset(repo).files()
        assert files["tensors/a.safetensors"].large and not files["README.md"].large
        assert hub.dataset(repo).read("tensors/a.safetensors") == large
        assert [r.received for r in puts(hub, since)] == [len(large)]
        code = "p = snapshot_download(repo, repo_type='dataset'); open(p + '/tensors/a.safetensors', 'rb').read()"
        assert client.run(f"{code} == bytes(range(256)) * 5000")
        # Nobody sent a token to the second origin.
        assert all(r.token is None for r in hub.requests if r.origin == "storage")

    def test_what_is_there_is_not_sent_again(self, hub, client, repo):
        client.run("commit(repo, {'a.safetensors': 'x' * 5000})")
        since = len(hub.requests)
        client.run("commit(repo, {'b.safetensors': 'x' * 5000, 'c.safetensors': 'y'})")
        assert [r.received for r in puts(hub, since)] == [1]
        assert set(hub.dataset(repo).files()) == {".gitattributes", "a.safetensors", "b.safetensors", "c.safetensors"}

    def test_large_files_in_parts(self, hub, client, repo):
        hub.multipart_bytes = 1000
        since = len(hub.requests)
        client.run("commit(repo, {'a.safetensors': 'abc' * 1200})")
        assert [r.received for r in puts(hub, since)] == [1000, 1000, 1000, 600]
        assert hub.dataset(repo).read("a.safetensors") == b"abc" * 1200

    def test_of_two_writers_one_learns_of_the_other(self, hub, client, repo):
        parent = client.run("commit(repo, {'a.txt': '1'})")
        client.run("commit(repo, {'a.txt': '2'}, parent_commit=p)", p=parent)
        with pytest.raises(ClientError) as error:
            client.run("commit(repo, {'a.txt': '3'}, parent_commit=p)", p=parent)
        assert "412" in error.value.message
        assert hub.dataset(repo).read("a.txt") == b"2"

    def test_deleting_files_and_folders(self, hub, client, repo):
        client.run("commit(repo, {'a.txt': '1', 'd/b.txt': '2', 'd/e/c.txt': '3', 'dd/x.txt': '4'})")
        client.run(
            "api.create_commit(repo, [CommitOperationDelete('a.txt'), CommitOperationDelete('d/')],"
            " commit_message='m', repo_type='dataset').oid"
        )
        assert set(hub.dataset(repo).files()) == {".gitattributes", "dd/x.txt"}
        titles = client.run("[c.title for c in api.list_repo_commits(repo, repo_type='dataset')]")
        assert titles == ["m", "m", "initial commit"]

    def test_bytes_that_are_not_those_announced_are_refused(self, hub, client, repo):
        wanted = hashlib.sha256(b"good").hexdigest()
        batch = {"operation": "upload", "objects": [{"oid": wanted, "size": 4}]}
        path = f"/datasets/{repo}.git/info/lfs/objects/batch"
        answer = ask(hub, "POST", path, json.dumps(batch).encode(), TOKEN)[1]
        address = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
        status, text = ask(hub, "PUT", address, b"evil")
        assert status == 400 and b"digest" in text
        assert not hub.blobs.has(wanted)
        # And a commit cannot name bytes that are not there.
        lines = [
            {"key": "header", "value": {"summary": "m"}},
            {"key": "lfsFile", "value": {"path": "a", "algo": "sha256", "oid": wanted, "size": 4}},
        ]
        body = b"\n".join(json.dumps(line).encode() for line in lines)
        before = hub.dataset(repo).refs["main"]
        assert ask(hub, "POST", f"/api/datasets/{repo}/commit/main", body, TOKEN)[0] == 400
        assert hub.dataset(repo).refs["main"] == before


class TestListings:
    def test_pages(self, hub, client, repo):
        client.run("commit(repo, {f'd{i % 3}/{i:03d}.txt': 'x' for i in range(50)})")
        hub.page = 7
        names = client.run("api.list_repo_files(repo, repo_type='dataset')")
        assert sorted(names) == sorted([".gitattributes", *(f"d{i % 3}/{i:03d}.txt" for i in range(50))])
        top = client.run("[e.path for e in api.list_repo_tree(repo, repo_type='dataset')]")
        assert sorted(top) == [".gitattributes", "d0", "d1", "d2"]

    def test_what_is_said_of_files(self, hub, client, repo):
        client.run("commit(repo, {'a.txt': 'abc', 'b.safetensors': 'abc'})")
        told = client.run(
            "[[f.path, f.size, f.blob_id, f.lfs and f.lfs.sha256] for f in"
            " api.get_paths_info(repo, ['a.txt', 'b.safetensors', 'absent'], repo_type='dataset')]"
        )
        digest = hashlib.sha256(b"abc").hexdigest()
        oid = hashlib.sha1(b"blob 3\0abc").hexdigest()
        assert told[0] == ["a.txt", 3, oid, None]
        assert told[1][:2] == ["b.safetensors", 3] and told[1][3] == digest and len(told) == 2
        sizes = client.run("{s.rfilename: s.size for s in api.dataset_info(repo, files_metadata=True).siblings}")
        assert sizes["b.safetensors"] == 3

    @pytest.mark.parametrize(
        ("code", "name"),
        [
            ("hf_hub_download(repo, 'absent', repo_type='dataset')", "EntryNotFoundError"),
            ("hf_hub_download(repo, 'a', repo_type='dataset', revision='absent')", "RevisionNotFoundError"),
            ("hf_hub_download('user/absent', 'a', repo_type='dataset')", "RepositoryNotFoundError"),
        ],
    )
    def test_what_is_not_there_is_named(self, client, repo, code, name):
        with pytest.raises(ClientError) as error:
            client.run(code)
        assert error.value.name.endswith(name)


class TestRanges:
    @pytest.fixture
    def address(self, hub, client, repo):
        client.run("commit(repo, {'a.txt': '0123456789', 'a.safetensors': '0123456789'})")
        return f"/datasets/{repo}/resolve/main/"

    @pytest.mark.parametrize("name", ["a.txt", "a.safetensors"])
    @pytest.mark.parametrize(
        ("asked", "found"), [("2-4", b"234"), ("7-", b"789"), ("-3", b"789"), ("8-99", b"89"), ("0-0", b"0")]
    )
    def test_a_part_of_a_file(self, hub, address, name, asked, found):
        since = len(hub.requests)
        status, data, _ = follow(hub, address + name, {"Range": f"bytes={asked}"})
        assert (status, data) == (206, found)
        assert hub.sent(since) == len(found)

    @pytest.mark.parametrize("asked", ["10-", "5-2", "-", "x-y", "0-1,3-4"])
    def test_a_part_that_is_not_there(self, hub, address, asked):
        assert follow(hub, address + "a.txt", {"Range": f"bytes={asked}"})[0] == 416

    def test_tags_tell_contents_apart(self, hub, client, repo, address):
        tags = []
        for content in ("1", "2", "1"):
            client.run("commit(repo, {'a.txt': c, 'a.safetensors': c})", c=content)
            tags.append([follow(hub, address + name, {}, "HEAD")[2] for name in ("a.txt", "a.safetensors")])
        assert tags[0] == tags[2] and tags[0][0] != tags[1][0] and tags[0][1] != tags[1][1]


class TestOutsideItsRoot:
    @pytest.mark.parametrize(
        "path", ["../x", "a/../../x", "/etc/x", "a//b", "a\\..\\b", "./a", ".git/config", "a/.git/x", "a\0b", ""]
    )
    def test_a_commit_with_such_a_path_is_refused(self, hub, repo, path):
        before = hub.dataset(repo).refs["main"]
        for line in (
            {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}},
            {"key": "deletedFolder", "value": {"path": path}},
        ):
            body = b"\n".join(json.dumps(x).encode() for x in ({"key": "header", "value": {"summary": "m"}}, line))
            status, _ = ask(hub, "POST", f"/api/datasets/{repo}/commit/main", body, TOKEN)
            assert status in (400, 404)
        assert hub.dataset(repo).refs["main"] == before

    @pytest.mark.parametrize("name", ["..", "a/../b", "../../x", ".hidden"])
    def test_so_is_such_a_repository(self, hub, name):
        body = json.dumps({"name": name, "organization": "user", "type": "dataset"}).encode()
        assert ask(hub, "POST", "/api/repos/create", body, TOKEN)[0] == 400

    def test_such_an_address_leads_nowhere(self, hub, repo, tmp_path):
        for path in ("../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "%2fetc%2fpasswd"):
            assert ask(hub, "GET", f"/datasets/{repo}/resolve/main/{path}", token=TOKEN)[0] == 404
        for path in ("/blobs/..%2f..%2fetc%2fpasswd?sign=x", "/parts/x/1", "/etc/passwd"):
            assert ask(hub, "GET", hub.storage_url + path)[0] in (403, 501)

    def test_a_folder_with_links_that_lead_out(self, hub, tmp_path):
        outside = tmp_path / "outside"
        outside.write_text("secret")
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "a").symlink_to(outside)
        with pytest.raises(ValueError, match="leads out"):
            hub.create("org/links").commit(tmp_path / "in")

    def test_everything_it_keeps_is_below_its_root(self, tmp_path):
        with LoopbackHub(tmp_path / "root") as hub:
            hub.create("datasets/org/a").commit({"x/y.txt": b"1", "z.safetensors": b"2"})
        assert {p.parts[len(tmp_path.parts)] for p in tmp_path.rglob("*")} == {"root"}
        names = [p.name for p in (tmp_path / "root" / "blobs").iterdir()]
        first = b"*.safetensors filter=lfs\n"
        assert sorted(names) == sorted(hashlib.sha256(data).hexdigest() for data in (b"1", b"2", first))


class TestFaults:
    def test_too_many_requests_with_a_time_to_wait(self, hub, repo):
        fault = hub.inject(Fault(path="/api/datasets/", status=429, retry_after=7))
        status, _, headers = request(hub, "GET", f"/api/datasets/{repo}", token=TOKEN)
        assert (status, headers["Retry-After"], fault.struck) == (429, "7", 1)

    def test_an_upload_that_is_refused_once(self, hub, client, repo):
        fault = hub.inject(Fault(method="PUT", path="/blobs/", status=503))
        since = len(hub.requests)
        client.run("commit(repo, {'a.safetensors': 'x' * 3000})")
        assert fault.struck == 1 and len(puts(hub, since)) == 1
        assert hub.dataset(repo).read("a.safetensors") == b"x" * 3000

    def test_an_upload_that_is_cut(self, hub, client, repo):
        fault = hub.inject(Fault(method="PUT", path="/blobs/", cut_upload=100_000))
        since = len(hub.requests)
        client.run("commit(repo, {'a.safetensors': 'x' * 3_000_000})")
        first = next(r for r in hub.requests[since:] if r.method == "PUT")
        assert fault.struck == 1 and first.status is None and 100_000 <= first.received < 400_000
        assert hub.dataset(repo).read("a.safetensors") == b"x" * 3_000_000

    def test_a_download_that_is_cut(self, hub, client, repo):
        client.run("commit(repo, {'a.safetensors': 'y' * 3_000_000})")
        fault = hub.inject(Fault(method="GET", path="/blobs/", cut_answer=1_000_000))
        since = len(hub.requests)
        code = "len(open(hf_hub_download(repo, 'a.safetensors', repo_type='dataset')).read())"
        with pytest.raises(ClientError):
            client.run(code)
        assert fault.struck == 1 and hub.sent(since, origin="storage") == 1_000_000
        assert client.run(code) == 3_000_000

    def test_a_commit_whose_answer_is_lost_was_made(self, hub, client, repo):
        hub.inject(Fault(method="POST", path="/commit/", lose_answer=True))
        with pytest.raises(ClientError):
            client.run("commit(repo, {'a.txt': '1'})")
        assert hub.dataset(repo).read("a.txt") == b"1"

    def test_after_so_many_and_so_often(self, hub, repo):
        fault = hub.inject(Fault(method="GET", path="/api/datasets/", status=500, skip=2, times=2))
        codes = [ask(hub, "GET", f"/api/datasets/{repo}", token=TOKEN)[0] for _ in range(6)]
        assert codes == [200, 200, 500, 500, 200, 200] and fault.struck == 2 and fault.seen == 6

    def test_slow(self, hub, client, repo):
        client.run("commit(repo, {'a.txt': 'x' * 1000})")
        hub.inject(Fault(method="GET", path="a.txt", delay=0.2, rate=5000.0))
        start = time.perf_counter()
        assert len(follow(hub, f"/datasets/{repo}/resolve/main/a.txt", {})[1]) == 1000
        assert 0.4 <= time.perf_counter() - start < 5

    def test_a_route_it_does_not_know(self, hub):
        assert ask(hub, "GET", "/api/spaces/user/x")[0] == 501


def ask(hub, method, address, body=None, token=None, headers=None):
    status, data, _ = request(hub, method, address, body, token, headers)
    return status, data


def request(hub, method, address, body=None, token=None, headers=None):
    origin = next((o for o in (hub.url, hub.storage_url) if address.startswith(o)), hub.url)
    connection = http.client.HTTPConnection(urlsplit(origin).netloc, timeout=30)
    sent = dict(headers or {}) | ({"Authorization": f"Bearer {token}"} if token else {})
    # As it is written: `..` is not resolved on the way.
    connection.request(method, address.removeprefix(origin), body, sent)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def follow(hub, address, headers, method="GET"):
    status, data, got = request(hub, method, address, None, TOKEN, headers)
    tag = got.get("X-Linked-ETag") or got.get("ETag")
    if status == 302 and method == "GET":
        status, data, got = request(hub, method, got["Location"], None, None, headers)
    return status, data, tag
