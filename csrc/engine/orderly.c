#include "orderly.h"

#include <stdbool.h>

#include "bytes.h"

#define ALL_MAGIC UINT32_C(0xab364723)
#define CONSTANTS_MAGIC UINT32_C(0xc9ea6431)
#define DATA_MAGIC UINT32_C(0x12213443)

enum {
    SECRETS = 12, /* sized fields in a row */
    /* orderlyState: TPM_SU_CLEAR or TPM_SU_STATE with how it was started, or that there is none. */
    ORDERLY_CLEAR = 0,
    ORDERLY_STATE = 1,
    ORDERLY_STARTED = 0xc000, /* PRE_STARTUP_FLAG, STARTUP_LOCALITY_3 */
};

/* What is left to read. */
struct cursor {
    const uint8_t *bytes;
    size_t n_bytes;
};

static bool skip(struct cursor *in, uint64_t n_bytes)
{
    if (n_bytes > in->n_bytes)
        return false;
    in->bytes += n_bytes;
    in->n_bytes -= (size_t)n_bytes;
    return true;
}

static bool take_u16(struct cursor *in, uint16_t *value)
{
    const uint8_t *bytes = in->bytes;

    if (!skip(in, sizeof(*value)))
        return false;
    *value = get_be16(bytes);
    return true;
}

static bool take_u32(struct cursor *in, uint32_t *value)
{
    const uint8_t *bytes = in->bytes;

    if (!skip(in, sizeof(*value)))
        return false;
    *value = get_be32(bytes);
    return true;
}

static bool skip_sized(struct cursor *in)
{
    uint16_t n_bytes;

    return take_u16(in, &n_bytes) && skip(in, n_bytes);
}

static bool skip_block(struct cursor *in)
{
    return skip(in, 1) && skip_sized(in);
}

static bool take_header(struct cursor *in, uint32_t expected, uint16_t first, uint16_t last,
                        uint16_t *version)
{
    uint32_t magic;
    uint16_t minimum;

    return take_u16(in, version) && take_u32(in, &magic) && take_u16(in, &minimum) &&
           magic == expected && *version >= first && *version <= last;
}

static bool skip_constants(struct cursor *in)
{
    uint16_t version;
    uint32_t count;

    return take_header(in, CONSTANTS_MAGIC, 3, 3, &version) && take_u32(in, &count) &&
           skip(in, (uint64_t)count * sizeof(uint32_t)) && skip_block(in);
}

static bool skip_secrets(struct cursor *in)
{
    for (int i = 0; i < SECRETS; i++)
        if (!skip_sized(in))
            return false;
    return true;
}

static bool skip_banks(struct cursor *in)
{
    uint32_t count;

    if (!take_u32(in, &count))
        return false;
    for (; count > 0; count--)
        if (!skip(in, sizeof(uint16_t)) || in->n_bytes == 0 || !skip(in, 1 + in->bytes[0]))
            return false;
    return true;
}

static bool find_orderly_state(struct cursor in, uint16_t *state)
{
    uint16_t version;

    return take_header(&in, ALL_MAGIC, 3, 4, &version) && (version == 3 || skip_sized(&in)) &&
           skip_constants(&in) && take_header(&in, DATA_MAGIC, 4, 5, &version) &&
           skip(&in, 1 + 3 * sizeof(uint16_t)) && skip_secrets(&in) &&
           skip(&in, sizeof(uint64_t) + sizeof(uint32_t)) && skip_block(&in) && skip_banks(&in) &&
           skip_sized(&in) && skip(&in, 4 * sizeof(uint32_t) + 1) && take_u16(&in, state);
}

enum link_shutdown orderly_shutdown(const uint8_t *permanent, size_t n_bytes)
{
    uint16_t state;

    if (!find_orderly_state((struct cursor){permanent, n_bytes}, &state))
        return LINK_SHUTDOWN_NONE;
    if (state == ORDERLY_CLEAR)
        return LINK_SHUTDOWN_CLEAR;
    return (state & ~ORDERLY_STARTED) == ORDERLY_STATE ? LINK_SHUTDOWN_STATE : LINK_SHUTDOWN_NONE;
}
