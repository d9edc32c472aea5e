/* A state of the vTPM in memory, as libtpms marshals it; overwritten when it goes. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "delta.h"
#include "image_digest.h"

struct store;

struct image {
    uint8_t *bytes;
    size_t n_bytes, n_allocated;
    bool exists;
    bool is_numbered; /* its generation is known */
    bool is_digested; /* its digest is */
    uint64_t generation;
    struct image_digest digest;
    uint64_t time_ms; /* at which it was committed (delta.h), or 0 */
};

/* Overwrite and free; there is none then. */
void image_deinit(struct image *image);

/* Overwrite, and keep the memory for the next one. */
void image_wipe(struct image *image);

/* Make it these bytes, without a number. Returns 0, or -ENOMEM: the image is as it was. */
int image_set(struct image *image, const uint8_t *bytes, size_t n_bytes);

void image_swap(struct image *one, struct image *other);

/* Have room for so many bytes; it is what it was. Returns 0 or -ENOMEM. */
int image_reserve(struct image *image, size_t n_bytes);

/* An image of bytes that are another's, for as long as they are there: nothing here may wipe it. */
struct image image_view(const uint8_t *bytes, size_t n_bytes);

/* Make it a copy of `next`, with which it has so much in common. It has room for that. */
void image_follow(struct image *image, const struct image *next, const struct delta_common *common);

/* True if there is one, and it is these bytes. */
bool image_is(const struct image *image, const uint8_t *bytes, size_t n_bytes);

/* Make it a copy of another, with its number and digest. Returns 0, or -ENOMEM: it is as it was. */
int image_copy(struct image *image, const struct image *from);

/* Take a permanent image's generation from the store, unless it has one. Returns 0 or a negative
 * errno. */
int image_number(struct image *image, struct store *store);

/* Have a permanent image keep the generation that it had elsewhere. Returns 0 or a negative errno.
 */
int image_keep_number(struct image *image, uint64_t generation);

/* Compute its digest, unless that is known; in less time if that of `before`, which may be NULL,
 * is, with which it has so much in common. Returns 0 or -ENOMEM. */
int image_compute_digest(struct image *image, const struct image *before,
                         const struct delta_common *common);

/* Of one that is numbered and has a digest; it borrows the image's memory. */
struct delta_image image_as_delta(const struct image *image);
