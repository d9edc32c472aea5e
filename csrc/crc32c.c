#include "crc32c.h"

#include <string.h>

/* The polynomial's multiples for four bits. A larger table is faster, and is wanted only for whole
 * images on processors without the instruction: 64 bytes are enough for that. */
static const uint32_t multiples[16] = {
    0x00000000, 0x105ec76f, 0x20bd8ede, 0x30e349b1, 0x417b1dbc, 0x5125dad3, 0x61c69362, 0x7198540d,
    0x82f63b78, 0x92a8fc17, 0xa24bb5a6, 0xb21572c9, 0xc38d26c4, 0xd3d3e1ab, 0xe330a81a, 0xf36e6f75,
};

uint32_t crc32c_portable(const uint8_t *bytes, size_t n_bytes)
{
    uint32_t crc = ~0U;

    for (size_t i = 0; i < n_bytes; i++) {
        crc ^= bytes[i];
        crc = crc >> 4 ^ multiples[crc & 15];
        crc = crc >> 4 ^ multiples[crc & 15];
    }
    return ~crc;
}

#ifdef __x86_64__

#include <nmmintrin.h>

__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(const uint8_t *bytes, size_t n_bytes)
{
    uint64_t crc = ~0U, word;

    for (; n_bytes >= sizeof(word); bytes += sizeof(word), n_bytes -= sizeof(word)) {
        memcpy(&word, bytes, sizeof(word));
        crc = _mm_crc32_u64(crc, word);
    }
    for (; n_bytes > 0; bytes++, n_bytes--)
        crc = _mm_crc32_u8((uint32_t)crc, *bytes);
    return ~(uint32_t)crc;
}

uint32_t crc32c(const uint8_t *bytes, size_t n_bytes)
{
    if (__builtin_cpu_supports("sse4.2"))
        return crc32c_sse42(bytes, n_bytes);
    return crc32c_portable(bytes, n_bytes);
}

#else

uint32_t crc32c(const uint8_t *bytes, size_t n_bytes)
{
    return crc32c_portable(bytes, n_bytes);
}

#endif
