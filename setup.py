"""Build what ``pip install`` ships: the package, the cffi extension and the engine.

``meson.build`` builds the same C sources for unit tests, sanitizers and fuzzing; both read
``csrc/sources.txt``.
"""

import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

CSRC = Path("csrc")
ENGINE = "vtpmd.vtpmd-engine"
WARNINGS = ["-std=gnu11", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-UNDEBUG"]
DEBIAN_PACKAGES = "build-essential pkg-config python3-dev libssl-dev libtpms-dev"
LIBRARIES = ["libtpms", "libcrypto"]
HARDENING = ["-O2", "-D_FORTIFY_SOURCE=2", "-fstack-protector-strong", "-fstack-clash-protection"]


def engine_sources() -> list[str]:
    """Return the engine's C files, as ``csrc/sources.txt`` lists them."""
    lines = (CSRC / "sources.txt").read_text().splitlines()
    return [str(CSRC / line) for line in lines if line and not line.startswith("#")]


def pkg_config(flag: str) -> list[str]:
    """Return what pkg-config says of the engine's libraries, as a list of compiler arguments.

    ExecError where it or a library is missing, with what to install: setuptools prints that alone.
    """
    advice = f"on Debian: apt-get install {DEBIAN_PACKAGES}"
    for library in LIBRARIES:
        try:
            command = ["pkg-config", "--exists", library]
            is_missing = subprocess.run(command, capture_output=True).returncode != 0
        except OSError as error:
            raise ExecError(f"pkg-config cannot be run ({error.strerror}); {advice}") from error
        if is_missing:
            raise ExecError(f"{library}'s headers are missing, says pkg-config; {advice}")
    command = ["pkg-config", flag, *LIBRARIES]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def make_sandbox_filter(directory: Path, compiler: list[str]) -> None:
    """Make the header of the system calls that the engine's comments allow."""
    command = [sys.executable, CSRC / "sandbox_build.py", directory / "sandbox_filter.h", "--"]
    subprocess.run([*command, *compiler], check=True)


class Build(build):
    """Build the package, unless a library is missing: then say so before anything else is said."""

    def run(self) -> None:
        pkg_config("--libs")
        super().run()


class BuildExt(build_ext):
    """Build the engine beside the extensions: an executable, linked by the same compiler."""

    def get_ext_filename(self, fullname: str) -> str:
        if fullname.endswith("vtpmd-engine"):
            return str(Path(*fullname.split(".")))
        return str(super().get_ext_filename(fullname))

    def build_extension(self, ext: Extension) -> None:
        if ext.name != ENGINE:
            super().build_extension(ext)
            return
        make_sandbox_filter(Path(self.build_temp), self.compiler.compiler)
        objects = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            include_dirs=[*ext.include_dirs, self.build_temp],
            extra_postargs=[*ext.extra_compile_args, *pkg_config("--cflags")],
            depends=ext.depends,
        )
        self.compiler.link_executable(
            objects,
            Path(self.get_ext_fullpath(ext.name)).name,
            output_dir=str(Path(self.get_ext_fullpath(ext.name)).parent),
            extra_postargs=[*ext.extra_link_args, *pkg_config("--libs")],
        )


def headers() -> list[str]:
    """Return every header: an object is rebuilt when one of them changes."""
    return [str(path) for path in sorted(CSRC.rglob("*.h"))] + ["csrc/sources.txt"]


engine = Extension(
    ENGINE,
    sources=engine_sources(),
    include_dirs=["csrc"],
    depends=headers(),
    extra_compile_args=[*WARNINGS, *HARDENING, "-fPIE", "-pthread"],
    extra_link_args=["-pie", "-pthread", "-Wl,-z,relro,-z,now"],
)

setup(
    name="vtpmd",
    version="0.1.0",
    description="A vTPM daemon for QEMU that moves with its guest",
    license="BSD-3-Clause",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vtpmd", "vtpmd.*"]),
    package_data={"vtpmd.testing.guest_image": ["*.c", "*.h", "build-image", "init"]},
    install_requires=["cffi>=1.15", "cryptography>=38", "qemu.qmp>=0.0.4", "rich>=13"],
    extras_require={
        "age": ["pyrage>=1.2"],
        "testing": ["pytest>=8.0"],
        "test": [
            "argparse-manpage>=1.2",
            "build>=1.0",
            "hypothesis>=6.80",
            "mypy>=1.5",
            "pyrage>=1.2",
            "pyroute2>=0.7",
            "pytest>=7.4",
            "pytest-timeout>=2.1",
            "pytest-xdist>=3.3",
            "ruff>=0.5",
            "shtab>=1.5",
            "types-cffi>=1.15",
        ],
    },
    entry_points={"pytest11": ["vtpmd = vtpmd.testing.plugin"]},
    scripts=["vtpmd/front/vtpmd", "vtpmd/front/vtpmd-swtpm"],
    cffi_modules=["csrc/core_build.py:ffibuilder"],
    ext_modules=[engine],
    cmdclass={"build": Build, "build_ext": BuildExt},
)
