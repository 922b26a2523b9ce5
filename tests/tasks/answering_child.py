"""A child for the tests of `LimitedProcess`, which can be asked to exceed each of its limits."""

import sys
import time

from roundoff.tasks.limited_child import serve


def nested(depth):
    return nested(depth + 1)


def answer(question):
    print("what a package prints is no answer")
    print("nor is this", file=sys.stderr)
    while "loop" in question:
        pass
    if "power" in question:
        10 ** (10**10)  # inside one call into C
    if "sleep" in question:
        time.sleep(60)  # uses no processor time
    if "memory" in question:
        bytearray(4 << 30)
    if "depth" in question:
        nested(0)
    if "exit" in question:
        import os

        os._exit(1)
    return {"said": question["say"]}


def main():
    serve(lambda: answer)
