/* A state's file and its image in memory, which follows it: all but the permanent state's, which
 * durable.h has.
 *
 *     absent ─stored─► there ─removed─► absent
 *     absent, there ─to store or to remove it fails─► unsure ─stored, or removed─► there, absent
 *     absent ─another process may have left one─► unsure
 *
 * There, the file has the image. Unsure, it may have that, or what it was to have, or not be there.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "cipher.h"
#include "image.h"
#include "io.h"

enum kept_state {
    KEPT_ABSENT, /* there is neither file nor image */
    KEPT_THERE,
    KEPT_UNSURE, /* there may be an image: then it is what counts */
    KEPT_STATES,
};

struct kept_file {
    const char *name;
    enum kept_state state;
    struct image image;
};

/* Take what the file holds. Returns 0 or -ENOMEM: nothing is changed. */
int kept_load(struct kept_file *file, const uint8_t *bytes, size_t n_bytes);

/* Have these bytes in the file, and as the image. Returns 0 once they are durable, or a negative
 * errno: the image is the one before. */
int kept_store(struct kept_file *file, struct io *io, const struct cipher_key *key,
               const uint8_t *bytes, size_t n_bytes);

/* Have neither. Returns 0 once that is durable, or a negative errno: the image is as it was. */
int kept_remove(struct kept_file *file, struct io *io);

/* Another process may have written to the file, or made one: have the image in it, if there is one;
 * else what is there, if anything is, is still to be removed. Returns 0 or a negative errno. */
int kept_reclaim(struct kept_file *file, struct io *io, const struct cipher_key *key);

/* Forget it, and overwrite the image; the file is as it is. */
void kept_deinit(struct kept_file *file);
