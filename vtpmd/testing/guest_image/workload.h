/*
 * What the guest does with its TPM: things of every kind are put into it, used, and checked against
 * the guest's own model. Functions return 0, or -1 with a failure; facts go to standard output.
 */
#pragma once

#include "hash.h"

enum load_kind {
    LOAD_MIXED,    /* extends, NV, a counter, random numbers, signatures, HMACs, in turn */
    LOAD_RSA_2048, /* one long command after another: create a key, flush it */
    LOAD_RSA_3072,
    LOAD_TPM_1_2, /* of a TPM 1.2: tpm12.h */
};

/* Create everything, in a TPM where none of it exists. */
int workload_setup(void);

/* Do one operation and check its result. */
int workload_step(enum load_kind kind);

/*
 * Check all that was set up and done, sign the host's nonce, and say what was found. What is found
 * does not depend on how often it is checked, but for the clock, the signature and session uses.
 */
int workload_check(struct span nonce);

/* Say what the TPM holds, without a model: what a guest that was restarted can say. */
int workload_read(void);

/* Say how many operations were done since the last call, and how long their commands took. */
void workload_report(uint64_t operations);
