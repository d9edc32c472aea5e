#include "image_digest.h"

#include <stdbool.h>
#include <string.h>

#include "check.h"
#include "delta.h"

struct page {
    size_t start, n_bytes;
};

static struct page page_of(const struct delta_image *image, size_t number)
{
    size_t start = number * DIGEST_PAGE_BYTES, rest = image->n_bytes - start;

    return (struct page){start, rest < DIGEST_PAGE_BYTES ? rest : DIGEST_PAGE_BYTES};
}

/* True if it is known, without a look at it, that `before`, of the same length, has the page. */
static bool is_common(const struct delta_image *image, struct page page)
{
    return image->common && (page.start + page.n_bytes <= image->common->prefix ||
                             page.start >= image->n_bytes - image->common->suffix);
}

/* True if `before` has the very page, and its digest. */
static bool is_in(const struct delta_image *before, const struct delta_image *image, size_t number)
{
    struct page page = page_of(image, number);

    if (!before || !before->digest || page.start >= before->n_bytes ||
        page_of(before, number).n_bytes != page.n_bytes)
        return false;
    return (image->n_bytes == before->n_bytes && is_common(image, page)) ||
           memcmp(before->bytes + page.start, image->bytes + page.start, page.n_bytes) == 0;
}

int image_digest_compute(const struct delta_image *image, const struct delta_image *before,
                         struct image_digest *digest)
{
    size_t n_pages = (image->n_bytes + DIGEST_PAGE_BYTES - 1) / DIGEST_PAGE_BYTES;

    check(image->n_bytes <= IMAGE_BYTES_MAX);
    memset(digest, 0, sizeof(*digest));
    for (size_t number = 0; number < n_pages; number++) {
        struct page page = page_of(image, number);
        if (is_in(before, image, number)) {
            memcpy(digest->pages[number], before->digest->pages[number], DIGEST_BYTES);
            continue;
        }
        int r = digest_compute(image->bytes + page.start, page.n_bytes, digest->pages[number]);
        if (r < 0)
            return r;
    }
    return digest_compute(digest->pages[0], n_pages * DIGEST_BYTES, digest->whole);
}
