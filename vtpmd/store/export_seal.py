"""What an export is sealed with: a key, as a state directory's, or age, to whoever may open it.

age's format is of PyPI's ``pyrage``, which is no part of vtpmd and imported where it is asked for.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from vtpmd.errors import UsageError, VtpmdError
from vtpmd.store.directory import StateKeyError
from vtpmd.store.keys import INFO_EXPORT, Key
from vtpmd.wire import export_format
from vtpmd.wire.export_format import (
    MAGIC,
    RECIPIENTS_MAX,
    SALT_BYTES,
    SEALS,
    Export,
    ExportFlag,
)
from vtpmd.wire.export_format import Header as Header
from vtpmd.wire.tpm import StateType

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE: Final = bytes(12)  # each export has a key of its own, and seals one thing with it
SECRET_FILE_BYTES_MAX: Final = 64 * 1024
WORDS_MAX: Final = 200  # of pyrage's, that a person is shown


class AgeError(VtpmdError):
    """What is asked of age cannot be done."""


class Age(NamedTuple):
    """Who may open what is sealed with age, or with what it is opened: one of the two."""

    passphrase: str | None = None
    names: tuple[str, ...] = ()  # recipients' public keys, or the secret keys to open with

    def __repr__(self) -> str:
        """Leave the secrets out."""
        return "Age()"


Seal = Key | Age | None


def sealed(
    header: Header, states: dict[StateType, bytes], seal: Seal, magic: bytes = MAGIC
) -> bytes:
    """Return an export: ``header`` says all but how it is sealed. Raises AgeError."""
    flags, salt = header.flags & ~SEALS, bytes(SALT_BYTES)
    if isinstance(seal, Key):
        flags, salt = flags | ExportFlag.KEY, os.urandom(SALT_BYTES)
    elif isinstance(seal, Age):
        flags |= ExportFlag.AGE
    header = header._replace(flags=flags, salt=salt)
    head = export_format.encode_header(header, magic)
    body = export_format.encode_states(head, states)
    if isinstance(seal, Key):
        body = _aead(seal, header).encrypt(NONCE, body, head)
    elif isinstance(seal, Age):
        body = _age_encrypt(body, seal)
    return export_format.encode(head, body)


def opened(export: Export, seal: Seal) -> dict[StateType, bytes]:
    """Return the states in an export; of a delta, the record in place of the permanent state.

    With a key, or age's, it has to be sealed so; without one, not sealed. Raises StateKeyError,
    ExportError or AgeError.
    """
    flags, body = export.header.flags, export.body
    if flags & ExportFlag.AGE:
        if not isinstance(seal, Age):
            raise StateKeyError(
                "it is sealed with age: give --age-key, the file of a secret key that it is sealed "
                "to, or --passphrase-file"
            )
        body = _age_decrypt(body, seal)
    elif isinstance(seal, Age):
        raise StateKeyError("it is not sealed with age: leave out --age-key and --passphrase-file")
    elif flags & ExportFlag.KEY:
        body = _open_with_key(export, seal)
    elif seal is not None:
        raise StateKeyError(
            "it is not sealed, but a key was given, and anybody could have written it: add "
            "--unsealed if you know where it comes from"
        )
    return export_format.decode_states(export, body)


def _open_with_key(export: Export, key: Key | None) -> bytes:
    from cryptography.exceptions import InvalidTag

    if key is None:
        raise StateKeyError("it is sealed with a key: give it with --key, or --seal-key")
    try:
        return _aead(key, export.header).decrypt(NONCE, export.body, export.head)
    except InvalidTag:
        raise StateKeyError(
            "it does not open with this key: the key is another one, or the file was altered; "
            "give the right key with --seal-key, or another copy"
        ) from None


def _aead(key: Key, header: Header) -> AESGCM:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key.derive(INFO_EXPORT, header.salt))


def read_secret(path: Path, option: str) -> str:
    """Return the text of a file with a secret, without the newline at its end. Raises AgeError."""
    try:
        with path.open("rb") as file:
            content = file.read(SECRET_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise AgeError(f"cannot read {path}: {error.strerror}; check {option}") from error
    if len(content) > SECRET_FILE_BYTES_MAX:
        raise AgeError(f"{path} has more than {SECRET_FILE_BYTES_MAX} bytes; check {option}")
    try:
        text = content.decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise AgeError(f"{path} is no text; check {option}") from None
    if not text:
        raise AgeError(f"{path} is empty; check {option}")
    return text


def secret_keys(text: str) -> tuple[str, ...]:
    """Return the keys in a file that age-keygen has written."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def _pyrage() -> Any:
    try:
        import pyrage
    except ImportError:
        raise AgeError(
            "age's format needs the Python package pyrage, which is not installed: pip install "
            "'vtpmd[age]', or seal with a key"
        ) from None
    return pyrage


def _age_encrypt(content: bytes, to: Age) -> bytes:
    pyrage = _pyrage()
    if to.passphrase is not None:
        return bytes(pyrage.passphrase.encrypt(content, to.passphrase))
    if len(to.names) > RECIPIENTS_MAX:
        raise UsageError(f"an export is sealed to {RECIPIENTS_MAX} recipients at most")
    parse = pyrage.x25519.Recipient.from_str
    try:
        recipients = [parse(name) for name in to.names]
    except pyrage.RecipientError as error:
        raise UsageError(
            f"--recipient takes an X25519 public key of age's, age1…: {_words(error)}"
        ) from None
    return bytes(pyrage.encrypt(content, recipients))


def _age_decrypt(body: bytes, with_: Age) -> bytes:
    pyrage = _pyrage()
    try:
        if with_.passphrase is not None:
            return bytes(pyrage.passphrase.decrypt(body, with_.passphrase))
        identities = [pyrage.x25519.Identity.from_str(name) for name in with_.names]
        return bytes(pyrage.decrypt(body, identities))
    except pyrage.IdentityError as error:
        raise AgeError(f"--age-key has no X25519 secret key of age's: {_words(error)}") from None
    except pyrage.DecryptError as error:
        raise StateKeyError(
            f"age does not open it: {_words(error)}; give the right key or passphrase, or another "
            "copy"
        ) from None


def _words(error: Exception) -> str:
    """Return another program's words, for a line."""
    text = " ".join(str(error).split())
    return "".join(char if char.isprintable() else "" for char in text)[:WORDS_MAX].rstrip(".")
