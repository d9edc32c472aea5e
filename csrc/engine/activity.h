/* What ran since the TPM was started, as far as a stop goes by it: one table, which tpm.c asks for
 * all that runs.
 *
 *     used       something did, or may have: a stop says TPM2_Shutdown as the guest needs it
 *     shut down  nothing did since the guest's own TPM2_Shutdown: a stop has nothing to say
 *     as it came nothing did: it is the very state that has come, and was not used. It may still be
 *                another host's: a stop says nothing, and keeps it, to be said where its guest is
 *                started here again
 *
 * It stays when the TPM is off, until the next start. docs/ARCHITECTURE.md has the table, and
 * tests/c/test_custody.c walks it.
 */
#pragma once

enum activity {
    ACTIVITY_USED,
    ACTIVITY_SHUT_DOWN,
    ACTIVITY_AS_IT_CAME,
    ACTIVITIES,
};

enum activity_event {
    ACTIVITY_STARTED, /* the TPM is, from whatever it was */
    ACTIVITY_CAME,    /* that was from what has come, which is as it was: just now */
    ACTIVITY_RESET,   /* its guest is, here: what it runs on is used */
    ACTIVITY_WORKED,  /* something of the guest's is about to run */
    ACTIVITY_SAID,    /* that was TPM2_Shutdown, and accepted */
    ACTIVITY_EVENTS,
};

/* What ran after an event, which is one that there can be. */
enum activity activity_after(enum activity_event event, enum activity now);
