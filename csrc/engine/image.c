#include "image.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "link_types.h"
#include "pages.h"

void image_deinit(struct image *image)
{
    image_wipe(image);
    free(image->bytes);
    *image = (struct image){0};
}

void image_wipe(struct image *image)
{
    if (image->bytes)
        explicit_bzero(image->bytes, image->n_bytes);
    image->n_bytes = 0;
    image->exists = image->is_numbered = image->is_digested = false;
}

/* Memory first: without it the image stays as it is. */
int image_set(struct image *image, const uint8_t *bytes, size_t n_bytes)
{
    uint8_t *larger = NULL;

    if (n_bytes > image->n_allocated || !image->bytes) {
        larger = malloc(n_bytes ? n_bytes : 1);
        if (!larger)
            return -ENOMEM;
    }
    image_wipe(image);
    if (larger) {
        free(image->bytes);
        image->bytes = larger;
        image->n_allocated = n_bytes;
    }
    if (n_bytes > 0)
        memcpy(image->bytes, bytes, n_bytes);
    image->n_bytes = n_bytes;
    image->exists = true;
    return 0;
}

void image_swap(struct image *one, struct image *other)
{
    struct image before = *one;

    *one = *other;
    *other = before;
}

bool image_is(const struct image *image, const uint8_t *bytes, size_t n_bytes)
{
    return image->exists && image->n_bytes == n_bytes &&
           (n_bytes == 0 || memcmp(image->bytes, bytes, n_bytes) == 0);
}

int image_number(struct image *image, struct store *store)
{
    if (image->is_numbered)
        return 0;
    if (image->n_bytes > IMAGE_BYTES_MAX)
        return -EMSGSIZE;
    int r = store_take_generation(store, LINK_STATE_PERMANENT, &image->generation);
    image->is_numbered = r >= 0;
    return r;
}

int image_compute_digest(struct image *image, const struct image *before)
{
    struct delta_image known = {0};

    if (image->is_digested)
        return 0;
    if (before->is_digested)
        known = (struct delta_image){before->bytes, before->n_bytes, 0, &before->digest};
    int r = image_digest_compute(image->bytes, image->n_bytes, &known, &image->digest);
    image->is_digested = r >= 0;
    return r;
}

struct delta_image image_as_delta(const struct image *image)
{
    check(image->is_numbered && image->is_digested);
    return (struct delta_image){image->bytes, image->n_bytes, image->generation, &image->digest};
}
