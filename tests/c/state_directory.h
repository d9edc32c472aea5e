/* What a start finds in a state directory in memory, and decides: as vtpmd/store/journal.py does.
 */
#pragma once

#include "durable.h"
#include "io_memory.h"
#include "journal.h"
#include "journal_recover.h"

enum {
    STATE_UNREADABLE = 0, /* beside enum journal_verdict: the state file is damaged */
};

/* The two files, decoded. Returns false if the state file cannot be. */
bool state_directory_read(const struct io_memory *io, const struct journal_settings *settings,
                          struct journal_evidence *evidence);

/* Recover into `image`, of IMAGE_BYTES_MAX bytes. Where only the checkpoint decides, it is the
 * image. The verdict may be STATE_UNREADABLE, and then there is no image. */
void state_directory_recover(const struct journal_evidence *evidence, uint8_t *image,
                             struct journal_recovery *recovery);

/* Put what was recovered into the state file, and remove the journal. */
void state_directory_fold(struct io_memory *io, const struct journal_settings *settings,
                          const uint8_t *image, const struct journal_recovery *recovery);

/* durable_store(), with the lock that a TPM has. */
int state_directory_store(struct durable *durable);
