/* A TPM that keeps journals, on a file system in memory. libtpms is process-global, and so is this.
 */
#pragma once

#include "io_memory.h"
#include "tpm.h"

extern struct io_memory io;
extern struct store *store;
extern struct tpm *tpm;

/* Make it, stopped; its directory is empty. */
void tpm_in_memory_begin(void);
void tpm_in_memory_end(void);
