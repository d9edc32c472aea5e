"""swtpm's command line, read as swtpm reads it. Invariant 8: it is from outside."""

import pytest

from vtpmd.errors import UsageError
from vtpmd.front.options import LISTS, NAMES, Given, Values, parse

STATE: dict[str, Values] = {"tpmstate": {"dir": "/srv/a b"}}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], Given({}, {}, set())),
        (["--tpmstate", "dir=/srv/a b"], Given(STATE, {}, set())),
        (["--tpmstate=dir=/srv/a b"], Given(STATE, {}, set())),
        (["--tpms", "dir=/srv/a b"], Given(STATE, {}, set())),
        (["-td", "--tpm2"], Given({}, {}, {"terminate", "daemon", "tpm2"})),
        (["-p", "2321", "-f7"], Given({}, {"port": 2321, "fd": 7}, set())),
        (["-tp2321"], Given({}, {"port": 2321}, {"terminate"})),
        (["--print-info", "0x20"], Given({}, {"print-info": 32}, set())),
        (["--print-info=010"], Given({}, {"print-info": 8}, set())),
        (["--"], Given({}, {}, set())),
        (["--pid", "file=a", "--pid", "file=b"], Given({"pid": {"file": "b"}}, {}, set())),
        (["--log", "file=x=y"], Given({"log": {"file": "x=y"}}, {}, set())),
        (["--ctrl", "mode=0600"], Given({"ctrl": {"mode": 0o600}}, {}, set())),
        (["--pid", "file=a,file=b"], Given({"pid": {"file": "a"}}, {}, set())),
    ],
)
def test_command_line_is_read(arguments: list[str], wanted: Given) -> None:
    assert parse(arguments) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("lock", True),
        ("lock=true", True),
        ("lock=TRUE", True),
        ("lock=1", True),
        ("lock=false", False),
        ("lock=yes", False),
    ],
)
def test_boolean_is_true_as_swtpm_has_it(text: str, wanted: bool) -> None:
    assert parse(["--tpmstate", text]).lists["tpmstate"]["lock"] is wanted


def test_commas_and_blanks_in_braces_are_the_values_own() -> None:
    profile = '{"Name": "custom", "Algorithms": "rsa,ecc"}'
    given = parse(["--profile", f"profile={profile},remove-disabled=check"])
    assert given.lists["profile"] == {"profile": profile, "remove-disabled": "check"}


def test_profiles_longer_key_is_one_of_its_own_option() -> None:
    """libvirt writes --profile-remove-disabled, which no swtpm has."""
    with pytest.raises(UsageError, match="unknown option --profile-remove-disabled"):
        parse(["--profile-remove-disabled", "check"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stray"], "unknown parameter 'stray'"),
        (["--tpm2", "--", "stray"], "unknown parameter 'stray'"),
        (["--bogus"], "unknown option --bogus"),
        (["-x"], "unknown option -x"),
        (["--t"], "--t may be --terminate, --tpm2, --tpmstate"),
        (["--tpm2=1"], "--tpm2 takes no value"),
        (["--ctrl"], "--ctrl needs a value"),
        (["-p"], "--port needs a value"),
        (["--ctrl", "type=unixio,bogus=1"], "--ctrl: unknown 'bogus'"),
        (["--ctrl", ""], "--ctrl: unknown ''"),
        (["--ctrl", "path"], "--ctrl path needs a value"),
        (["--ctrl", "path="], "--ctrl path needs a value"),
        (["--tpmstate", "lock="], "--tpmstate lock needs a value"),
        (["--ctrl", "mode=0888"], "no number that it takes"),
        (["--ctrl", "mode=77777"], "no number that it takes"),
        (["--port", "2321x"], "no number that it takes"),
        (["--fd", str(2**31)], "no number that it takes"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse(arguments)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_can_be_abbreviated_down_to_what_tells_it_apart(name: str) -> None:
    others = [other for other in NAMES if other != name]
    value = ["=1"] if name not in LISTS and name in ("port", "fd", "print-info") else []
    if name in LISTS:
        value = [f"={next(iter(LISTS[name]))}=1"]
    elif name in ("runas", "chroot"):
        value = ["=x"]
    for length in range(1, len(name)):
        short = name[:length]
        if short not in NAMES and not any(other.startswith(short) for other in others):
            given = parse([f"--{short}{''.join(value)}"])
            assert name in {*given.lists, *given.words, *given.flags}
