"""What a vTPM's state is called, held against the types of tpm2-pytss: all of their constants.

That is a package of Debian's own Python, which is asked.
"""

import json
import subprocess
from functools import cache
from typing import Final

import pytest

from vtpmd.inspect.words.algorithms import ALGORITHMS, CURVES
from vtpmd.inspect.words.attributes import NV, NV_TYPES, OBJECT, SESSION
from vtpmd.inspect.words.commands import COMMANDS
from vtpmd.inspect.words.handles import PERMANENT_HANDLES

PYTHON: Final = "/usr/bin/python3"
ASK: Final = """
import json, sys
from tpm2_pytss import constants
print(json.dumps({
    each: {
        name: int(value)
        for name, value in vars(getattr(constants, each)).items()
        if not name.startswith("_") and isinstance(value, int)
    }
    for each in sys.argv[1:]
}))
"""


def of_bits(words: dict[int, str]) -> dict[int, str]:
    return {1 << bit: word for bit, word in words.items()}


OURS: Final = {
    "TPM2_ALG": ALGORITHMS,
    "TPM2_CC": COMMANDS,
    "TPM2_ECC": CURVES,
    "TPM2_NT": NV_TYPES,
    "TPM2_RH": PERMANENT_HANDLES,
    "TPMA_NV": of_bits(NV),
    "TPMA_OBJECT": of_bits(OBJECT),
    "TPMA_SESSION": of_bits(SESSION),
}
# Other names of theirs for the same, masks, and where a range begins and ends; and, of later ones
# of theirs, what no state of libtpms has.
NOT_WORDS: Final = {
    "TPM2_ALG": {"SHA", "FIRST", "LAST"},
    "TPM2_CC": {"FIRST", "LAST", "Vendor_TCG_Test", "MAC", "MAC_Start"},
    "TPM2_RH": {
        *("FIRST", "LAST", *(f"ACT_{number:X}" for number in range(16))),
        *("FW_OWNER", "FW_ENDORSEMENT", "FW_PLATFORM", "FW_NULL"),
        *("SVN_OWNER_BASE", "SVN_ENDORSEMENT_BASE", "SVN_PLATFORM_BASE", "SVN_NULL_BASE"),
    },
    "TPM2_ECC": {"NONE"},
    "TPMA_NV": {"TPM2_NT_SHIFT", "TPM2_NT_MASK"},
    "TPMA_OBJECT": {"DEFAULT_TPM2_TOOLS_CREATE_ATTRS", "DEFAULT_TPM2_TOOLS_CREATEPRIMARY_ATTRS"},
}
SYNONYMS: Final = {"PW": "password", "SIGN_ENCRYPT": "sign"}


@cache
def theirs() -> dict[str, dict[str, int]]:
    answer = subprocess.run([PYTHON, "-c", ASK, *OURS], check=True, capture_output=True)
    found: dict[str, dict[str, int]] = json.loads(answer.stdout)
    return found


def plain(word: str) -> str:
    return word.upper().replace("_", "").replace("-", "")


@pytest.mark.parametrize("kind", OURS)
def test_each_constant_of_tpm2_pytss_has_its_word(kind: str) -> None:
    expected = {
        value: plain(SYNONYMS.get(name, name))
        for name, value in theirs()[kind].items()
        if name not in NOT_WORDS.get(kind, ())
    }
    assert expected
    # Ours may have later ones.
    ours = {value: plain(word) for value, word in OURS[kind].items() if value in expected}
    assert ours == expected
