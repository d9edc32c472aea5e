"""``--profile``: what commands and algorithms a TPM has that is made, as swtpm 0.10 reads it.

Sources: swtpm's common.c (``parse_profile_options``), profile.c and check_algos.c.
"""

from __future__ import annotations

import os

from vtpmd.errors import UsageError, VtpmdError
from vtpmd.light_typing import TYPE_CHECKING
from vtpmd.store import libtpms
from vtpmd.store.directory import TpmVersion

if TYPE_CHECKING:
    from vtpmd.front.options import Values

PROFILE_BYTES_MAX = 10 * 1024  # swtpm's, of a descriptor
SOURCES = ("profile", "name", "file", "fd")
REMOVALS = ("check", "fips-host")
CUSTOM = "custom"  # the only profile that may be changed, also as "custom:" and a name

# What FIPS mode takes from libcrypto, with what goes with it; and the least sizes of keys there.
FIPS_DISABLED = ("camellia", "tdes", "rsaes", "ecc-nist-p192")
FIPS_DISABLED_SIZES = ("camellia-min-size", "tdes-min-size")
FIPS_SIZES = {"ecc-min-size": 224, "rsa-min-size": 2048}
FIPS_HOST = "fips-host"  # the attribute that stands for all of these
FIPS_ATTRIBUTES = ("no-sha1-signing", "no-sha1-verification", "no-unpadded-encryption")


def read_profile(values: Values) -> str:
    """Return the profile that ``--profile`` gives, as JSON that libtpms takes.

    Raises UsageError or VtpmdError.
    """
    has = libtpms.library()
    if not has.profiles:
        raise UsageError(f"--profile: here is {has}: leave it out")
    profile = _given(values).strip()
    removal = values.get("remove-disabled")
    if removal not in (None, *REMOVALS):
        raise UsageError(f"--profile remove-disabled={removal}: use {', '.join(REMOVALS)}")
    if removal == "fips-host" or (removal == "check" and _is_in_fips_mode()):
        profile = _without_disabled(profile)
    refusal = libtpms.ask(TpmVersion.TPM_2_0, profile=profile).refusal
    if refusal is not None:
        raise UsageError(f"--profile {profile}: {refusal}; see --print-profiles")
    return profile


def _given(values: Values) -> str:
    sources = [source for source in SOURCES if source in values]
    if len(sources) != 1:
        raise UsageError(f"--profile needs one of {', '.join(f'{name}=' for name in SOURCES)}")
    source = values[sources[0]]
    if sources[0] == "profile":
        return str(source)
    if sources[0] == "name":
        return f'{{"Name":"{source}"}}'
    try:
        fd = int(source) if sources[0] == "fd" else os.open(str(source), os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            content = file.read(PROFILE_BYTES_MAX + 1)
    except OSError as error:
        raise VtpmdError(
            f"cannot read --profile {sources[0]}={source}: {error.strerror}; give one that can be"
        ) from error
    if len(content) > PROFILE_BYTES_MAX or b"\0" in content or not content.isascii():
        raise UsageError(f"--profile {sources[0]}={source}: this is no profile, which is JSON")
    return content.decode()


def _is_in_fips_mode() -> bool:
    """Return whether the host's libcrypto, which libtpms has as well, is in FIPS mode."""
    from _hashlib import get_fips_mode

    return bool(get_fips_mode())


def _without_disabled(profile: str) -> str:
    """Return a profile that may be changed without what FIPS mode has not; others as they are."""
    import json

    try:
        members = json.loads(profile)
        name = members["Name"]
        kind, _, _ = name.partition(":")
        if kind != CUSTOM:
            return profile
        algorithms = members.get("Algorithms") or _all_algorithms()
        members["Algorithms"] = ",".join(_fips_algorithms(algorithms.split(",")))
        attributes = [text for text in members.get("Attributes", "").split(",") if text]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--profile {profile}: this is no profile; see --print-profiles"
        ) from error
    if FIPS_HOST not in attributes:
        attributes += [text for text in FIPS_ATTRIBUTES if text not in attributes]
    members["Attributes"] = ",".join(attributes)
    return json.dumps(members, separators=(",", ":"))


def _all_algorithms() -> str:
    import json

    info = libtpms.ask(TpmVersion.TPM_2_0, libtpms.INFO_AVAILABLE_PROFILES).info
    profiles = json.loads(info)["AvailableProfiles"]
    return str(next(each["Algorithms"] for each in profiles if each["Name"] == CUSTOM))


def _fips_algorithms(algorithms: list[str]) -> list[str]:
    kept: dict[str, str] = {}  # of two the later one, as libtpms takes it
    for algorithm in algorithms:
        name, _, size = algorithm.partition("=")
        if name not in (*FIPS_DISABLED, *FIPS_DISABLED_SIZES):
            kept[name] = size
    for name, least in FIPS_SIZES.items():
        kept[name] = str(max(least, int(kept.get(name) or 0)))
    return [f"{name}={size}" if size else name for name, size in kept.items()]
