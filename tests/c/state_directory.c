#include "state_directory.h"

#include <string.h>

#include "bytes.h"
#include "check.h"
#include "checkpoint.h"

enum {
    MINIMUM_VERSION_CONTINUED = 255,
};

bool state_directory_read(const struct io_memory *io, const struct journal_settings *settings,
                          struct journal_evidence *evidence)
{
    const uint8_t *bytes;
    size_t n_bytes;

    *evidence = (struct journal_evidence){
        .identity = settings->identity,
        .secret = settings->sealed ? settings->secret : NULL,
    };
    if (io_memory_read(io, "tpm2-00.permall", &bytes, &n_bytes)) {
        if (n_bytes < CHECKPOINT_HEADER_BYTES || get_be32(bytes + 6) != n_bytes ||
            get_be32(bytes + 12) > n_bytes - CHECKPOINT_HEADER_BYTES)
            return false;
        evidence->continued = bytes[1] == MINIMUM_VERSION_CONTINUED;
        evidence->checkpoint = bytes + CHECKPOINT_HEADER_BYTES;
        evidence->checkpoint_bytes = get_be32(bytes + 12);
    }
    io_memory_read(io, JOURNAL_NAME, &evidence->journal, &evidence->journal_bytes);
    return true;
}

void state_directory_recover(const struct journal_evidence *evidence, uint8_t *image,
                             struct journal_recovery *recovery)
{
    check(journal_recover(evidence, image, recovery) == 0);
    if (recovery->verdict != JOURNAL_B_CHECKPOINT)
        return;
    memcpy(image, evidence->checkpoint, evidence->checkpoint_bytes);
    recovery->image_bytes = evidence->checkpoint_bytes;
    recovery->has_image = true;
}

void state_directory_fold(struct io_memory *io, const struct journal_settings *settings,
                          const uint8_t *image, const struct journal_recovery *recovery)
{
    struct checkpoint_lineage lineage = {.generation = recovery->generation};

    memcpy(lineage.identity, settings->identity, sizeof(lineage.identity));
    check(checkpoint_write(&io->io, NULL, "permall", image, recovery->image_bytes, &lineage) == 0);
    check(journal_remove(&io->io) == 0);
}

int state_directory_store(struct durable *durable)
{
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

    pthread_mutex_lock(&lock);
    int r = durable_store(durable, &lock);
    pthread_mutex_unlock(&lock);
    return r;
}
