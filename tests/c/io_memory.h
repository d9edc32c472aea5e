/* A file system in memory that loses power: what is under the core's file seam in tests.
 *
 * It keeps for each file what was written and what was synced, and for the directory what is
 * there and what was synced. After a loss of power a disk may hold any mix of the two.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "io.h"

enum {
    IO_MEMORY_FILES_MAX = 16,
    IO_MEMORY_FILE_BYTES_MAX = 1 << 18,
};

struct io_memory_file {
    char name[64], durable_name[64]; /* empty: not in the directory */
    uint8_t *bytes, *durable_bytes;
    size_t n_bytes, n_durable_bytes;
};

struct io_memory {
    struct io io;
    struct io_memory_file files[IO_MEMORY_FILES_MAX];
    int calls;         /* made so far */
    int fail_from;     /* calls from this one on fail and do nothing; 0: none */
    int fail_error;    /* with this errno */
    bool forget_syncs; /* the canary: a disk that lies about syncs */
};

void io_memory_init(struct io_memory *io);
void io_memory_deinit(struct io_memory *io);

/* What a loss of power leaves. */
enum io_memory_survivors {
    SURVIVE_DIRECTORY = 1, /* renames and removals that were not synced are there */
    SURVIVE_CONTENT = 2,   /* writes that were not synced are there */
    SURVIVE_HALF = 4,      /* the first half of them is */
    SURVIVE_COMBINATIONS = 8,
};

/* Find a file as it is, or as it would be after a loss of power. Returns false if it is absent. */
bool io_memory_read(struct io_memory *io, const char *name, const uint8_t **bytes, size_t *n_bytes);
bool io_memory_read_after_power_loss(struct io_memory *io, const char *name, int survivors,
                                     uint8_t *bytes, size_t *n_bytes);
