/* Whose the vTPM is, and what may be done meanwhile: one table, which tpm.c asks for everything.
 *
 * Two states say it. Power is the TPM's. Custody says whether commands are executed, and whether
 * the state's files may be written:
 *
 *     active      this host's: commands are executed, files are written
 *     given       QEMU has the state and may start it elsewhere: as active, but no file is written
 *                 until the guest is seen to run on here, which makes it active; a TPM2_Shutdown
 *                 that a stop would have said is said then
 *     fenced      another host's: nothing is executed, and nothing written
 *     reclaiming  fenced, on, and asked back: commands wait
 *     standby     on ahead of time, from a state that is durable elsewhere: it executes and writes
 *                 nothing, and answers as one that is off
 *     pending     standby, and QEMU has been told that it is on: commands wait
 *
 * Off there is no reclaiming, standby or pending. What is on standby, or pending, remembers the
 * custody from before, for when it is let go. docs/ARCHITECTURE.md has the table, and
 * tests/c/test_custody.c compares all of it with what a TPM does.
 */
#pragma once

#include <stdbool.h>

#include "link_types.h"

enum tpm_power {
    TPM_OFF,
    TPM_ON,
};

enum {
    TPM_POWERS = 2,
    TPM_CUSTODIES = 6,
};

/* What looks at either, or changes it. */
enum tpm_operation {
    OP_EXECUTE,
    OP_INIT,
    OP_INIT_CAME,
    OP_INIT_STANDBY,
    OP_EXPECT,
    OP_ADMIT,
    OP_LET_GO,
    OP_FORGET_STATE,
    OP_STOP,
    OP_STOP_FENCED,
    OP_AWAIT,
    OP_AWAIT_NO_MORE,
    OP_RETIRE_UNCHANGED,
    OP_RETIRE_UNSERVED,
    OP_UNRETIRE,
    OP_GET_ESTABLISHED,
    OP_RESET_ESTABLISHED,
    OP_HASH,
    OP_CANCEL,
    OP_STORE_VOLATILE,
    OP_GET_PERMANENT,
    OP_GET_OTHER,
    OP_SET_STATE,
    OP_CAPTURE,
    OP_COPY,
    OP_STORE_PERMANENT,
    OP_SET_UP,
    OP_SET_BUFFER_SIZE,
    /* What is done always, as far as this goes, but not in every phase of long_command.h: */
    OP_HAS_STATE,
    OP_GET_LINEAGE,
    OP_RAISE_GENERATION,
    OP_RUN_ON,
    OP_GET_INFO,
    OP_ABANDON,
};

enum tpm_verdict {
    VERDICT_DO = 'd',
    VERDICT_NOTHING = 'i', /* a success: there is nothing to do */
    VERDICT_WAIT = 'w',    /* a command, until custody changes */
    VERDICT_LET_GO = 'l',  /* what is on standby is let go first; then as off */
    VERDICT_NOT_NOW = 'n', /* TPM_BAD_ORDINAL */
    VERDICT_FAIL = 'f',    /* TPM_FAIL; for a command TPM_RC_FAILURE */
};

enum tpm_verdict custody_verdict(enum tpm_operation operation, enum tpm_power power,
                                 enum tpm_custody custody);

/* The custody once the operation is done. `*before` is where a standby goes back to, and may
 * change, too. */
enum tpm_custody custody_after(enum tpm_operation operation, enum tpm_custody custody,
                               enum tpm_custody *before);

/* True on standby and pending. */
bool custody_is_ahead(enum tpm_custody custody);
