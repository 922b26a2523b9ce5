"""Which backends the tests can try here: the kernels where there is a C++ compiler, plain torch everywhere."""

import pytest

from roundoff.numerics.backend import COMPILERS, BuildError, find_compiler

try:
    COMPILER = find_compiler(COMPILERS)
except BuildError:
    COMPILER = ""

needs_compiler = pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
BACKENDS = (pytest.param("compiled", marks=needs_compiler), pytest.param("torch"))
