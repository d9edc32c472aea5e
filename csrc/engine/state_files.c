#include "state_files.h"

#include <errno.h>
#include <libtpms/tpm_nvfilename.h>
#include <string.h>
#include <sys/random.h>

#include "hold.h"

_Static_assert((int)CHECKPOINT_IDENTITY_BYTES == (int)JOURNAL_IDENTITY_BYTES, "the same identity");

static const struct cipher_key *key_of(const struct state_files *files)
{
    return files->key.n_bytes ? &files->key : NULL;
}

static struct checkpoint_lineage lineage_of(const struct image *image, const uint8_t *identity)
{
    struct checkpoint_lineage lineage = {.generation = image->generation};

    memcpy(lineage.identity, identity, sizeof(lineage.identity));
    return lineage;
}

int state_file_prepare(struct state_files *files, const struct image *image,
                       const uint8_t identity[CHECKPOINT_IDENTITY_BYTES], bool is_continued)
{
    struct checkpoint_lineage lineage = lineage_of(image, identity);

    lineage.continued = is_continued;
    return checkpoint_prepare(files->io, key_of(files), TPM_PERMANENT_ALL_NAME, image->bytes,
                              image->n_bytes, files->keeps_journals ? &lineage : NULL);
}

int state_file_fill(struct state_files *files, struct room *room, const struct image *image,
                    const uint8_t identity[CHECKPOINT_IDENTITY_BYTES])
{
    cleanup(swtpm_wrapped_deinit) struct swtpm_wrapped file;
    struct checkpoint_lineage lineage = lineage_of(image, identity);

    int r = swtpm_wrap(SWTPM_FILE, key_of(files), image->bytes, image->n_bytes, &lineage, &file);
    return r < 0 ? r : room_fill(room, files->io, &file);
}

int state_file_publish(struct state_files *files)
{
    return checkpoint_publish(files->io, TPM_PERMANENT_ALL_NAME);
}

int state_file_find(struct state_files *files)
{
    return checkpoint_find(files->io, TPM_PERMANENT_ALL_NAME);
}

void state_file_discard(struct state_files *files)
{
    checkpoint_discard(files->io, TPM_PERMANENT_ALL_NAME);
}

int state_file_write(struct state_files *files, const struct image *image, bool is_continued)
{
    int r = state_file_prepare(files, image, files->settings.identity, is_continued);

    return r < 0 ? r : state_file_publish(files);
}

/* sandbox: getrandom */
int state_journal_create(struct state_files *files, const struct image *image,
                         struct journal **journal)
{
    struct delta_image base = image_as_delta(image);
    uint8_t salt[JOURNAL_SALT_BYTES];

    if (getrandom(salt, sizeof(salt), 0) != sizeof(salt))
        return -EIO;
    return journal_create(files->io, &files->settings, salt, &base, journal);
}
