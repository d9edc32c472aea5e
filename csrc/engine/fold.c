#include "fold.h"

#include "check.h"

int fold_begin(struct fold *fold, const struct image *image)
{
    check(image->is_numbered && image->is_digested);
    return image_copy(&fold->base, image);
}

int fold_write(struct fold *fold, struct state_files *files)
{
    int r = state_file_write(files, &fold->base, true);

    return r < 0 ? r : state_journal_create(files, &fold->base, &fold->journal);
}

/* What was committed since folding began. */
static int catch_up(struct fold *fold, const struct image *image)
{
    struct delta_image base = image_as_delta(&fold->base);
    struct delta_image current = image_as_delta(image);

    if (base.generation == current.generation)
        return 0;
    int r = journal_append(fold->journal, &base, &current);
    check(r != JOURNAL_FULL); /* a new journal has room for any record */
    return r;
}

int fold_switch(struct fold *fold, const struct image *image, struct journal **journal)
{
    int r = catch_up(fold, image);

    if (r < 0)
        return r;
    r = journal_publish(fold->journal);
    journal_free(*journal);
    *journal = fold->journal;
    fold->journal = NULL;
    return r;
}

void fold_abandon(struct fold *fold, struct io *io)
{
    if (fold->journal)
        journal_remove_temporary(io);
    journal_free(fold->journal);
    fold->journal = NULL;
    image_wipe(&fold->base);
}

void fold_deinit(struct fold *fold)
{
    journal_free(fold->journal);
    image_deinit(&fold->base);
}
