"""Native threads: parked when idle, shared by models, gone after a fork, and not troubled by an interrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import elision
from elision.ir.tokens import Tokens
from elision.runtime import session
from elision.runtime.native.pool import physical_cores

IDS = torch.tensor([[3, 5, 7, 11]])


@pytest.fixture(scope="module")
def path(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("threads") / "tiny.elision"
    llama.compiled.save(path)
    return path


@pytest.fixture(scope="module")
def tokens(llama: Any) -> torch.Tensor:
    return llama.compiled.generate(IDS, max_new_tokens=20)  # type: ignore[no-any-return]


def test_every_number_of_threads_gives_the_same_tokens(path: Path, tokens: torch.Tensor, llama: Any) -> None:
    assert llama.compiled.engine.threads == physical_cores()
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 5):
        model = elision.load(path, threads=threads)
        assert model.engine.threads == threads
        assert torch.equal(model.generate(IDS, max_new_tokens=20), tokens)
        seen: list[int] = []
        model.generate(IDS, max_new_tokens=2, streamer=lambda *_, seen=seen: seen.append(torch.get_num_threads()))
        assert set(seen) == {1}, "torch's threads rest while ours run"
    assert torch.get_num_threads() == before


def test_idle_threads_use_no_time(path: Path, tokens: torch.Tensor) -> None:
    model = elision.load(path, threads=4)
    assert torch.equal(model.generate(IDS, max_new_tokens=20), tokens)
    time.sleep(0.1)
    start = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - start < 0.05


def test_two_models_from_two_threads(path: Path, tokens: torch.Tensor) -> None:
    models = [elision.load(path, threads=2), elision.load(path, threads=2)]
    wrong: list[Any] = []

    def work(model: elision.Model) -> None:
        for _ in range(5):
            found = model.generate(IDS, max_new_tokens=20)
            if not torch.equal(found, tokens):
                wrong.append(found)

    workers = [threading.Thread(target=work, args=(m,)) for m in (*models, models[0])]  # one of them from two threads
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    assert not any(w.is_alive() for w in workers) and not wrong


def test_what_a_run_was_given_may_go_as_soon_as_it_returns(path: Path, tokens: torch.Tensor) -> None:
    """A worker that is late to leave must not look at the context of that run: a model that goes takes it along."""
    code = (
        "import sys, torch, elision\n"
        "from elision.runtime.native.engine import Engine\n"
        "launch, gone = Engine.launch, []\n"
        "def leave(self, start):\n"
        "    end = launch(self, start)\n"
        "    gone.append(self._context)\n"
        "    self._context = gone[-1].copy()\n"
        "    gone[-1][:] = 0\n"
        "    return end\n"
        "Engine.launch = leave\n"
        "model = elision.load(sys.argv[1], threads=6)\n"
        "for _ in range(10):\n"
        "    print(model.generate(torch.tensor([[3, 5, 7, 11]]), max_new_tokens=20).tolist())\n"
        "assert len(gone) > 100\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines() == [str(tokens.tolist())] * 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_the_child_of_a_fork_generates(path: Path, tokens: torch.Tensor) -> None:
    code = (
        "import os, sys, signal, threading, torch, elision\n"
        f"m = elision.load({str(path)!r}, threads=3)\n"
        f"ids = torch.tensor({IDS.tolist()})\n"
        "first = m.generate(ids, max_new_tokens=20)\n"
        "stop = threading.Event()\n"
        "def busy():\n"
        "    while not stop.is_set(): m.generate(ids, max_new_tokens=20)\n"
        "t = threading.Thread(target=busy); t.start()\n"  # the fork comes in the middle of a run
        "for _ in range(5):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        signal.alarm(30)\n"
        "        os._exit(0 if torch.equal(m.generate(ids, max_new_tokens=20), first) else 1)\n"
        "    assert os.waitpid(pid, 0)[1] == 0\n"
        "stop.set(); t.join()\n"
        "print(m.generate(ids, max_new_tokens=20).tolist())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(elision.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tokens.tolist())


def test_an_interrupt_leaves_the_model_usable(path: Path, tokens: torch.Tensor, request: pytest.FixtureRequest) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where tests run in the background
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    model = elision.load(path, threads=2)
    before = torch.get_num_threads()
    model.generate(IDS, max_new_tokens=2)
    interrupted = 0
    for delay in (0.001, 0.003, 0.006, 0.01):
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        end = time.monotonic() + 3
        try:
            timer.start()
            while time.monotonic() < end:  # Python drops an interrupt that comes in a callback, such as a weak reference's
                model.generate(IDS, max_new_tokens=50)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert torch.get_num_threads() == before
        assert torch.equal(model.generate(IDS, max_new_tokens=20), tokens)
    assert interrupted


def test_a_prefill_call_has_bounded_tokens(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows share the tokens of a call; the logits are those of one call."""
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 128, (n,), generator=draw).tolist() for n in (9, 1, 30, 17, 4, 2)]
    whole = session.Session(llama.compiled._interpreter, len(prompts), 64).prefill(prompts)
    sizes: list[int] = []
    chunk = Tokens.chunk

    def counted(counts: Any, *more: Any) -> Tokens:
        sizes.append(sum(counts))
        return chunk(counts, *more)

    monkeypatch.setattr(Tokens, "chunk", counted)
    parts = session.Session(llama.compiled._interpreter, len(prompts), 64).prefill(prompts, chunk=16)
    assert sizes == [16, 16, 16, 15]
    torch.testing.assert_close(parts, whole)
