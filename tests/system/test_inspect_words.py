"""What a vTPM's state is called, held against other people's words for it: tpm2-tools', swtpm's.

The tools ask the TPM; `vtpmd inspect` reads its state directory meanwhile.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.harness.swtpm_program import Place
from tests.system.test_swtpm_clients import EK_CERTIFICATE, free_ports, run, setup
from vtpmd.inspect.words.algorithms import ALGORITHMS
from vtpmd.inspect.words.commands import COMMANDS
from vtpmd.testing.emulator import VTPMD

Tool = Callable[..., str]
INDEX = "0x1500001"
# Attributes that go together in an index of the owner's.
NV_ATTRIBUTES = (
    *("ownerwrite|ownerread", "authwrite|authread|no_da", "policywrite|policyread|orderly"),
    *("ownerwrite|authread|writeall|write_stclear", "ownerwrite|ownerread|read_stclear"),
    *("ownerwrite|ownerread|writedefine|globallock", "ownerwrite|ppread|clear_stclear|orderly"),
    *("authwrite|authread|nt=counter", "authwrite|ownerread|nt=extend"),
    "authwrite|ownerread|nt=bits",
)


@pytest.fixture
def tool(ours: Place) -> Iterator[Tool]:
    """Give a way to run one of tpm2-tools on a vTPM that is served."""
    port = free_ports()
    ours.start(
        *("--ctrl", f"type=tcp,port={port + 1}", "--server", f"type=tcp,port={port}"),
        *("--flags", "not-need-init,startup-clear"),
    )

    def tool(name: str, *options: str) -> str:
        tcti = ("-T", f"swtpm:host=127.0.0.1,port={port}")
        return run(f"tpm2_{name}", *tcti, *options, directory=ours.directory)

    yield tool


def inspected(place: Place) -> dict[str, Any]:
    """Return what is in a place's state directory."""
    known: dict[str, Any] = json.loads(
        run(VTPMD, "inspect", "--json", place.state, directory=place.directory)
    )
    return known


def plain(words: Iterator[str]) -> set[str]:
    """Return words as both write them: TPMA_NV's are written with underscores, or not."""
    return {word.lower().replace("_", "") for word in words}


def test_commands_have_the_names_that_tpm2_tools_have(tool: Tool) -> None:
    found = re.findall(
        r"^TPM2_CC_(\w+):\n(?:  .*\n)*?  commandIndex: +(0x\w+)", tool("getcap", "commands"), re.M
    )
    assert len(found) > 100
    named = {COMMANDS[int(index, 16)].lower(): name.lower() for name, index in found}
    assert {ours: theirs for ours, theirs in named.items() if ours != theirs} == {}


def test_algorithms_have_the_names_that_tpm2_tools_have(tool: Tool) -> None:
    found = re.findall(r"^(\w+):\n  value: +(0x\w+)", tool("getcap", "algorithms"), re.M)
    assert len(found) > 20
    named = {ALGORITHMS[int(value, 16)].lower(): name for name, value in found}
    assert {ours: theirs for ours, theirs in named.items() if ours != theirs} == {}


def test_attributes_of_an_index_have_their_words(tool: Tool, ours: Place) -> None:
    for attributes in NV_ATTRIBUTES:
        size = "32" if "extend" in attributes else "8"
        policy = ("-L", "policy") if "policy" in attributes else ()
        (ours.directory / "policy").write_bytes(bytes(32))
        tool("nvdefine", INDEX, "-C", "o", *("-s", size, "-a", attributes), *policy)
        printed = tool("nvreadpublic", INDEX)
        friendly = re.search(r"attributes:\n +friendly: (\S+)", printed)
        assert friendly is not None
        (index,) = inspected(ours)["nv"]["indices"]
        theirs = plain(word for word in friendly[1].split("|") if not word.startswith("nt="))
        assert plain(index["attributes"]) == theirs
        tool("nvundefine", INDEX, "-C", "o")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("rsa2048:rsapss:null", "sign|fixedtpm|fixedparent|sensitivedataorigin|userwithauth"),
        ("ecc384", "restricted|decrypt|fixedtpm|fixedparent|sensitivedataorigin|adminwithpolicy"),
        ("hmac", "sign|noda|userwithauth|sensitivedataorigin"),
        ("aes256cfb", "decrypt|sign|sensitivedataorigin|userwithauth|encryptedduplication"),
    ],
)
def test_attributes_of_an_object_have_their_words(
    key: str, words: str, tool: Tool, ours: Place
) -> None:
    tool("createprimary", *("-C", "o", "-G", key, "-a", words, "-c", "key"))
    tool("evictcontrol", *("-C", "o", "-c", "key", "0x81000001"))
    printed = tool("readpublic", "-c", "0x81000001")
    (known,) = [each for each in inspected(ours)["objects"] if each["handle"] == "0x81000001"]
    value = re.search(r"attributes:\n  value: (\S+)", printed)
    name = re.search(r"^name: (\w+)", printed, re.M)
    assert value is not None
    assert name is not None
    assert plain(known["attributes"]) == plain(iter(value[1].split("|")))
    assert known["name"] == name[1]


def test_the_certificates_that_swtpm_setup_makes_are_found(ours: Place) -> None:
    setup(ours, "--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--overwrite")
    known = inspected(ours)
    found = {each["handle"]: each["certificate"] for each in known["nv"]["indices"]}
    certificate = found[f"{EK_CERTIFICATE:#010x}"]
    assert "swtpm-localca" in certificate["issuer"]
    assert certificate["not-after"] > certificate["not-before"]
    assert sum(each is not None for each in found.values()) >= 2
    printed = run(VTPMD, "inspect", ours.state, directory=ours.directory)
    assert printed.count("certificate: CN=") >= 1
    # It has chosen one bank, and not started the TPM again.
    assert known["surprises"] == ["other PCRs will be on after a reset: sha256 0-23"]
