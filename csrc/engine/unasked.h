/* What becomes of a command of QEMU's that vtpmd would be asked about, when there is none to
 * answer: one table, by what the TPM is and whose.
 *
 * Without vtpmd there are no sessions: what needs one is refused, and a vTPM that is, or may be,
 * another host's serves nothing. In all else the engine goes on as one that never had a vtpmd.
 * docs/ARCHITECTURE.md has the table, and tests/c/test_unasked.c compares all of it.
 */
#pragma once

#include <stdbool.h>

#include "custody.h"
#include "link_types.h"

enum unasked {
    UNASKED_GO_ON = 'g',
    UNASKED_DONE = 'i',  /* a success: it is so already */
    UNASKED_AWAIT = 'a', /* the vTPM is wanted back: commands wait, until a vtpmd comes and asks */
    UNASKED_WAIT = 'w',  /* for a vtpmd, UNASKED_WAIT_MS at most; then it is refused */
    UNASKED_REFUSE = 'r',
};

enum {
    /* QEMU's main loop stands still; who starts a vtpmd again does so within a second or two. */
    UNASKED_WAIT_MS = 5000,
};

/* What the table asks about, besides what the TPM is. */
enum unasked_command {
    UNASKED_INIT,
    UNASKED_INIT_NEW,  /* there is no state to start from, and there was a vtpmd, or is to be */
    UNASKED_INIT_TAIL, /* of a guest that came with a tail */
    UNASKED_STOP,
    UNASKED_STATE,
    UNASKED_BLOB,
    UNASKED_TAIL,
    UNASKED_CONNECTED,
    UNASKED_RUNS,
};

enum {
    UNASKED_COMMANDS = UNASKED_RUNS + 1,
};

enum unasked unasked_verdict(enum unasked_command command, enum tpm_power power,
                             enum tpm_custody custody);
