#include "kept_file.h"

#include "check.h"
#include "checkpoint.h"

/* The one writer of its state. */
static void set(struct kept_file *file, enum kept_state state)
{
    check(state == KEPT_UNSURE || file->image.exists == (state == KEPT_THERE));
    file->state = state;
}

int kept_load(struct kept_file *file, const uint8_t *bytes, size_t n_bytes)
{
    int r = image_set(&file->image, bytes, n_bytes);

    if (r >= 0)
        set(file, KEPT_THERE);
    return r;
}

static int write_image(struct kept_file *file, struct io *io, const struct cipher_key *key,
                       const struct image *image)
{
    return checkpoint_write(io, key, file->name, image->bytes, image->n_bytes, NULL);
}

int kept_store(struct kept_file *file, struct io *io, const struct cipher_key *key,
               const uint8_t *bytes, size_t n_bytes)
{
    struct image next = {0};

    if (file->state == KEPT_THERE && image_is(&file->image, bytes, n_bytes))
        return 0;
    /* Memory first: once the file is durable, nothing may fail. */
    int r = image_set(&next, bytes, n_bytes);
    if (r < 0)
        return r;
    r = write_image(file, io, key, &next);
    if (r >= 0)
        image_swap(&file->image, &next);
    set(file, r < 0 ? KEPT_UNSURE : KEPT_THERE);
    image_deinit(&next);
    return r;
}

int kept_remove(struct kept_file *file, struct io *io)
{
    if (file->state == KEPT_ABSENT)
        return 0;
    int r = checkpoint_remove(io, file->name);
    if (r >= 0)
        image_deinit(&file->image);
    set(file, r < 0 ? KEPT_UNSURE : KEPT_ABSENT);
    return r;
}

int kept_reclaim(struct kept_file *file, struct io *io, const struct cipher_key *key)
{
    bool is_there = file->image.exists;

    int r = is_there ? write_image(file, io, key, &file->image) : 0;
    set(file, is_there && r >= 0 ? KEPT_THERE : KEPT_UNSURE);
    return r;
}

void kept_deinit(struct kept_file *file)
{
    image_deinit(&file->image);
    set(file, KEPT_ABSENT);
}
