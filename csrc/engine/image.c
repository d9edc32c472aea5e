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
    image->time_ms = 0;
}

int image_reserve(struct image *image, size_t n_bytes)
{
    if (n_bytes <= image->n_allocated && image->bytes)
        return 0;
    uint8_t *larger = malloc(n_bytes ? n_bytes : 1);
    if (!larger)
        return -ENOMEM;
    if (image->n_bytes > 0) {
        memcpy(larger, image->bytes, image->n_bytes);
        explicit_bzero(image->bytes, image->n_bytes);
    }
    free(image->bytes);
    image->bytes = larger;
    image->n_allocated = n_bytes;
    return 0;
}

int image_set(struct image *image, const uint8_t *bytes, size_t n_bytes)
{
    int r = image_reserve(image, n_bytes);
    if (r < 0)
        return r;
    image_wipe(image);
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

struct image image_view(const uint8_t *bytes, size_t n_bytes)
{
    return (struct image){.bytes = (uint8_t *)(uintptr_t)bytes, .n_bytes = n_bytes, .exists = true};
}

void image_follow(struct image *image, const struct image *next, const struct delta_common *common)
{
    bool is_in_place = image->n_bytes == next->n_bytes;
    size_t n_kept = is_in_place ? common->suffix : 0;

    check(next->n_bytes <= image->n_allocated);
    memcpy(image->bytes + common->prefix, next->bytes + common->prefix,
           next->n_bytes - common->prefix - n_kept);
    if (image->n_bytes > next->n_bytes)
        explicit_bzero(image->bytes + next->n_bytes, image->n_bytes - next->n_bytes);
    image->n_bytes = next->n_bytes;
    image->exists = next->exists;
    image->is_numbered = next->is_numbered;
    image->is_digested = next->is_digested;
    image->generation = next->generation;
    image->digest = next->digest;
    image->time_ms = next->time_ms;
}

int image_copy(struct image *image, const struct image *from)
{
    static const struct delta_common nothing = {0};

    int r = image_reserve(image, from->n_bytes);
    if (r >= 0)
        image_follow(image, from, &nothing);
    return r;
}

bool image_is(const struct image *image, const uint8_t *bytes, size_t n_bytes)
{
    return image->exists && image->n_bytes == n_bytes &&
           (n_bytes == 0 || memcmp(image->bytes, bytes, n_bytes) == 0);
}

int image_keep_number(struct image *image, uint64_t generation)
{
    if (image->n_bytes > IMAGE_BYTES_MAX)
        return -EMSGSIZE;
    image->generation = generation;
    image->is_numbered = true;
    return 0;
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

int image_compute_digest(struct image *image, const struct image *before,
                         const struct delta_common *common)
{
    struct delta_image this = {.bytes = image->bytes, .n_bytes = image->n_bytes, .common = common};
    struct delta_image known = {0};

    if (image->is_digested)
        return 0;
    if (before && before->is_digested)
        known = (struct delta_image){
            .bytes = before->bytes,
            .n_bytes = before->n_bytes,
            .digest = &before->digest,
        };
    int r = image_digest_compute(&this, &known, &image->digest);
    image->is_digested = r >= 0;
    return r;
}

struct delta_image image_as_delta(const struct image *image)
{
    check(image->is_numbered && image->is_digested);
    return (struct delta_image){
        .bytes = image->bytes,
        .n_bytes = image->n_bytes,
        .generation = image->generation,
        .digest = &image->digest,
        .time_ms = image->time_ms,
    };
}
