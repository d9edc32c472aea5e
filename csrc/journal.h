/* The journal's writer: makes one file, and appends a record for each commit.
 *
 *     (none) ──journal_create──► unnamed ──journal_publish──► named ──journal_remove──► (none)
 *                                   └──── journal_append ──────┘
 *                                    └── journal_write, _sync ─┘
 *                                   a failed write or sync: broken, for good
 *
 * The order of what reaches the disk (journal_format.h has the rules that it keeps):
 *
 *     create    temporary file: header and zeros; sync
 *     append    the record; data sync. It writes no metadata, as the space is there. The two may be
 *               apart, but the next record waits for both: a gap between records is damage
 *     publish   rename to tpm2-00.journal; sync of the directory
 *
 * All names are in the state directory. journal_recover.h reads what this has written.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "delta.h"
#include "io.h"
#include "journal_format.h"

/* What every journal of one vTPM has in common. */
struct journal_settings {
    uint8_t identity[JOURNAL_IDENTITY_BYTES];
    uint8_t secret[JOURNAL_SECRET_BYTES]; /* of this vTPM, for journals only */
    bool sealed;                          /* if not, there is no secret */
    uint32_t file_bytes;                  /* whole pages, up to JOURNAL_BYTES_MAX */
};

struct journal;

/* Make a journal that continues `base`, durable but for its name. Its salt must be random: it is
 * what makes the key. Returns 0 or a negative errno, and then no file is left. */
int journal_create(struct io *io, const struct journal_settings *settings,
                   const uint8_t salt[JOURNAL_SALT_BYTES], const struct delta_image *base,
                   struct journal **journal);

enum {
    JOURNAL_FULL = 1, /* the record does not fit; nothing was written */
};

/* Append the record that turns `base`, which the last one has made, into `next`. Both have their
 * digest. Returns 0 once it is durable, JOURNAL_FULL, or a negative errno; the journal is broken
 * then, and takes no more. */
int journal_append(struct journal *journal, const struct delta_image *base,
                   const struct delta_image *next);

/* The same, but not durable before journal_sync(), without which nothing more can be appended: a
 * loss of power leaves the record, or does not. */
int journal_write(struct journal *journal, const struct delta_image *base,
                  const struct delta_image *next);

/* Have what was written last durable, if it is not. Returns 0, or a negative errno, again and
 * again; the record may be there or not then, and the journal is broken. */
int journal_sync(struct journal *journal);

/* Give the file its name, in place of another journal. Returns 0 once that is durable. */
int journal_publish(struct journal *journal);

/* True once less than a quarter is left: time to fold. */
bool journal_is_worn(const struct journal *journal);

/* True once a write has failed. */
bool journal_is_broken(const struct journal *journal);

/* Close the file and overwrite the key; NULL is nothing. */
void journal_free(struct journal *journal);

/* Remove the named journal, or the unnamed one, if there is one. Returns 0 once that is durable. */
int journal_remove(struct io *io);
void journal_remove_temporary(struct io *io);
