"""``--profile`` as swtpm reads it: of the libtpms that there is, before anything is served."""

import json
import os
from pathlib import Path

import pytest

from vtpmd.errors import UsageError, VtpmdError
from vtpmd.front import profile as front
from vtpmd.front.options import Values
from vtpmd.store.libtpms import library

HAS_PROFILES = bool(library().profiles)
WORDS = (
    "rsa,rsa-min-size=1024,tdes,tdes-min-size=128,sha1,hmac,aes,aes-min-size=128,mgf1,keyedhash,"
    "xor,sha256,sha384,sha512,null,rsassa,rsaes,rsapss,oaep,ecdsa,ecdh,kdf1-sp800-56a,kdf2,"
    "kdf1-sp800-108,ecc,ecc-nist,symcipher,camellia,camellia-min-size=128,cmac,ctr,ofb,cbc,cfb,ecb"
)
ALGORITHMS = WORDS.split(",")
DISABLED = {"tdes", "tdes-min-size=128", "rsaes", "camellia", "camellia-min-size=128"}
CUSTOM = f'{{"Name":"custom","Algorithms":"{WORDS}"}}'


def read(values: Values) -> str:
    """Return a profile, or "" where libtpms has none: then that is the reason."""
    if HAS_PROFILES:
        return front.read_profile(values)
    with pytest.raises(UsageError, match=r"libtpms 0\.9\.\d, .* has no profiles: leave it out"):
        front.read_profile(values)
    return ""


def test_a_profile_is_given_in_each_form(tmp_path: Path) -> None:
    wanted = '{"Name":"null"}' if HAS_PROFILES else ""
    path = tmp_path / "profile"
    path.write_text(' {"Name":"null"}\n')
    fd = os.open(path, os.O_RDONLY)
    given: list[Values] = [
        {"name": "null"},
        {"profile": '{"Name":"null"}'},
        {"file": str(path)},
        {"fd": fd, "remove-disabled": "fips-host"},
    ]
    assert [read(values) for values in given] == [wanted] * 4
    if not HAS_PROFILES:
        os.close(fd)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"name": "null", "file": "x"},
        {"name": "null", "remove-disabled": "bogus"},
        {"name": "bogus"},
        {"name": 'a"b'},
        {"profile": "null"},
        {"profile": '{"Name":"custom","Algorithms":"bogus"}'},
        {"profile": "custom", "remove-disabled": "fips-host"},
        {"profile": '{"Name":7}', "remove-disabled": "fips-host"},
        {"file": "/dev/zero"},
        {"file": "/nowhere/profile"},
        {"fd": 77},
    ],
)
def test_what_is_no_profile_is_refused_in_a_line(values: Values) -> None:
    with pytest.raises(VtpmdError) as caught:
        front.read_profile(values)
    assert "\n" not in str(caught.value)
    assert "profile" in str(caught.value)


def test_what_fips_mode_disables_is_removed_from_a_custom_profile() -> None:
    removed = read({"profile": CUSTOM, "remove-disabled": "fips-host"})
    if HAS_PROFILES:
        kept = [name for name in ALGORITHMS if name not in DISABLED]
        kept[kept.index("rsa-min-size=1024")] = "rsa-min-size=2048"
        assert json.loads(removed) == {
            "Name": "custom",
            "Algorithms": ",".join([*kept, "ecc-min-size=224"]),
            "Attributes": "no-sha1-signing,no-sha1-verification,no-unpadded-encryption",
        }
        whole = json.loads(read({"name": "custom", "remove-disabled": "fips-host"}))
        assert "sha256" in whole["Algorithms"]
        assert "camellia" not in whole["Algorithms"]
    assert read({"profile": CUSTOM, "remove-disabled": "check"}) == (CUSTOM if HAS_PROFILES else "")
