/* What a TPM 1.2 and a TPM 2.0 differ in, in one table: all else is the same code.
 *
 * Which one it is, is said once, before anything else is done; until then it is a TPM 2.0. libtpms
 * is process-global, and so is this. Names of files are swtpm's.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

struct version {
    uint32_t number;    /* enum version_number */
    const char *name;   /* for people */
    uint32_t library;   /* libtpms' TPMLIB_TPMVersion */
    const char *prefix; /* of all names of files, */
    const char *temporary_prefix;
    const char *journal_name, *journal_temporary_name;
    const char *arrived_name, *arrived_temporary_name;
    uint16_t response_tag; /* of a response without sessions */
    uint32_t failure;      /* response codes: the TPM does nothing until it is restarted, */
    uint32_t retry;        /* the command is to be sent again, */
    uint32_t command_size; /* its size is wrong, */
    uint32_t is_started;   /* the TPM is started up already */
    const char *failure_name, *retry_name;
    /* How long a command waits until it is known whose the vTPM is: longer than most hosts need to
     * agree. Linux and TSS2 send a TPM2_RC_RETRY again then, for some seconds; but Linux's driver
     * gives up on an answer after 750 ms for some commands (tpm2_calc_ordinal_duration() in
     * tpm2-cmd.c). Of TPM_RETRY it tells its user; but it waits as long as the TPM says, of which
     * libtpms' shortest is two seconds (TPM_SMALL_DURATION). */
    int64_t command_wait_ms;
    /* A guest says by TPM2_Shutdown how it goes on, and a stop says so for it. Else what
     * TPM_SaveState saves is a state of its own (saved.h), and a stop says nothing. */
    bool has_shutdown;
    /* A command that may be long can be abandoned: who sent it sends it again (long_command.h). */
    bool abandons;
    bool takes_prefix; /* the data channel takes that of the TCG's simulator */
};

/* As vtpmd's peers have it, too. */
enum version_number {
    VERSION_1_2 = 1,
    VERSION_2_0 = 2,
};

/* Returns false for what is no enum version_number, and then nothing has changed. */
bool version_set(uint32_t number);

/* Return the row of the TPM that this process is for. */
const struct version *version_now(void);
