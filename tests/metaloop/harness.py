"""A tabletop small enough for tests, and runs of the metaloop on it as real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from dppo_mcore.practice.ledger import Ledger
from tests.support.sglang_server import shim_path

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {
    "dtype": "fp32", "freeze-vision": False, "fps": 0.5, "max-frames": 16, "min-pixels": 3136, "max-pixels": 3136,
    "loops": 1, "last-sft": True, "base-sft-steps": 8, "base-sft-lr": 2e-3, "optimizer": "muon", "kl-coef": 0.01,
    "rl-lr": 3e-4, "prompts-per-step": 8, "rl-min-steps": 2, "rl-max-steps": 4, "max-prompt-tokens": 512,
    "max-response-tokens": 16, "max-tokens-per-micro-batch": 4096, "global-batch-size": 16, "sft-lr": 1.5e-3,
    "teacher-answers": 1, "tensorboard": False, "save-interval": 3, "data-workers": 0, "reward-workers": 1,
    "eval-samples": 20, "buffer-samples": 96, "sft-max-steps": 5,
}  # fmt: skip


def make_world(folder: Path) -> Path:
    """Clips, manifests, the oracle's answers and a random small checkpoint."""
    sizes = ["--clips-base", "60", "--clips-pool", "60", "--clips-eval", "10"]
    for command in (["make_world", "--out", str(folder), *sizes], ["make_base", "--out", str(folder / "base")]):
        module, *arguments = command
        subprocess.run(
            [sys.executable, "-m", f"examples.tabletop.{module}", *arguments],
            check=True,
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
        )
    return folder


def command(world: Path, run: Path, ranks: int = 1, **changes: object) -> list[str]:
    """The command line of a run; `changes` are options with underscores."""
    options = OPTIONS | {name.replace("_", "-"): value for name, value in changes.items()}
    options = {"model": world / "base", "data": world / "pool.jsonl", "base-data": world / "base.jsonl",
                "general-data": world / "general.jsonl", "eval-data": world / "eval.jsonl",
                "eval-general-data": world / "eval_general.jsonl", "teacher-file": world / "teacher.jsonl",
                "run-folder": run, **options}  # fmt: skip
    flags: list[str] = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    launcher = [sys.executable, "-W", "ignore"]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
    return [*launcher, "-m", "dppo_mcore.train", *flags]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a run in a session of its own, its output appended to `log`."""
    with open(log, "ab") as output:
        return subprocess.Popen(
            arguments, stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )


def environment() -> dict[str, str]:
    """What a process of the product is started with."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), shim_path()]),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def finish(arguments: list[str], log: Path, timeout_s: float = 600.0) -> None:
    """Run to the end; a failure shows the log's end."""
    code = start(arguments, log).wait(timeout_s)
    assert code == 0, log.read_text()[-4000:]


def kill_behind(arguments: list[str], log: Path, mark: str, seconds: float) -> bool:
    """Start a run and SIGKILL all its processes so many seconds after `mark` appeared in what it logs; False if it
    ended by itself before."""
    before = log.stat().st_size if log.exists() else 0
    process = start(arguments, log)
    deadline = time.monotonic() + 600
    while mark.encode() not in log.read_bytes()[before:]:
        if (code := process.poll()) is not None:
            assert code == 0, log.read_text()[-4000:]
            return False
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.01)
    time.sleep(seconds)
    if process.poll() is not None:
        return False
    os.killpg(process.pid, 9)
    process.wait()
    return True


class Oracle:
    """A chat endpoint on loopback that knows the answers to a question, but sees no clip: it takes one of them, the
    same for the same request, a little later."""

    def __init__(self, world: Path, seconds: float) -> None:
        answers = {row["id"]: row["answer"] for row in map(json.loads, open(world / "teacher.jsonl"))}
        by_question: dict[str, set[str]] = {}
        for row in map(json.loads, open(world / "pool.jsonl")):
            question = row["messages"][-1]["content"].replace("<video>", "").strip()
            by_question.setdefault(question, set()).add(answers[row["id"]])
        oracle = self
        self.images: set[int] = set()
        """How many images came with a request."""

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:  # noqa: N802
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                time.sleep(seconds)
                parts = json.loads(raw)["messages"][-1]["content"]
                oracle.images.add(len(parts) - 1)
                text = parts[-1]["text"].split("\n")[0].strip()
                known = sorted(by_question[text])
                answer = known[int(sha256(raw).hexdigest(), 16) % len(known)]
                content = json.dumps({"choices": [{"message": {"content": answer}}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # killed runs reset their connections
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()


def kill_after(arguments: list[str], log: Path, seconds: float) -> bool:
    """Start a run and SIGKILL all its processes after so many seconds; False if it ended by itself before."""
    process = start(arguments, log)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (code := process.poll()) is not None:
            assert code == 0, log.read_text()[-4000:]
            return False
        time.sleep(0.02)
    os.killpg(process.pid, 9)
    process.wait()
    return True


def digest(run: Path) -> str:
    """Hash of a run's ledger, times aside; the file must be sound."""
    with Ledger(run / "ledger.sqlite", write=False) as ledger:
        assert ledger.integrity() == "ok"
        return ledger.digest()


def rows(run: Path) -> list[tuple[str, dict[str, object]]]:
    """Every fact of a run's ledger, times aside, to show where two differ."""
    with Ledger(run / "ledger.sqlite", write=False) as ledger:
        return list(ledger.dump())
