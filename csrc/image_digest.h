/* The digest of an image: SHA-256 over the SHA-256 of each of its pages, in order.
 *
 * A change is small and an image is not: of what a commit changes a page or two are hashed, and the
 * list of all. A page has DIGEST_PAGE_BYTES, the last one ends with the image, and an image without
 * bytes has none.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "digest.h"
#include "pages.h"

struct delta_image;

enum {
    DIGEST_PAGE_BYTES = 4096, /* the list of 140 KB then takes half as long as a page */
    DIGEST_PAGES_MAX = IMAGE_BYTES_MAX / DIGEST_PAGE_BYTES,
};

struct image_digest {
    uint8_t whole[DIGEST_BYTES];
    uint8_t pages[DIGEST_PAGES_MAX][DIGEST_BYTES]; /* zeros past the image's last */
};

/* Compute the digest of an image of up to IMAGE_BYTES_MAX bytes. What it has in common with
 * `before`, an image or NULL, is not hashed again if the digest of that is known. Returns 0 or
 * -ENOMEM. */
int image_digest_compute(const struct delta_image *image, const struct delta_image *before,
                         struct image_digest *digest);
