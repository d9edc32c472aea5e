#include "saved.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"

enum {
    AT_STCLEAR_FLAGS = 36,
    AT_STANY_FLAGS = 43,
    AT_POST_INITIALISE = 45,
    AT_STATE_SAVED = 55,
    TAG_VOLATILE = 0x0001,
    TAG_STCLEAR_FLAGS = 0x0020,
    TAG_STANY_FLAGS = 0x0021,
    LENGTH_BYTES = 4,
};

bool saved_is_of_use(const uint8_t *volatile_state, size_t n_bytes)
{
    return n_bytes > AT_STATE_SAVED && get_be16(volatile_state) == TAG_VOLATILE &&
           get_be16(volatile_state + AT_STCLEAR_FLAGS) == TAG_STCLEAR_FLAGS &&
           get_be16(volatile_state + AT_STANY_FLAGS) == TAG_STANY_FLAGS &&
           (volatile_state[AT_POST_INITIALISE] != 0 || volatile_state[AT_STATE_SAVED] != 0);
}

int saved_append(uint8_t **volatile_state, size_t *n_bytes, const uint8_t *saved,
                 size_t saved_bytes)
{
    uint8_t *both = realloc(*volatile_state, *n_bytes + saved_bytes + LENGTH_BYTES);

    if (!both)
        return -ENOMEM;
    if (saved_bytes > 0)
        memcpy(both + *n_bytes, saved, saved_bytes);
    put_be32(both + *n_bytes + saved_bytes, (uint32_t)saved_bytes);
    *volatile_state = both;
    *n_bytes += saved_bytes + LENGTH_BYTES;
    return 0;
}

bool saved_measure(const uint8_t *image, size_t n_bytes, size_t *volatile_bytes,
                   size_t *saved_bytes)
{
    if (n_bytes < LENGTH_BYTES)
        return false;
    size_t both_bytes = n_bytes - LENGTH_BYTES;
    *saved_bytes = get_be32(image + both_bytes);
    if (*saved_bytes > both_bytes)
        return false;
    *volatile_bytes = both_bytes - *saved_bytes;
    return true;
}
