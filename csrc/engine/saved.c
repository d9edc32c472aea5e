#include "saved.h"

#include "bytes.h"

enum {
    AT_STCLEAR_FLAGS = 36,
    AT_STANY_FLAGS = 43,
    AT_STATE_SAVED = 55,
    TAG_VOLATILE = 0x0001,
    TAG_STCLEAR_FLAGS = 0x0020,
    TAG_STANY_FLAGS = 0x0021,
};

bool saved_is_there(const uint8_t *volatile_state, size_t n_bytes)
{
    return n_bytes > AT_STATE_SAVED && get_be16(volatile_state) == TAG_VOLATILE &&
           get_be16(volatile_state + AT_STCLEAR_FLAGS) == TAG_STCLEAR_FLAGS &&
           get_be16(volatile_state + AT_STANY_FLAGS) == TAG_STANY_FLAGS &&
           volatile_state[AT_STATE_SAVED] != 0;
}
