"""A process with the real client in it, whose address of the Hub is read once, at import: code in, JSON out."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

TOKEN = "hf_averysecrettoken"
READ_TOKEN = "hf_mayonlyread"


class ClientError(Exception):
    """What the code raised there: the name of its class, its message, the traceback."""

    def __init__(self, name: str, message: str, trace: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name
        self.message = message
        self.trace = trace


class Client:
    """`run` executes code in the process and returns the value of its last expression (JSON).

    Names stay from one call to the next; `values` are variables. `log` is all that the process wrote to its standard
    error, warnings and progress included.
    """

    def __init__(self, hub, home: Path, *, token: str | None = TOKEN, **environment: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home = home
        self._log = home / "log.txt"
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        variables |= hub.environment(home / "hub")
        variables |= {"XDG_CACHE_HOME": str(home), "ACTCACHE_DIR": str(home / "store")}
        variables |= {} if token is None else {"HF_TOKEN": token}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, __file__],
                env=variables | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def run(self, code: str, **values):
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"code": code, "values": values}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.close()
            raise ClientError("Ended", f"the process ended with {self.process.returncode}", self.log)
        answer = json.loads(line)
        if "error" in answer:
            raise ClientError(answer["error"], answer["message"], answer["trace"])
        return answer["value"]

    def kill(self) -> None:
        """End the process as a lost machine does: nothing of it runs any more."""
        os.kill(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self.process.wait(30)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _execute(code: str, names: dict):
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<code>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<code>", "eval"), names) if last is not None else None


def main() -> None:
    # Whatever libraries print is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    names: dict = {}
    for line in sys.stdin:
        request = json.loads(line)
        names |= request["values"]
        try:
            answer = {"value": _execute(request["code"], names)}
            text = json.dumps(answer, default=str)
        except BaseException as error:
            text = json.dumps(
                {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}, default=str
            )
        print(text, file=answers, flush=True)


if __name__ == "__main__":
    main()
