#include "outgoing.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "delta.h"
#include "pages.h"
#include "tail.h"

/* What follows on an image of the base. */
struct following {
    struct image image;  /* what was captured; none, if that is the base */
    uint64_t generation; /* of what was captured */
    uint8_t *record;     /* that makes it of the base, or NULL */
    size_t record_bytes;
};

static void following_deinit(struct following *following)
{
    image_deinit(&following->image);
    if (following->record)
        explicit_bzero(following->record, following->record_bytes);
    free(following->record);
}

bool outgoing_has_base(const struct outgoing *outgoing)
{
    return outgoing->permanent.exists && outgoing->following.exists;
}

/* Read what was captured last. Returns 0, -ESTALE if there is nothing whole, or -ENOMEM. */
static int read_captured(struct store *store, unsigned type, struct image *image)
{
    size_t n_bytes;

    int r = image_reserve(image, IMAGE_BYTES_MAX);
    if (r < 0)
        return r;
    if (store_read(store, type, image->bytes, &n_bytes, &image->generation) != 0)
        return -ESTALE;
    image->n_bytes = n_bytes;
    image->exists = image->is_numbered = true;
    image->is_digested = false;
    return 0;
}

static int read_one(struct store *store, unsigned type, uint64_t generation, struct image *image)
{
    int r = read_captured(store, type, image);
    if (r == 0 && image->generation != generation)
        r = -ESTALE;
    return r;
}

/* Take over what was read, if its digest can be had. */
static int keep(struct image *base, struct image *image)
{
    struct delta_common common =
        delta_compare(base->bytes, base->n_bytes, image->bytes, image->n_bytes);

    int r = image_compute_digest(image, base, &common);
    return r < 0 ? r : image_copy(base, image);
}

int outgoing_keep_base(struct outgoing *outgoing, struct store *store, uint64_t permanent,
                       uint64_t following)
{
    cleanup(outgoing_deinit) struct outgoing captured = {0};

    int r = read_one(store, LINK_STATE_PERMANENT, permanent, &captured.permanent);
    if (r == 0)
        r = read_one(store, LINK_STATE_VOLATILE, following, &captured.following);
    if (r == 0)
        r = keep(&outgoing->permanent, &captured.permanent);
    if (r == 0)
        r = keep(&outgoing->following, &captured.following);
    if (r < 0)
        outgoing_deinit(outgoing); /* half of it may be new, and all of it is old */
    return r;
}

static int encode(unsigned type, const struct image *base, struct following *following)
{
    struct image *image = &following->image;
    struct delta_common common =
        delta_compare(base->bytes, base->n_bytes, image->bytes, image->n_bytes);

    int r = image_compute_digest(image, base, &common);
    following->record = r < 0 ? NULL : malloc(DELTA_RECORD_BYTES_MAX);
    if (!following->record)
        return -ENOMEM;
    struct delta_image before = image_as_delta(base), after = image_as_delta(image);
    after.common = &common;
    return delta_encode(type, &before, &after, following->record, &following->record_bytes);
}

static int follow(struct store *store, unsigned type, const struct image *base,
                  struct following *following)
{
    int r = read_captured(store, type, &following->image);
    following->generation = following->image.generation;
    if (r < 0 || following->generation != base->generation)
        return r < 0 ? r : encode(type, base, following);
    image_deinit(&following->image);
    return 0;
}

static void put_digest(uint8_t digest[DIGEST_BYTES], const struct image *base,
                       const struct following *following)
{
    const struct image *image = following->image.exists ? &following->image : base;

    memcpy(digest, image->digest.whole, DIGEST_BYTES);
}

int outgoing_make_tail(struct outgoing *outgoing, struct store *store, struct tail_cipher *cipher,
                       enum link_shutdown said, struct outgoing_tail *tail)
{
    cleanup(following_deinit) struct following permanent = {0}, volatile_one = {0};

    int r = follow(store, LINK_STATE_PERMANENT, &outgoing->permanent, &permanent);
    if (r == 0)
        r = follow(store, LINK_STATE_VOLATILE, &outgoing->following, &volatile_one);
    if (r < 0)
        return r;
    put_digest(tail->digests.permanent_digest, &outgoing->permanent, &permanent);
    put_digest(tail->digests.volatile_digest, &outgoing->following, &volatile_one);
    struct tail says = {
        .permanent_from = outgoing->permanent.generation,
        .permanent_to = permanent.generation,
        .volatile_from = outgoing->following.generation,
        .volatile_to = volatile_one.generation,
        .power = (uint8_t)said,
        .records =
            {
                .permanent = permanent.record,
                .permanent_bytes = permanent.record_bytes,
                .following = volatile_one.record,
                .following_bytes = volatile_one.record_bytes,
            },
    };
    return tail_seal(cipher, &says, &tail->bytes, &tail->n_bytes);
}

void outgoing_deinit(struct outgoing *outgoing)
{
    image_deinit(&outgoing->permanent);
    image_deinit(&outgoing->following);
}
