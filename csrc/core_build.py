"""cffi builder of ``vtpmd._core``: what Python shares with the C core, declared once, in C."""

from pathlib import Path

import cffi

CSRC = Path(__file__).resolve().parent

# CPython's own flags carry -DNDEBUG, and leave a declaration that has drifted a mere warning.
FLAGS = [
    "-UNDEBUG",
    "-Werror=int-conversion",
    "-Werror=incompatible-pointer-types",
    "-Werror=implicit-function-declaration",
]

ffibuilder = cffi.FFI()
ffibuilder.cdef((CSRC / "engine/link.cdef.h").read_text())
ffibuilder.cdef("int prctl(int option, ...);\n#define PR_SET_DUMPABLE ...")
ffibuilder.set_source(
    "vtpmd._core",
    '#include <sys/prctl.h>\n#include "engine/link_types.h"',
    include_dirs=[str(CSRC)],
    depends=[str(CSRC / "engine/link.cdef.h"), str(CSRC / "engine/link_types.h")],
    extra_compile_args=FLAGS,
)
