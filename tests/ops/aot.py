"""Compile kernels for a GPU that is not here, and read off the machine code what they need.

    builds = launched_by(lambda: permute.permute(x_TD, assignment_R, rows_TK))  # on device="meta": any size
    for build, report in zip(builds, compile_all(builds), strict=True): ...

`compile_all` runs in a process of its own, since a test process decorates its kernels for the interpreter.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

# What a block may have on an H100, in bytes.
MAX_SHARED = 227 * 1024
TARGET = ("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Build:
    """One kernel with one set of constants.

    kernel: dotted name of the module and the kernel in it. signature: argument -> type ("*bf16", "i32"), constants
    left out. constexprs: argument -> value; None for a pointer that is not given. options: num_warps, num_stages.
    aligned: integer arguments that are multiples of 16; every pointer is taken to be.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()

    def __str__(self) -> str:
        types = sorted({kind for kind in self.signature.values() if kind.startswith("*")})
        constants = (f"{name}={value}" for name, value in self.constexprs.items())
        return " ".join([self.kernel.rpartition(".")[2], *types, *constants])


@dataclass(frozen=True)
class Report:
    """registers and spills (bytes on the stack) of a thread; shared memory of a block in bytes; ptx."""

    registers: int
    spills: int
    shared: int
    ptx: str


def launched_by(call: Callable[[], object]) -> list[Build]:
    """The kernels that `call` launches, recorded and not run: its tensors may be on device "meta"."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    builds: list[Build] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        builds.append(_build_of(kernel.fn, args, kwargs))

    with mock.patch.object(InterpretedFunction, "run", record), mock.patch.object(JITFunction, "run", record):
        call()
    return builds


def _build_of(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Build:
    parameters = inspect.signature(function).parameters
    values = dict(zip(parameters, args, strict=False)) | {k: v for k, v in kwargs.items() if k in parameters}
    constants = {k: v for k, v in values.items() if v is None or "constexpr" in str(parameters[k].annotation)}
    signature = {}
    for name in parameters.keys() - constants.keys():
        value = values[name]
        signature[name] = _type_of(value)
    aligned = tuple(name for name in signature if isinstance(values[name], int) and values[name] % 16 == 0)
    options = {k: v for k, v in kwargs.items() if k not in parameters}
    return Build(f"{function.__module__}.{function.__name__}", signature, constants, options, aligned)


def _type_of(value: Any) -> str:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_all(builds: Sequence[Build]) -> list[Report]:
    """One report for each build, or an error with the compiler's own words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.run(
            [sys.executable, "-m", "tests.ops.aot"],
            input=json.dumps([asdict(build) for build in builds]),
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env=environment | {"TRITON_CACHE_DIR": cache},
        )
    assert process.returncode == 0, process.stderr
    return [Report(**report) for report in json.loads(process.stdout)]


def _compile(build: Build) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, _, name = build.kernel.rpartition(".")
    kernel = getattr(importlib.import_module(module), name)
    names = kernel.arg_names
    unknown = set(names) ^ (build.signature.keys() | build.constexprs.keys())
    assert not unknown, f"{build.kernel} takes {names}; too many or too few: {sorted(unknown)}"
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    aligned = [n for n, kind in build.signature.items() if kind.startswith("*") or n in build.aligned]
    # Without these the compiler may not use wide or asynchronous copies, and the check would be of another kernel.
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, build.constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget(*TARGET), options=build.options)
    registers, stack = _resources(compiled.asm["cubin"])
    return Report(registers, stack, compiled.metadata.shared, compiled.asm["ptx"])


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) in the machine code, by the tool in Triton's wheel."""
    import triton.knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", usage)
    return int(registers), int(stack)


if __name__ == "__main__":
    json.dump([asdict(_compile(Build(**build))) for build in json.load(sys.stdin)], sys.stdout)
