"""Kernels of another kind of processor, run by an emulator: they stand in for `backend.Kernels` (emulated.cpp)."""

import ctypes
import struct
import subprocess
from pathlib import Path

from roundoff.numerics import build
from roundoff.numerics.backend import Kernels

CALLER = Path(__file__).with_name("emulated.cpp")
FUNCTIONS = ("quantize", "noise", "draw", "norm", "gate", "attend", "fingerprints", "fingerprint", "accumulate")


def compile_caller(directory: Path, compiler: str, machine: str, target: str) -> Path:
    """The program for `target` of another kind of machine, with the flags that its library has; it needs no library."""
    program = directory / f"caller-{target}"
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    sources = [str(build.SOURCES / "roundoff.cpp"), str(CALLER)]
    command = [compiler, *flags, *build.targets(machine)[target], "-static", "-o", str(program), *sources]
    subprocess.run(command, check=True)
    return program


class Emulated:
    """A running program and the calls to it; memory goes there with each call, and results come back."""

    def __init__(self, emulator: str, program: Path, target: str) -> None:
        self.process = subprocess.Popen([emulator, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.calls = dict.fromkeys(FUNCTIONS, 0)
        functions = {name: getattr(self, name) for name in FUNCTIONS}
        self.kernels = Kernels(**functions, path=program, target=target)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)

    def _call(self, name, *arguments) -> None:
        """Call a function. Arguments: an integer, a float, None, or (address, bytes, whether it is written to)."""
        self.calls[name] += 1
        sent, results, places = [struct.pack("=ii", FUNCTIONS.index(name), len(arguments))], [], {}
        for index, argument in enumerate(arguments):
            if argument is None:
                sent.append(struct.pack("=cq", b"n", 0))
            elif isinstance(argument, float):
                sent.append(struct.pack("=cd", b"f", argument))
            elif isinstance(argument, int):
                sent.append(struct.pack("=cq", b"i", argument - (1 << 64) if argument >= 1 << 63 else argument))
            elif argument[0] in places:
                sent.append(struct.pack("=cq", b"a", places[argument[0]]))
            else:
                address, size, written = argument
                places[address] = index
                sent.append(struct.pack("=cq", b"o" if written else b"p", size) + ctypes.string_at(address, size))
                if written:
                    results.append((address, size))
        self.process.stdin.write(b"".join(sent))
        self.process.stdin.flush()
        for address, size in results:
            content = self.process.stdout.read(size)
            assert len(content) == size, f"the emulated program has ended in {name}"
            ctypes.memmove(address, content, size)

    def quantize(self, spec, dtype, x, y, rows, columns, source, given, per_row, random, key, threads) -> None:
        size = rows * columns * (2 if dtype else 4)
        packed = ctypes.create_string_buffer(spec, len(spec))
        scales = per_row and (per_row, 4 * rows, False)
        numbers = (ctypes.addressof(packed), len(spec), False), dtype, (x, size, x == y), (y, size, True)
        self._call("quantize", *numbers, rows, columns, source, float(given), scales, int(random), key, threads)

    def noise(self, dtype, y, out, count, columns, ids, first, std, key, threads) -> None:
        size = count * columns * (2 if dtype else 4)
        index = [pointer and (pointer, 8 * count, False) for pointer in (ids, first)]
        memory = (y, size, y == out), (out, size, True)
        self._call("noise", dtype, *memory, count, columns, *index, float(std), key, threads)

    def draw(self, kind, out, count, columns, ids, first, key, threads) -> None:
        index = [pointer and (pointer, 8 * count, False) for pointer in (ids, first)]
        self._call("draw", kind, (out, 4 * count * columns, True), count, columns, *index, key, threads)

    def norm(self, h, delta, weight, eps, out, rows, n, threads) -> None:
        size = 4 * rows * n
        memory = (h, size, True), delta and (delta, size, False), (weight, 4 * n, False)
        self._call("norm", *memory, float(eps), (out, size, True), rows, n, threads)

    def gate(self, g, up, n, threads) -> None:
        self._call("gate", (g, 4 * n, True), (up, 4 * n, False), n, threads)

    def accumulate(self, a, b, out, rows, length, columns, *numbers) -> None:
        memory = (a, 4 * rows * length, False), (b, 4 * length * columns, False), (out, 4 * rows * columns, True)
        self._call("accumulate", *memory, rows, length, columns, *map(int, numbers))

    def attend(self, pointers, rows, sizes, scale, spec, threads) -> None:
        batch, tokens, heads, kv_heads, start, _, width, capacity, head = list(sizes)[:9]
        many, few = 4 * batch * tokens * heads * head, 4 * batch * tokens * kv_heads * head

        def cache(row, columns):
            last = max(ctypes.cast(row, ctypes.POINTER(ctypes.c_int64))[:batch]) + 1 if row else batch
            return 4 * last * kv_heads * columns * head

        prefix, own, table = cache(rows[0], width), cache(rows[1], capacity), 4 * (start + tokens) * head
        bytes_of = (many, few, few, many, prefix, prefix, own, own, table, table)
        memory = [
            address and (address, size, index < 8 and size > 0)
            for index, (address, size) in enumerate(zip(pointers, bytes_of, strict=True))
        ]
        index = [row and (row, 8 * batch, False) for row in rows]
        packed = (ctypes.c_int64 * 9)(*list(sizes)[:9])
        numbers = (ctypes.addressof(packed), 72, False), float(scale)
        fmt = ctypes.create_string_buffer(spec, len(spec)) if spec else None
        stored = None if fmt is None else (ctypes.addressof(fmt), len(spec), False)
        self._call("attend", *memory, *index, *numbers, stored, threads)

    def fingerprints(self, start, size, lines, step, out) -> None:
        self._call("fingerprints", (start, size, False), size, lines, step, (ctypes.addressof(out), 24, True))

    def fingerprint(self, starts, sizes, count, lines, step, out) -> None:
        pairs = [part for start, size in zip(starts, sizes, strict=True) for part in ((start, size, False), size)]
        self._call("fingerprint", lines, step, (ctypes.addressof(out), 8 * count, True), *pairs)
