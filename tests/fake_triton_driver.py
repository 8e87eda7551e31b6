"""Launches every kernel through Triton's own launch path, with a driver that stands for a GPU: `python FILE ARCH ...`.

Binding of the arguments, their specialisation, the cache's key, compilation to a binary and the checks of what a device
has are Triton's; loading the binary and running it are not done. Prints a line of JSON: what was launched and compiled.
Must not see TRITON_INTERPRET.
"""

import collections
import json
import sys
import time

import torch
import triton
from triton.runtime import driver

from bench.gpu.compiling import OfflineDriver
from pdae_fast.kernels import aot
from pdae_fast.kernels._launch import run


class Driver(OfflineDriver):
    """The visit's driver, as strict as a GPU is; ``launches`` are (kernel's name, grid)."""

    def __init__(self, arch):
        super().__init__(arch)
        self.launches = []

    def load_binary(self, name, binary, shared, device):
        assert binary[:4] == b"\x7fELF" and shared <= self.get_device_properties(device)["max_shared_mem"]
        return super().load_binary(name, binary, shared, device)

    def launcher_cls(self, source, metadata):
        names, signature = source.fn.arg_names, source.signature

        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, *arguments):
            assert len(arguments) == len(names) == len(signature)
            for name, value in zip(names, arguments, strict=True):
                kind = signature[name]
                if kind.startswith("*"):
                    assert isinstance(value, torch.Tensor), name
                elif kind != "constexpr":
                    assert isinstance(value, float if kind.startswith("fp") else int), name
                    assert kind != "i32" or -(2**31) <= value < 2**31, name
            assert 0 < x < 2**31 and 0 < y <= 65535 and 0 < z <= 65535
            self.launches.append((source.fn.__name__, (x, y, z)))

        return launch


def launch_all(arch, chosen):
    """Launch what ``chosen(what, launch)`` takes of the launches that the ahead-of-time check compiles, twice."""
    fake = Driver(arch)
    driver.set_active(fake)
    start, compiled = time.perf_counter(), 0
    cases = ((what, launch) for what, launch in aot.cases(torch.bfloat16) if aot.runs_on(launch, arch))
    launches = [launch for what, launch in cases if chosen(what, launch)]
    for launch in launches:
        run([launch])
    compiled = time.perf_counter() - start
    start = time.perf_counter()
    for launch in launches:  # finds what is compiled
        run([launch])
    again = time.perf_counter() - start
    counts = collections.Counter(name for name, _ in fake.launches)
    return {"launches": counts, "seconds": compiled, "again": again, "kernels": len(launches)}


def main():
    seen = set()

    def first_of_each(what, launch):
        name = launch.kernel.fn.__name__
        new = name not in seen
        seen.add(name)
        return new

    whole, *others = map(int, sys.argv[1:])
    found = {whole: launch_all(whole, lambda what, launch: "NCHW" not in what and "no bias" not in what)}
    for arch in others:
        seen.clear()
        found[arch] = launch_all(arch, first_of_each)
    print(json.dumps({"triton": triton.__version__, "found": found}))


if __name__ == "__main__":
    main()
