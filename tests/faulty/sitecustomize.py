"""What goes wrong in the workers of a distributed run, as the variable ACTCACHE_TEST_FAULT says; nothing elsewhere.

JSON: `slow`: seconds that each batch takes longer. `fatal`: a token; a batch with it ends the process. `failing`:
likewise, and the batch raises. `count`: a file that has a
line for each of those. `once`: a file; who makes it ends its process in the second batch. `together`: a folder;
no first batch is run before two processes have one. `loud`: each batch logs and warns. `gone`: a folder that is away
before anything is begun. `environment`: variables of these processes alone. `ends`: the status with which they end at
once. `everywhere`: the same in any process.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

_WORKERS = ("default_worker.py", "actcache.distributed.process")


def _wait(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    deadline = time.monotonic() + 200
    while len(list(folder.iterdir())) < 2:
        if time.monotonic() > deadline:
            raise TimeoutError("only one process has anything to do")
        time.sleep(0.05)


def _install(fault: dict[str, Any]) -> None:
    if "ends" in fault:
        os._exit(fault["ends"])
    os.environ.update(fault.get("environment", {}))
    if "gone" in fault:
        shutil.rmtree(fault["gone"], ignore_errors=True)
    from actcache.extract.backends.local import LocalSession

    run = LocalSession.run
    batches = 0

    def faulty(self: Any, sequences: Any, *rest: Any) -> Any:
        nonlocal batches
        batches += 1
        time.sleep(fault.get("slow", 0))
        tokens = {int(token) for sequence in sequences for token in sequence}
        if fault.get("loud"):
            logging.getLogger("actcache.store").warning("an odd %s", "prompt")
            logging.getLogger("actcache.store").info("what nobody has asked for")
            logging.getLogger("transformers.some").warning("an odd configuration")
            warnings.warn("an odd value", stacklevel=1)
        if "together" in fault and batches == 1:
            _wait(Path(fault["together"]))
        if fault.get("failing") in tokens:
            if "count" in fault:
                with open(fault["count"], "a") as file:
                    file.write("failed\n")
            raise RuntimeError("this batch fails")
        if fault.get("fatal") in tokens:
            os.kill(os.getpid(), signal.SIGKILL)
        if "once" in fault and batches == 2:
            try:
                os.close(os.open(fault["once"], os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return run(self, sequences, *rest)
            os.kill(os.getpid(), signal.SIGKILL)
        return run(self, sequences, *rest)

    LocalSession.run = faulty  # type: ignore[method-assign]


if "ACTCACHE_TEST_FAULT" in os.environ:
    _fault = json.loads(os.environ["ACTCACHE_TEST_FAULT"])
    if _fault.get("everywhere") or any(name in part for part in sys.orig_argv for name in _WORKERS):
        _install(_fault)
