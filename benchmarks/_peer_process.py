"""One library at work in a process of its own interpreter, and the environment that it is installed in."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKERS = Path(__file__).parent / "peers_workers"


@dataclass(frozen=True)
class Library:
    """A library to compare with.

    Attributes:
        script: what does its work, in `WORKERS`.
        requirements: what pip is asked for, and `alone`, without what that asks for in turn.
        keeps: whether its work ends on disk.
    """

    name: str
    script: str
    requirements: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    keeps: bool = False


PEERS = (
    Library("nnsight", "with_nnsight.py", ("nnsight==0.8.1",)),
    Library("transformer-lens", "with_transformer_lens.py", ("transformer-lens==3.9.0",)),
    Library("lmprobe", "with_lmprobe.py", ("lmprobe==0.10.3",), keeps=True),
    Library(
        "easyroutine",
        "with_easyroutine.py",
        # It asks for vllm and torchvision of one release of torch, which nothing of its interpretability imports.
        (
            "transformers==4.51.1",
            "numpy<2",
            "accelerate",
            "einops",
            "litellm",
            "pandas",
            "pillow",
            "pydantic",
            "python-dotenv",
            "pyyaml",
            "rich",
            "sentencepiece",
        ),
        alone=("easyroutine==1.1.5",),
    ),
)
OURS, BARE = Library("actcache", "with_actcache.py"), Library("bare", "bare.py")


def interpreter(library: Library, given: Path | None, folder: Path, torch: str | None) -> tuple[Path | None, str]:
    """Python of `library`'s environment: of the one given, else of ``folder/NAME``, made with pip where it is missing.

    `torch` is what pip is asked for first, a requirement or arguments; None: nothing is installed.
    Returns None and why where there is none.
    """
    place = given or folder / library.name
    python = place / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = place / "installed-for-peers"
    wanted = " ".join([*library.requirements, *library.alone])
    if given is not None:
        return (python, "") if python.exists() else (None, f"no interpreter at {python}")
    if done.is_file() and done.read_text() == wanted:
        return python, ""
    if torch is None:
        return None, "not installed"
    print(f"installing {wanted} into {place}", file=sys.stderr, flush=True)
    pip = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    # torch first and alone: the libraries find it there, and both sides run the same kernels.
    steps = [
        [sys.executable, "-m", "venv", "--clear", str(place)],
        [*pip, *shlex.split(torch)],
        [*pip, *library.requirements],
        *([[*pip, "--no-deps", *library.alone]] if library.alone else []),
    ]
    for step in steps:
        run = subprocess.run(step, capture_output=True, text=True)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or [run.stderr]
            return None, f"pip: {' '.join(lines[-1].split())[:200]}"
    done.write_text(wanted)
    return python, ""


class Worker:
    """A worker process. `started` is what it said first; `ask` sends a job and waits for its answer.

    A process that ends, or says nothing for `limit` seconds, has crashed: so says this and every later answer.
    """

    def __init__(self, python: Path, script: Path, scratch: Path, *, limit: float, keep_path: bool = False) -> None:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            "ACTCACHE_DIR": str(scratch / "actcache"),
            "LMPROBE_CACHE_DIR": str(scratch / "lmprobe"),
        }
        if not keep_path:
            environment.pop("PYTHONPATH", None)
        self._limit = limit
        # Of this process alone: its last line is told when it ends.
        self._log = scratch / f"{script.stem}-{len(list(scratch.glob('*.log')))}.log"
        self._lines = self._log.open("ab")
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._lines,
            env=environment,
            cwd=scratch,
            text=True,
        )
        self.started = self._answer()

    def ask(self, do: str, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **job}) + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._ended()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        watch = threading.Timer(self._limit, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        if not line.endswith("\n"):
            return self._ended()
        try:
            said = json.loads(line)
            assert isinstance(said, dict)
            assert "outcome" in said
        except (ValueError, AssertionError):
            return {"outcome": "crashed", "why": f"no answer of a worker: {line.strip()[:100]!r}"}
        return said

    def _ended(self) -> dict[str, Any]:
        self._process.kill()
        why = f"the process ended with {self._process.wait()}"
        said = self._log.read_text("utf-8", "replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return {"outcome": "crashed", "why": f"{why}: {last[:200]}" if last else why}

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._lines):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    # What was not yet sent goes with the process.
                    continue

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
