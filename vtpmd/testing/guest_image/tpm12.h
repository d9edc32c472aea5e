/*
 * What the guest does with a TPM 1.2: it extends a PCR and writes to an NV index, again and again,
 * and compares both with its own model. Owner, keys and sessions are the host's, by commands that
 * it sends through. Functions return 0, or -1 with a failure.
 */
#pragma once

/* Extend and read a PCR, write and read the NV index, which the host has made. */
int tpm12_step(void);

/* Say what the PCR holds, and that it, and the index, are as the model has them. */
int tpm12_check(void);

/* Execute a command, in hexadecimal digits, and say what the response is. */
int tpm12_raw(const char *digits);
