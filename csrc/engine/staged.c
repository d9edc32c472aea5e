#include "staged.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "link_types.h"
#include "nvram.h"
#include "pages.h"

static const struct delta_image nothing = {.bytes = (const uint8_t *)""};

/* Make room for what a record makes. Returns 0 or -ENOMEM. */
static int make_room(struct image *next, const struct delta_header *header)
{
    size_t n_bytes = header->result_bytes;

    next->bytes = malloc(n_bytes ? n_bytes : 1);
    if (!next->bytes)
        return -ENOMEM;
    next->n_bytes = next->n_allocated = n_bytes;
    return 0;
}

static void number(struct image *next, const struct delta_header *header)
{
    next->exists = next->is_numbered = next->is_digested = true;
    next->generation = header->to_generation;
}

/* Make `next`, which is nothing yet, of an image, if the record has anything to say. */
static int make(enum link_state_type type, const struct image *image, const uint8_t *record,
                size_t record_bytes, struct image *next)
{
    struct delta_header header;

    if (record_bytes == 0)
        return 0;
    if (delta_inspect(record, record_bytes, &header) != 0 ||
        header.to_generation > GENERATION_GIVEN_MAX)
        return -EBADMSG;
    bool is_whole = header.from_generation == 0 || !image->exists;
    struct delta_image base = is_whole ? nothing : image_as_delta(image);
    int r = make_room(next, &header);
    if (r == 0)
        r = delta_apply(type, &base, record, record_bytes, next->bytes, &header, &next->digest);
    if (r != 0)
        return r < 0 ? r : -EBADMSG;
    number(next, &header);
    return 0;
}

/* What was there is `before` then; if there is nothing next, it is what there is. */
static void take_over(struct image *image, struct image *next, struct image *before)
{
    image_deinit(before);
    if (next->exists) {
        *before = *image;
        *image = *next;
        *next = (struct image){0};
    }
}

int staged_take(struct staged *staged, const struct staged_records *records)
{
    struct staged next = {0};

    int r = make(LINK_STATE_PERMANENT, &staged->permanent, records->permanent,
                 records->permanent_bytes, &next.permanent);
    if (r == 0)
        r = make(LINK_STATE_VOLATILE, &staged->following, records->following,
                 records->following_bytes, &next.following);
    if (r == 0) {
        take_over(&staged->permanent, &next.permanent, &staged->permanent_before);
        take_over(&staged->following, &next.following, &staged->following_before);
    }
    staged_deinit(&next);
    return r;
}

static bool is(const struct image *image, uint64_t generation)
{
    return image->exists && image->generation == generation;
}

bool staged_is(const struct staged *staged, uint64_t permanent, uint64_t following)
{
    return is(&staged->permanent, permanent) && is(&staged->following, following);
}

static bool was(const struct image *image, const struct image *before, uint64_t generation)
{
    return is(before->exists ? before : image, generation);
}

bool staged_was(const struct staged *staged, uint64_t permanent, uint64_t following)
{
    return was(&staged->permanent, &staged->permanent_before, permanent) &&
           was(&staged->following, &staged->following_before, following);
}

static void go_back(struct image *image, struct image *before)
{
    if (before->exists)
        image_swap(image, before);
}

void staged_go_back(struct staged *staged)
{
    go_back(&staged->permanent, &staged->permanent_before);
    go_back(&staged->following, &staged->following_before);
}

int staged_get(const struct staged *staged, struct nvram_states *states)
{
    if (!staged->permanent.exists || !staged->following.exists)
        return -ENOENT;
    *states = (struct nvram_states){
        .permanent = staged->permanent.bytes,
        .permanent_bytes = staged->permanent.n_bytes,
        .permanent_digest = staged->permanent.digest.whole,
        .volatile_state = staged->following.bytes,
        .volatile_bytes = staged->following.n_bytes,
        .volatile_digest = staged->following.digest.whole,
    };
    return 0;
}

void staged_deinit(struct staged *staged)
{
    image_deinit(&staged->permanent);
    image_deinit(&staged->permanent_before);
    image_deinit(&staged->following);
    image_deinit(&staged->following_before);
}
