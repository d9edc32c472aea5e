"""What becomes of each kind of thing where a new TPM takes the place of another, in one table.

``docs/export-format.md`` has it, too; tests walk it whole, for a TPM 1.2 and a TPM 2.0.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final, NamedTuple

from vtpmd.wire.tpm import TpmVersion


class Fate(StrEnum):
    """What becomes of something."""

    KEPT = "kept"
    EMPTIED = "emptied"  # it is kept, and its content is not
    LOST = "lost"


class Kind(StrEnum):
    """What there can be in a TPM, or outside of it that needs it."""

    ORDINARY = "ordinary"
    COUNTER = "counter"
    BITS = "bits"
    EXTEND = "extend"
    PIN_TRIES = "pin-fail"
    PIN_USES = "pin-pass"
    UNWRITTEN = "unwritten"
    ORDERLY_COUNTER = "orderly-counter"
    UNTIL_RESET = "until-reset"
    ENDORSEMENT_INDEX = "endorsement-index"
    PLATFORM_INDEX = "platform-index"
    DEVICE_INDEX = "device-index"
    KEY_CERTIFICATE = "key-certificate"
    OWNER_GUARDED = "owner-guarded"
    UNKNOWN_INDEX = "unknown-index"
    PCR_BANKS = "pcr-banks"
    PERSISTENT_OBJECT = "persistent-object"
    SEEDS = "seeds"
    PROOFS = "proofs"
    CLOCK = "clock"
    OWNER_AUTHORISATION = "owner-authorisation"
    ENDORSEMENT_AUTHORISATION = "endorsement-authorisation"
    LOCKOUT_AUTHORISATION = "lockout-authorisation"
    LOCKOUT_PARAMETERS = "lockout-parameters"
    FAILED_TRIES = "failed-tries"
    PCR_POLICIES = "pcr-policies"
    PHYSICAL_PRESENCE = "physical-presence"
    COMMAND_AUDIT = "command-audit"
    CLEAR_CONTROL = "clear-control"
    SEALED_DATA = "sealed-data"
    WRAPPED_KEYS = "wrapped-keys"
    ATTESTATION = "attestation"
    # Of a TPM 1.2 alone.
    DATA_REGISTER = "data-register"
    MONOTONIC_COUNTER = "monotonic-counter"
    GPIO_INDEX = "gpio-index"
    PLATFORM_FLAGS = "platform-flags"
    OTHER_FLAGS = "other-flags"
    OWNER = "owner"
    OPERATOR = "operator"
    ENDORSEMENT_KEY = "endorsement-key"
    STORAGE_ROOT_KEY = "storage-root-key"
    OWNER_EVICT_KEY = "owner-evict-key"
    DELEGATIONS = "delegations"
    DAA = "daa"
    AUDIT_COUNTER = "audit-counter"
    UNOWNED_WRITES = "unowned-writes"
    MAINTENANCE_KEY = "maintenance-key"


FATES: Final[dict[Kind, tuple[Fate, str]]] = {
    Kind.ORDINARY: (Fate.KEPT, "with its content"),
    Kind.COUNTER: (Fate.KEPT, "with its value"),
    Kind.BITS: (Fate.KEPT, "with its content"),
    Kind.EXTEND: (Fate.KEPT, "with its content"),
    Kind.PIN_TRIES: (Fate.KEPT, "with its count of tries"),
    Kind.PIN_USES: (Fate.KEPT, "with its count of uses"),
    Kind.UNWRITTEN: (Fate.KEPT, "it was never written"),
    Kind.ORDERLY_COUNTER: (Fate.KEPT, "it goes on, and may leave out numbers"),
    Kind.UNTIL_RESET: (Fate.EMPTIED, "each reset of a TPM empties it"),
    Kind.ENDORSEMENT_INDEX: (Fate.LOST, "it belongs to the old endorsement key"),
    Kind.PLATFORM_INDEX: (Fate.LOST, "it names the old endorsement key"),
    Kind.DEVICE_INDEX: (Fate.LOST, "it belongs to a device identity of the old TPM"),
    Kind.KEY_CERTIFICATE: (Fate.LOST, "it is the certificate of a key of the old TPM"),
    Kind.OWNER_GUARDED: (Fate.LOST, "the owner's authorisation guards it, and is not kept"),
    Kind.UNKNOWN_INDEX: (Fate.LOST, "its type is not known"),
    Kind.PCR_BANKS: (Fate.KEPT, "the same ones are on"),
    Kind.PERSISTENT_OBJECT: (Fate.LOST, "it belongs to the old seeds"),
    Kind.SEEDS: (Fate.LOST, "the TPM has new ones, and makes other keys of them"),
    Kind.PROOFS: (Fate.LOST, "tickets and saved contexts of the old TPM are refused"),
    Kind.CLOCK: (Fate.LOST, "it begins at 0, as do the counts of resets"),
    Kind.OWNER_AUTHORISATION: (Fate.LOST, "it is empty now: set it again"),
    Kind.ENDORSEMENT_AUTHORISATION: (Fate.LOST, "it is empty now: set it again"),
    Kind.LOCKOUT_AUTHORISATION: (Fate.LOST, "it is empty now: set it again"),
    Kind.LOCKOUT_PARAMETERS: (Fate.LOST, "they are a new TPM's: set them again"),
    Kind.FAILED_TRIES: (Fate.LOST, "they are counted from 0"),
    Kind.PCR_POLICIES: (Fate.LOST, "set them again"),
    Kind.PHYSICAL_PRESENCE: (Fate.LOST, "they are a new TPM's: set them again"),
    Kind.COMMAND_AUDIT: (Fate.LOST, "it is a new TPM's: set it again"),
    Kind.CLEAR_CONTROL: (Fate.LOST, "TPM2_Clear is allowed again"),
    Kind.SEALED_DATA: (
        Fate.LOST,
        "will not unseal: BitLocker asks for its recovery key, LUKS by systemd-cryptenroll, Clevis "
        "or tpm-luks for a passphrase; have that at hand, then enrol again",
    ),
    Kind.WRAPPED_KEYS: (
        Fate.LOST,
        "will not load: Windows Hello, SSH, PKCS #11 and VPN keys have to be made again",
    ),
    Kind.ATTESTATION: (
        Fate.LOST,
        "the endorsement key is another one, without a certificate: enrol the TPM again",
    ),
    Kind.DATA_REGISTER: (Fate.KEPT, "with its content"),
    Kind.MONOTONIC_COUNTER: (Fate.KEPT, "with its value; it counts on once there is an owner"),
    Kind.GPIO_INDEX: (Fate.LOST, "it has no content, and is there with an owner alone"),
    Kind.PLATFORM_FLAGS: (Fate.KEPT, "the same ones are set"),
    Kind.OTHER_FLAGS: (Fate.LOST, "they are a new TPM's"),
    Kind.OWNER: (Fate.LOST, "there is none now: take ownership again"),
    Kind.OPERATOR: (Fate.LOST, "it is empty now: set it again"),
    Kind.ENDORSEMENT_KEY: (Fate.LOST, "the TPM has a new one"),
    Kind.STORAGE_ROOT_KEY: (Fate.LOST, "the TPM makes a new one with its next owner"),
    Kind.OWNER_EVICT_KEY: (Fate.LOST, "it belongs to the old storage root key"),
    Kind.DELEGATIONS: (Fate.LOST, "they are of the owner, who is gone: make them again"),
    Kind.DAA: (Fate.LOST, "the TPM has new ones: join again"),
    Kind.AUDIT_COUNTER: (Fate.LOST, "it begins at 0"),
    Kind.UNOWNED_WRITES: (Fate.LOST, "they are counted from 0"),
    Kind.MAINTENANCE_KEY: (Fate.LOST, "it is a new TPM's"),
}
_ONLY_12: Final = frozenset(
    {
        *(Kind.DATA_REGISTER, Kind.MONOTONIC_COUNTER, Kind.GPIO_INDEX, Kind.PLATFORM_FLAGS),
        *(Kind.OTHER_FLAGS, Kind.OWNER, Kind.OPERATOR, Kind.ENDORSEMENT_KEY),
        *(Kind.STORAGE_ROOT_KEY, Kind.OWNER_EVICT_KEY, Kind.DELEGATIONS, Kind.DAA),
        *(Kind.AUDIT_COUNTER, Kind.UNOWNED_WRITES, Kind.MAINTENANCE_KEY),
    }
)
# What there is in either TPM.
_EITHER: Final = frozenset(
    {
        *(Kind.ORDINARY, Kind.ENDORSEMENT_INDEX, Kind.PLATFORM_INDEX, Kind.KEY_CERTIFICATE),
        *(Kind.OWNER_GUARDED, Kind.PROOFS, Kind.COMMAND_AUDIT),
        *(Kind.SEALED_DATA, Kind.WRAPPED_KEYS, Kind.ATTESTATION),
    }
)
KINDS: Final = {
    TpmVersion.TPM_1_2: _ONLY_12 | _EITHER,
    TpmVersion.TPM_2_0: frozenset(Kind) - _ONLY_12,
}

# What is lost in any case: of each TPM there is that.
_OUTSIDE: Final = {
    Kind.SEALED_DATA: "data sealed by the old TPM",
    Kind.WRAPPED_KEYS: "keys that the old TPM protects outside of it",
    Kind.ATTESTATION: "attestation",
}
ALWAYS: Final[dict[TpmVersion, dict[Kind, str]]] = {
    TpmVersion.TPM_1_2: {
        Kind.PROOFS: "the proof, and the keys of contexts and delegations",
        Kind.DAA: "the secrets of DAA",
        **_OUTSIDE,
    },
    TpmVersion.TPM_2_0: {
        Kind.SEEDS: "the seeds",
        Kind.PROOFS: "the proofs",
        Kind.CLOCK: "the clock",
        **_OUTSIDE,
    },
}
# What is lost where it differs from a new TPM's: parts of its persistent, or permanent data.
Settings = dict[Kind, tuple[str, tuple[str, ...]]]
SETTINGS_12: Final[Settings] = {
    Kind.OWNER: ("the owner", ("owner-installed", "owner-auth")),
    Kind.OPERATOR: ("the operator's authorisation", ("operator-auth",)),
    Kind.DELEGATIONS: (
        "families of delegations",
        ("families", "delegations", "last-family-id", "restrict-delegate"),
    ),
    Kind.COMMAND_AUDIT: ("what is audited", ("audited-ordinals", "tsc-audit-status")),
    Kind.AUDIT_COUNTER: ("the counter of audits", ("audit-counter",)),
    Kind.UNOWNED_WRITES: ("writes of NV memory without an owner", ("no-owner-nv-writes",)),
    Kind.MAINTENANCE_KEY: (
        "the key of maintenance",
        ("has-maintenance-key", "maintenance-key", "allow-load-maintenance-key"),
    ),
}
SETTINGS: Final[Settings] = {
    Kind.OWNER_AUTHORISATION: (
        "the owner's authorisation, or policy",
        ("owner-auth", "owner-policy-algorithm", "owner-policy"),
    ),
    Kind.ENDORSEMENT_AUTHORISATION: (
        "the endorsement hierarchy's authorisation, or policy",
        ("endorsement-auth", "endorsement-policy-algorithm", "endorsement-policy"),
    ),
    Kind.LOCKOUT_AUTHORISATION: (
        "the lockout authorisation, or policy",
        ("lockout-auth", "lockout-policy-algorithm", "lockout-policy"),
    ),
    Kind.LOCKOUT_PARAMETERS: (
        "the lockout parameters",
        ("tries-max", "recovery-time-s", "lockout-recovery-s"),
    ),
    Kind.FAILED_TRIES: ("failed tries", ("failed-tries", "lockout-auth-enabled")),
    Kind.PCR_POLICIES: ("policies of PCRs", ("pcr-policies",)),
    Kind.PHYSICAL_PRESENCE: (
        "the commands that need physical presence",
        ("physical-presence-commands",),
    ),
    Kind.COMMAND_AUDIT: ("what is audited", ("audit-algorithm", "audit-commands")),
    Kind.CLEAR_CONTROL: ("that TPM2_Clear is disabled", ("disable-clear",)),
}
POLICY: Final = "; its policy, too: one that asks for a key of the old TPM is never met"


class Item(NamedTuple):
    """One thing, and what becomes of it."""

    kind: Kind
    what: str  # for people
    handle: str | None = None
    has_policy: bool = False  # of an NV index

    @property
    def fate(self) -> Fate:
        """What becomes of it."""
        return FATES[self.kind][0]

    @property
    def why(self) -> str:
        """Why that is so, and what to do, for people."""
        is_kept = self.fate is not Fate.LOST
        return FATES[self.kind][1] + (POLICY if is_kept and self.has_policy else "")

    @property
    def line(self) -> str:
        """All of that, for people."""
        return f"{self.fate}: {self.what}: {self.why}"

    @property
    def outcome(self) -> dict[str, Any]:
        """The same, as JSON has it."""
        return {
            "kind": self.kind.value,
            "handle": self.handle,
            "fate": self.fate.value,
            "what": self.what,
            "why": self.why,
        }
