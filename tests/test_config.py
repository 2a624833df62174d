"""Settings: calls, variables, defaults, and which of them wins."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import actcache as ac
from actcache import config
from actcache.cli.app import run
from actcache.errors import OptionError
from actcache.store.default import default_store, store_at

GB = 2**30


@pytest.fixture(autouse=True)
def _own_logger() -> Iterator[None]:
    logger = logging.getLogger("actcache")
    level, handlers = logger.level, list(logger.handlers)
    yield
    logger.setLevel(level)
    logger.handlers[:] = handlers
    ac.set_cache_backend(None)


def test_a_store_s_own_limit_wins_over_a_call_over_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, plain = ac.Store(tmp_path, limit_gb=0.5), default_store()
    assert plain.limit == config.Setting(None, "default")
    monkeypatch.setenv("ACTCACHE_MAX_GB", "3.5")
    assert plain.limit == config.Setting(int(3.5 * GB), "ACTCACHE_MAX_GB")
    ac.set_cache_limit(2)
    assert plain.limit == config.Setting(2 * GB, "set_cache_limit()")
    assert own.limit == config.Setting(GB // 2, "Store()")
    ac.set_cache_backend(own)
    assert default_store().limit == config.Setting(GB // 2, "Store()")
    ac.set_cache_limit(None)
    assert plain.limit.value is None
    assert ac.Store(tmp_path, limit_gb=float("inf")).limit == config.Setting(None, "Store()")
    assert own.info().cache_limit_bytes == GB // 2
    ac.set_cache_backend(None)
    assert ac.cache_info().cache_limit_bytes is None


def test_the_limit_of_the_process_is_the_default_store_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever that is at the moment, and whoever names it; no store that somebody made is emptied by it."""
    made, chosen = ac.Store(tmp_path / "made"), ac.Store(tmp_path / "chosen")
    monkeypatch.setenv("ACTCACHE_MAX_GB", "3")
    ac.set_cache_limit(2)
    at_the_default = ac.cache_info().cache_dir
    assert made.limit == store_at(tmp_path / "made").limit == config.Setting(None, "default")
    assert store_at(at_the_default).limit.value == 2 * GB
    ac.set_cache_backend(chosen)
    assert (chosen.limit.value, made.limit.value) == (2 * GB, None)
    assert store_at(str(tmp_path / "chosen")) is chosen
    ac.set_cache_backend(at_the_default)
    assert chosen.limit.value is None
    ac.set_cache_backend(None)
    assert ac.cache_info().cache_limit_bytes == default_store().limit.value == 2 * GB
    monkeypatch.setenv("ACTCACHE_BACKEND", "s3://bucket")
    assert store_at(tmp_path / "made").limit.value is None


@pytest.mark.parametrize("value", ["much", "-1", "nan", "12GB"])
def test_a_limit_that_is_no_size_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("ACTCACHE_MAX_GB", value)
    with pytest.raises(OptionError, match=f"ACTCACHE_MAX_GB is {value!r}"):
        ac.cache_info()
    with pytest.raises(OptionError, match="limit_gb is"):
        ac.Store(tmp_path, limit_gb=value)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="gb is True"):
        ac.set_cache_limit(True)
    assert ac.Store(tmp_path, limit_gb=1).limit.value == GB


def test_a_dtype_in_the_environment_is_one_of_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTCACHE_DTYPE", "float61")
    with pytest.raises(OptionError, match=r"ACTCACHE_DTYPE 'float61'.*'float16'"):
        config.cache_dtype()
    monkeypatch.setenv("ACTCACHE_DTYPE", "int8")
    assert config.cache_dtype() == config.Setting("int8", "ACTCACHE_DTYPE")


def write_something(store: ac.Store) -> None:
    store.write(ac.new_space("m"), ["a"], {"resid_post.0": [np.zeros(4, np.float32)]}, pooling="mean")


def test_the_log_shows_what_is_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = ac.Store(tmp_path)
    write_something(store)
    assert capsys.readouterr().err == ""
    ac.enable_cache_logging()
    ac.enable_cache_logging("info")
    write_something(store)
    lines = [line for line in capsys.readouterr().err.splitlines() if "stored 1 prompts" in line]
    assert len(lines) == 1, "said once, however often logging was enabled"
    assert "actcache.store INFO" in lines[0]


def test_the_variable_sets_the_level_and_a_call_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTCACHE_LOG", "Debug")
    ac.Store(tmp_path)
    assert logging.getLogger("actcache").level == logging.DEBUG
    ac.enable_cache_logging(logging.ERROR)
    ac.Store(tmp_path)
    assert logging.getLogger("actcache").level == logging.ERROR
    monkeypatch.setattr(config, "_chosen", {})
    monkeypatch.setenv("ACTCACHE_LOG", "loud")
    with pytest.raises(OptionError, match="ACTCACHE_LOG is 'loud': expected one of debug"):
        ac.Store(tmp_path)
    with pytest.raises(OptionError, match="level is 'loud'"):
        ac.enable_cache_logging("loud")


def test_the_verb_says_where_each_setting_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACTCACHE_MAX_GB", "2")
    monkeypatch.setenv("ACTCACHE_LOG", "warning")
    assert run(["config", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["store"]["source"] == "ACTCACHE_DIR"
    assert found["limit"] == {"value": 2 * GB, "source": "ACTCACHE_MAX_GB"}
    assert found["dtype"] == {"value": None, "source": "default"}
    assert found["log"] == {"value": logging.WARNING, "source": "ACTCACHE_LOG"}
    ac.set_cache_backend(tmp_path / "called")
    assert run(["config"]) == 0
    out = capsys.readouterr().out
    assert "2.0 GB" in out and "set_cache_backend()" in out and "as computed" in out
    assert run(["config", "--store", str(tmp_path / "given"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"] == {"value": str(tmp_path / "given"), "source": "--store"}
    monkeypatch.setenv("ACTCACHE_MAX_GB", "lots")
    assert run(["config"]) == 2
    assert "ACTCACHE_MAX_GB is 'lots'" in capsys.readouterr().err


@pytest.mark.parametrize("location", ["http://host/x", "s3:///prefix", Path("https://host/x")])
def test_a_url_of_another_kind_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (ac.Store, ac.set_cache_backend, store_at):
        with pytest.raises(OptionError, match=r"s3://"):
            name(location)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for name in (ac.Store, ac.set_cache_backend):
        with pytest.raises(OptionError, match="that is a file: name a folder"):
            name(file)  # type: ignore[operator]
    monkeypatch.setenv("ACTCACHE_BACKEND", str(file))
    with pytest.raises(OptionError, match=r"ACTCACHE_BACKEND is .*that is a file"):
        ac.cache_info()
    assert run(["info", "--store", str(file)]) == 2
    assert file.read_text() == "mine"


def test_a_relative_location_is_that_of_the_folder_it_was_given_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    store = ac.Store("here")
    monkeypatch.setenv("ACTCACHE_BACKEND", "here")
    assert run(["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["store"]["value"] == str(tmp_path / "here")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    write_something(store)
    assert (tmp_path / "here" / "v1").is_dir()
    assert list((tmp_path / "other").iterdir()) == []


def test_of_two_variables_the_one_that_wins_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    monkeypatch.setenv("ACTCACHE_BACKEND", one)
    monkeypatch.setenv("ACTCACHE_DIR", two)
    for _ in range(2):
        assert str(ac.cache_info().cache_dir) == one
    (message,) = caplog.messages
    assert message.startswith(f"ACTCACHE_BACKEND ({one}) wins over ACTCACHE_DIR ({two})")
    assert run(["config"]) == 0
    assert "wins over ACTCACHE_DIR" in " ".join(capsys.readouterr().out.split())
    assert run(["config", "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note == message
    for variable, value in (("ACTCACHE_DIR", one), ("ACTCACHE_BACKEND", "")):
        monkeypatch.setenv(variable, value)
        assert run(["config", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["notes"] == []
