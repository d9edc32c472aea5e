"""What the files of a state directory are called, where a test is about a TPM 2.0's."""

from vtpmd.store.directory import names_of
from vtpmd.wire.tpm import TpmVersion

NAMES = names_of(TpmVersion.TPM_2_0)
INCOMING_NAME = NAMES.incoming
JOURNAL_NAME = NAMES.journal
OWNER_NAME = NAMES.owner
PERMANENT_NAME = NAMES.permanent
