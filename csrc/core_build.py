"""cffi builder of ``vtpmd._core``: what Python shares with the C core, declared once, in C."""

from pathlib import Path

import cffi

CSRC = Path(__file__).resolve().parent
SOURCES = [
    "aead.c",
    "cipher.c",
    "crc32c.c",
    "delta.c",
    "digest.c",
    "engine/blob.c",
    "engine/control.c",
    "engine/handover.c",
    "engine/lane.c",
    "engine/unasked.c",
    "image_digest.c",
    "journal_format.c",
    "journal_recover.c",
    "linear_format.c",
    "pages.c",
    "slice.c",
    "swtpm_format.c",
]
HEADERS = [
    "aead.h",
    "bytes.h",
    "check.h",
    "cipher.h",
    "crc32c.h",
    "delta.h",
    "digest.h",
    "engine/blob.h",
    "engine/control.h",
    "engine/custody.h",
    "engine/handover.cdef.h",
    "engine/handover.h",
    "engine/image.h",
    "engine/lane.h",
    "engine/staged.h",
    "engine/tail.h",
    "engine/unasked.h",
    "epoch.h",
    "image_digest.h",
    "journal_format.h",
    "journal_recover.h",
    "linear_format.h",
    "pages.h",
    "slice.h",
    "swtpm_format.h",
]
DECLARATIONS = [
    "engine/handover.cdef.h",
    "engine/link.cdef.h",
    "engine/codecs.cdef.h",
    "core.cdef.h",
]

# CPython's own flags carry -DNDEBUG, and leave a declaration that has drifted a mere warning.
FLAGS = [
    "-D_GNU_SOURCE",
    "-UNDEBUG",
    "-Werror=int-conversion",
    "-Werror=incompatible-pointer-types",
    "-Werror=implicit-function-declaration",
]

ffibuilder = cffi.FFI()
for name in DECLARATIONS:
    ffibuilder.cdef((CSRC / name).read_text())
ffibuilder.cdef("int prctl(int option, ...);\n#define PR_SET_DUMPABLE ...")
ffibuilder.set_source(
    "vtpmd._core",
    """
    #include <string.h>
    #include <sys/prctl.h>
    #include "crc32c.h"
    #include "delta.h"
    #include "engine/blob.h"
    #include "engine/control.h"
    #include "engine/handover.h"
    #include "engine/lane.h"
    #include "engine/link_types.h"
    #include "engine/tail.h"
    #include "engine/unasked.h"
    #include "epoch.h"
    #include "journal_recover.h"
    #include "linear_format.h"
    #include "pages.h"
    #include "slice.h"
    """,
    sources=[f"csrc/{name}" for name in SOURCES],
    include_dirs=[str(CSRC)],
    libraries=["crypto"],
    depends=[str(CSRC / name) for name in [*DECLARATIONS, "engine/link_types.h", *HEADERS]],
    extra_compile_args=FLAGS,
)
