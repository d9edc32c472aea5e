/* A file system in memory that loses power: what is under the core's file seam in tests.
 *
 * It keeps what was written and, of that, what was synced. A loss of power leaves what was synced
 * and, of the rest, anything that a disk may have got to:
 *
 *   - of each sector of 512 bytes any of the contents that it had since the last sync: so writes
 *     are kept, dropped, torn between sectors and reordered,
 *   - of each file the length that was synced, or its last,
 *   - of the directory's changes (a file made, renamed or removed) any of them, each one whole.
 *
 * What that is, is asked of `struct io_choices`: all that there is, one after the other, or a
 * random one from a seed. Names that begin with "TMP" are not in the directory afterwards, as a
 * start removes them.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "io.h"

/* What a TPM 2.0's are called (version.h). */
#define JOURNAL_NAME "tpm2-00.journal"
#define JOURNAL_TEMPORARY_NAME "TMP2-00.journal"

enum {
    IO_MEMORY_FILES_MAX = 16,
    IO_MEMORY_NAME_BYTES_MAX = 64,
    IO_MEMORY_PENDING_MAX = 64, /* changes of the directory */
    IO_MEMORY_SECTOR_BYTES = 512,
    IO_CHOICES_MAX = 4096,
};

/* A write to one sector that was not synced. */
struct io_memory_write {
    uint32_t sector;
    uint8_t bytes[IO_MEMORY_SECTOR_BYTES];
};

struct io_memory_file {
    bool used, is_direct;
    uint8_t *bytes, *durable_bytes;
    size_t n_bytes, n_durable_bytes, n_allocated;
    struct io_memory_write *writes;
    size_t n_writes, n_writes_allocated;
};

/* The name of a file, if `file` is one; and a change that was not synced. */
struct io_memory_entry {
    char name[IO_MEMORY_NAME_BYTES_MAX];
    int file; /* -1: none */
};

struct io_memory_change {
    char from[IO_MEMORY_NAME_BYTES_MAX], to[IO_MEMORY_NAME_BYTES_MAX]; /* empty: none */
    int file;
};

struct io_memory {
    struct io io;
    bool is_locked, is_locked_elsewhere;
    struct io_memory_file files[IO_MEMORY_FILES_MAX];
    struct io_memory_entry entries[IO_MEMORY_FILES_MAX], durable_entries[IO_MEMORY_FILES_MAX];
    struct io_memory_change changes[IO_MEMORY_PENDING_MAX];
    size_t n_changes;
    int calls;      /* made so far */
    int fail_from;  /* calls from this one on fail and do nothing; 0: none */
    int fail_to;    /* calls from this one on succeed again; 0: none */
    int off_from;   /* the same for good: the power is off; 0: never */
    int fail_error; /* with this errno */
    bool fail_half; /* a write that fails has written its first half */
    bool fail_late; /* a write or sync that fails has done all of it */
    bool fails_to_create;
    const char *no_room_for; /* a file of this name cannot be created; NULL: all can */
    int syncs;               /* of a file or the directory, so far */
    int skip_sync;           /* the canary: this one does nothing; 0: none */
};

void io_memory_init(struct io_memory *io);
void io_memory_deinit(struct io_memory *io);

/* How many calls were made so far, while other threads make some. */
int io_memory_calls(const struct io_memory *io);

/* Decisions that somebody has to make. */
struct io_choices {
    bool sampled;
    uint64_t random;
    size_t n, n_taken;
    uint32_t taken[IO_CHOICES_MAX], limits[IO_CHOICES_MAX];
};

/* Begin with the first of all combinations, or with a random one. */
void io_choices_init(struct io_choices *choices);
void io_choices_init_sampled(struct io_choices *choices, uint64_t seed);

/* Go on to the next combination. Returns false if there is none; a random one there always is. */
bool io_choices_next(struct io_choices *choices);

/* Choose a number below `limit`. */
uint32_t io_choose(struct io_choices *choices, uint32_t limit);

/* Make `after`, which was initialised, what a loss of power leaves. */
void io_memory_lose_power(const struct io_memory *io, struct io_choices *choices,
                          struct io_memory *after);

/* Ask about what a loss of power leaves, in each way that there is. Returns false at the first that
 * is not right. */
bool io_memory_survives(const struct io_memory *io,
                        bool (*is_right)(const struct io_memory *after, const void *context),
                        const void *context);

/* Find a file as it is. Returns false if it is absent. */
bool io_memory_read(const struct io_memory *io, const char *name, const uint8_t **bytes,
                    size_t *n_bytes);

/* Find a file as it was synced, under a name that was synced. */
bool io_memory_read_durable(const struct io_memory *io, const char *name, const uint8_t **bytes,
                            size_t *n_bytes);
