#include "image_digest.h"

#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "delta.h"

static size_t smaller(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* True if `before` has the very page, and its digest. */
static bool is_in(const struct delta_image *before, size_t start, const uint8_t *page,
                  size_t page_bytes)
{
    return before && before->digest && start < before->n_bytes &&
           smaller(before->n_bytes - start, DIGEST_PAGE_BYTES) == page_bytes &&
           memcmp(before->bytes + start, page, page_bytes) == 0;
}

int image_digest_compute(const uint8_t *bytes, size_t n_bytes, const struct delta_image *before,
                         struct image_digest *digest)
{
    size_t n_pages = 0;

    check(n_bytes <= IMAGE_BYTES_MAX);
    memset(digest, 0, sizeof(*digest));
    for (size_t start = 0; start < n_bytes; start += DIGEST_PAGE_BYTES, n_pages++) {
        const uint8_t *page = bytes + start;
        size_t page_bytes = smaller(n_bytes - start, DIGEST_PAGE_BYTES);
        if (is_in(before, start, page, page_bytes)) {
            memcpy(digest->pages[n_pages], before->digest->pages[n_pages], DIGEST_BYTES);
            continue;
        }
        int r = digest_compute(page, page_bytes, digest->pages[n_pages]);
        if (r < 0)
            return r;
    }
    return digest_compute(digest->pages[0], n_pages * DIGEST_BYTES, digest->whole);
}
