"""The runtime on CUDA with a driver that records what it is asked for."""

from __future__ import annotations

import threading

import pytest
import torch
from fake_cuda import FakeCuda, named
from test_programs import PROMPTS, compiled

from elision.codegen.triton.compile import plan_program
from elision.errors import BadInput
from elision.ir.launch import DeviceCode
from elision.runtime.cuda.decode import Decoder
from elision.runtime.cuda.driver import Cuda, open_driver
from elision.runtime.cuda.engine import Engine


def test_prompts_and_graphs_of_steps() -> None:
    """The tokens of the reference, by parameters as the driver gets them; all steps are one graph, and nothing is read
    between."""
    model = compiled("LlamaConfig")
    code = named(plan_program(model.program))
    fake = FakeCuda(code)
    decoder = Decoder(Engine(model.program, code, model.weights, Cuda(code, fake)), 1, 40)
    decoder.prefill(PROMPTS[:1])
    before = fake.calls.copy()
    found = decoder.decode(4)[0].tolist()
    made = fake.calls - before
    assert made["cuGraphLaunch"] == 3 and made["cuMemcpyDtoHAsync_v2"] == 1 and made["cuStreamBeginCapture_v2"] == 1
    assert fake.calls["cuFuncSetAttribute"] == fake.calls["cuModuleLoadData"] == len(code.kernels)
    expected = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=4, eos_token_id=[])[0, len(PROMPTS[0]) :]
    assert found == expected.tolist()


@pytest.fixture(scope="module")
def code() -> DeviceCode:
    return DeviceCode({}, {}, {})


def test_the_newest_code_that_fits_is_taken(code: DeviceCode) -> None:
    named(code, "cuda:sm_80", "cuda:sm_86", "cuda:sm_90", "hip:gfx942")
    assert Cuda(code, FakeCuda(code, (8, 9))).target == "cuda:sm_86" and Cuda(code, FakeCuda(code, (8, 0))).target == "cuda:sm_80"
    with pytest.raises(BadInput, match=r"sm_100.*only for: cuda:sm_80, cuda:sm_86, cuda:sm_90, hip:gfx942"):
        Cuda(code, FakeCuda(code, (10, 0)))


def test_no_gpu_and_no_driver_are_told(code: DeviceCode, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match="no GPU"):
        Cuda(code, FakeCuda(code, gpus=0))
    monkeypatch.setattr("elision.runtime.cuda.driver.LIBRARY", "libcuda-that-is-not-there.so")
    with pytest.raises(BadInput, match="no NVIDIA driver here"):
        open_driver()


def test_memory_goes_after_launches_are_recorded(code: DeviceCode) -> None:
    """What nothing refers to any more is freed at any time, which would end a recording."""
    named(code)
    fake = FakeCuda(code)
    cuda = Cuda(code, fake)
    address = cuda.allocate(64)
    cuda.record(lambda: cuda.free(address))
    assert fake.calls["cuMemFree_v2"] == 1 and address not in fake.device._memory
    other = cuda.allocate(64)
    cuda.free(other)
    assert other not in fake.device._memory


def test_failures_have_the_words_of_the_driver(code: DeviceCode) -> None:
    named(code)
    fake = FakeCuda(code)
    cuda = Cuda(code, fake)
    fake.fails = "cuMemAlloc_v2"
    with pytest.raises(RuntimeError, match="cuMemAlloc_v2: out of memory"):
        cuda.allocate(1 << 40)


def test_other_threads_wait_while_launches_are_recorded(code: DeviceCode) -> None:
    """What they ask for on the stream would be a part of the graph, and done again with it; each has the context."""
    named(code)
    cuda = Cuda(code, FakeCuda(code))
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(cuda.allocate(64)))

    def launches() -> None:
        other.start()
        other.join(0.05)
        assert not found

    cuda.record(launches)
    other.join(10)
    assert len(found) == 1
