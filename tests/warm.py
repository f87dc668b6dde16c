"""Commands in a process of their own, without the seven seconds of importing torch, timm and MLflow's store.

A server imports what commands import and forks itself for each. `program()` is a folder with a `wardround`, and a
`python` for `-c CODE`, that ask the server, with their arguments, folder, environment and streams, and end as what
they started ends. Not for what is killed or limited from outside: that would meet the one who asks.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

IMPORTED = (
    "wardround.cli",
    "wardround.client.app",
    "wardround.client.check",
    "wardround.demo",
    "wardround.downstream.evaluate",
    "wardround.provision",
    "wardround.report.measured",
    "wardround.report.reconstruction",
    "wardround.server.report",
    "wardround.server.superlink",
    # What the above import when they come to need it: half of the CPU of a short run.
    "lightning_fabric",
    "matplotlib.backends.backend_agg",
    "mlflow.store.model_registry.sqlalchemy_store",
    "mlflow.store.tracking.sqlalchemy_store",
)
CLIENT = """#!{python} -SE
import json, os, signal, socket, sys
if {name!r} == "python" and sys.argv[1:2] != ["-c"]:
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
text = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(text).to_bytes(8, "big")], [0, 1, 2])
server.sendall(text)
answers = server.makefile()
process = int(answers.readline())
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: os.kill(process, number))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if code != -signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def program() -> Path:
    """Return the folder of `wardround` and `python`; the server behind them ends with this process."""
    folder = Path(tempfile.mkdtemp(prefix="warm"))
    address = str(folder / "socket")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__, address], env=environment, stdout=subprocess.PIPE)
    atexit.register(server.kill)
    assert server.stdout is not None and server.stdout.readline(), "the server says when it is there"
    for name in ("wardround", "python"):
        (folder / name).write_text(CLIENT.format(python=sys.executable, address=address, name=name))
        (folder / name).chmod(0o755)
    return folder


def serve(address: str) -> tuple[str, list[str]]:
    """Fork for each command that comes; return, in the fork, which program it is and its arguments."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # what is shared is not to be looked at, and so copied, in each fork
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        asked, _ = listening.accept()
        if os.fork():
            asked.close()
            continue
        listening.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        head, streams, _, _ = socket.recv_fds(asked, 8, 3)
        length = int.from_bytes(head, "big")
        name, arguments, folder, environment = json.loads(asked.makefile("rb").read(length))
        if process := os.fork():
            asked.sendall(f"{process}\n".encode())
            _, status = os.waitpid(process, 0)
            asked.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            os._exit(0)
        asked.close()
        become(folder, environment, streams)
        return name, arguments


def become(folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Take over a command's folder, environment and streams."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)


def run(name: str, arguments: list[str]) -> int:
    """Run the command, or the code, and return its exit code."""
    from wardround.cli import main

    try:
        if name == "python":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = [name, *arguments]
            main()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = run(*serve(sys.argv[1]))
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking down what was imported would take as long again as the command
