"""Processes of their own: without packages or network, and one that stays for many short pushes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


# Runs pieces of code that come line by line, and answers each with the value of `result` or with its error.
WORKER = """
import contextlib, json, os, sys, time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
sleeps = []
time.sleep = sleeps.append
names = {"sleeps": sleeps}
for line in sys.stdin:
    names["result"] = None
    try:
        exec(json.loads(line), names)
        answer = {"result": names["result"], "error": None}
    except Exception as error:
        answer = {"result": None, "error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), file=answers, flush=True)
"""


# What every process below starts with: packages that can't be imported, and no network.
BLOCKED = """
import socket, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

def refuse(*args, **kwargs):
    raise OSError("the network is blocked")

BLOCKED = set(sys.argv[1].split(","))
sys.meta_path.insert(0, Blocker())
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

import torch
from safetensors.torch import load_file, save_file
"""


def run_apart(script: str, blocked: str, folders: list[Path], home: Path) -> None:
    """Runs a script in a fresh interpreter that sees neither this directory nor PYTHONPATH."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-I", "-c", script, blocked, *map(str, folders)],
        env=environment,
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def environment(endpoint: str, home: Path, **others: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return {
        **kept,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",  # this Hub stores large files by Git LFS
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
        **others,
    }


class Worker:
    """A process that stays, for the many short pushes."""

    def __init__(self, endpoint: str, home: Path):
        self.log = home / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment(endpoint, home, HF_TOKEN="good-token"),
            cwd=home,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )

    def run(self, code: str) -> Any:
        answer = self.ask(code)
        assert answer["error"] is None, answer["error"] + "\n" + self.log.read_text()[-3000:]
        return answer["result"]

    def fails(self, code: str) -> str:
        answer = self.ask(code)
        assert answer["error"] is not None, f"{code} gave {answer['result']}"
        return " ".join(answer["error"].split())

    def ask(self, code: str) -> dict[str, Any]:
        print(json.dumps(code), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-3000:]
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def publish(self, folder: Path, repo_id: str, **options: Any) -> str:
        """The code that publishes; its result is the commit's oid."""
        return f"result = publish_folder({str(folder)!r}, {repo_id!r}, **{options!r}).oid"
