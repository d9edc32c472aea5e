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
};

/* Overwrite and free; there is none then. */
void image_deinit(struct image *image);

/* Overwrite, and keep the memory for the next one. */
void image_wipe(struct image *image);

/* Make it these bytes, without a number. Returns 0, or -ENOMEM: the image is as it was. */
int image_set(struct image *image, const uint8_t *bytes, size_t n_bytes);

void image_swap(struct image *one, struct image *other);

/* True if there is one, and it is these bytes. */
bool image_is(const struct image *image, const uint8_t *bytes, size_t n_bytes);

/* Take a permanent image's generation from the store, unless it has one. Returns 0 or a negative
 * errno. */
int image_number(struct image *image, struct store *store);

/* Compute its digest, unless that is known; in less time if that of `before` is. Returns 0 or
 * -ENOMEM. */
int image_compute_digest(struct image *image, const struct image *before);

/* Of one that is numbered and has a digest; it borrows the image's memory. */
struct delta_image image_as_delta(const struct image *image);
