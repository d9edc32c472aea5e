"""`vtpmd identity`: what swtpm_setup has made, held against what the TPM and its tools say."""

import json
import re
from pathlib import Path

from cryptography import x509

from tests.harness.swtpm_program import Place
from tests.support.documents import DOCS, tables
from tests.system.test_inspect_words import Tool, tool
from tests.system.test_swtpm_clients import (
    EK_CERTIFICATE,
    EK_HANDLE,
    PLATFORM_CERTIFICATE,
    run,
    setup,
)
from vtpmd.testing.emulator import VTPMD

__all__ = ["tool"]


def documented(title: str) -> set[str]:
    """Return the keys in a table of the document."""
    rows = tables((DOCS / "inspect.md").read_text())[title]
    return {key for row in rows for key in re.findall(r"`([^`]+)`", row["key"])}


def identity(place: Place, *options: str) -> str:
    return run(VTPMD, "identity", place.state, *options, directory=place.directory)


# What swtpm_setup makes: the handle of the key, what it is, and the index of its certificate.
KEYS = {
    f"{EK_HANDLE:#010x}": ("RSA 2048", f"{EK_CERTIFICATE:#010x}"),
    "0x81010016": ("ECC NIST_P384", "0x01c00016"),
}


def test_it_is_what_swtpm_setup_has_made(ours: Place) -> None:
    setup(ours, "--create-ek-cert", "--create-platform-cert", "--overwrite")
    found = json.loads(identity(ours, "--json"))
    of_keys = {each["key"]: each for each in found["certificates"] if each["kind"] == "EK"}
    made = {key["handle"]: (key["type"], of_keys[key["handle"]]["handle"]) for key in found["keys"]}
    assert made == KEYS
    kinds = {each["handle"]: each["kind"] for each in found["certificates"]}
    indices = [index for _, index in KEYS.values()]
    assert kinds == {**dict.fromkeys(indices, "EK"), f"{PLATFORM_CERTIFICATE:#010x}": "platform"}
    for each in found["certificates"]:
        parsed = x509.load_pem_x509_certificate(each["pem"].encode())
        assert f"{parsed.serial_number:x}" == each["serial"]
    keys = {"path", "identity", "keys", "certificates"}
    assert set(found) == keys == documented("Keys of an identity")
    assert set(found["certificates"][0]) == documented("Keys of a certificate")
    printed = identity(ours)
    assert printed.count("-----BEGIN PUBLIC KEY-----") == len(KEYS)
    assert printed.count("-----BEGIN CERTIFICATE-----") == len(KEYS) + 1
    for key in found["keys"]:
        assert f"# EK {key['handle']}, {key['type']}, name {key['name']}\n" in printed


def test_a_served_tpm_says_the_same_to_its_tools(ours: Place, tool: Tool, tmp_path: Path) -> None:
    """The key is made by one of the tools, at the handle that the TCG has for it."""
    tool("createek", *("-G", "rsa", "-c", hex(EK_HANDLE), "-u", str(tmp_path / "ek.pub")))
    printed = tool("readpublic", *("-c", hex(EK_HANDLE), "-f", "pem", "-o", str(tmp_path / "pem")))
    name = re.search(r"^name: (\w+)", printed, re.M)
    assert name is not None
    found = json.loads(identity(ours, "--json"))
    (key,) = found["keys"]
    assert key["name"] == name[1]
    assert key["pem"].split() == (tmp_path / "pem").read_text().split()
    assert found["certificates"] == []


def test_what_it_prints_other_programs_read(ours: Place, tmp_path: Path) -> None:
    setup(ours, "--create-ek-cert", "--overwrite")
    (tmp_path / "all.pem").write_text(identity(ours))
    command = ("openssl", "x509", "-noout", "-serial", "-in", tmp_path / "all.pem")
    serial = run(*command, directory=tmp_path).strip().removeprefix("serial=")
    first = json.loads(identity(ours, "--json"))["certificates"][0]
    assert int(serial, 16) == int(first["serial"], 16)
