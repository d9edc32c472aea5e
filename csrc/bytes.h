/* Big-endian numbers in byte buffers, and the clean-up attributes for locals.
 *
 * Everything that QEMU, swtpm and a TPM exchange is big-endian. The callers check lengths; these
 * read and write exactly the bytes their name says.
 */
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define cleanup(function) __attribute__((cleanup(function)))

/* sandbox: close */
static inline void close_descriptor(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static inline uint16_t get_be16(const uint8_t *bytes)
{
    return (uint16_t)(bytes[0] << 8 | bytes[1]);
}

static inline uint32_t get_be32(const uint8_t *bytes)
{
    return (uint32_t)get_be16(bytes) << 16 | get_be16(bytes + 2);
}

static inline uint64_t get_be64(const uint8_t *bytes)
{
    return (uint64_t)get_be32(bytes) << 32 | get_be32(bytes + 4);
}

static inline void put_be16(uint8_t *bytes, uint16_t value)
{
    bytes[0] = (uint8_t)(value >> 8);
    bytes[1] = (uint8_t)value;
}

static inline void put_be32(uint8_t *bytes, uint32_t value)
{
    put_be16(bytes, (uint16_t)(value >> 16));
    put_be16(bytes + 2, (uint16_t)value);
}

static inline void put_be64(uint8_t *bytes, uint64_t value)
{
    put_be32(bytes, (uint32_t)(value >> 32));
    put_be32(bytes + 4, (uint32_t)value);
}
