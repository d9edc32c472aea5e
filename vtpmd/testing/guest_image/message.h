/*
 * A TPM command or response with a cursor, big-endian. Putting beyond the end and taking beyond
 * what there is set `broken` and do nothing else, so that callers check once, at the end.
 */
#pragma once

#include "hash.h"

#include <stdbool.h>

#define MESSAGE_BYTES_MAX 4096 /* Linux's buffer, TPM_BUFSIZE */

struct message {
    size_t size;
    size_t offset; /* of what is taken next */
    bool broken;
    uint8_t data[MESSAGE_BYTES_MAX];
};

void put_unsigned(struct message *message, uint64_t value, size_t size);
void put_bytes(struct message *message, const void *data, size_t size);
void put_sized(struct message *message, const void *data, size_t size); /* a TPM2B */

static inline void put_u8(struct message *message, uint8_t value)
{
    put_unsigned(message, value, 1);
}

static inline void put_u16(struct message *message, uint16_t value)
{
    put_unsigned(message, value, 2);
}

static inline void put_u32(struct message *message, uint32_t value)
{
    put_unsigned(message, value, 4);
}

uint64_t take_unsigned(struct message *message, size_t size);
/* The span stays the message's; it is empty when the message is broken. */
struct span take_bytes(struct message *message, size_t size);
struct span take_sized(struct message *message);

static inline uint8_t take_u8(struct message *message)
{
    return (uint8_t)take_unsigned(message, 1);
}

static inline uint16_t take_u16(struct message *message)
{
    return (uint16_t)take_unsigned(message, 2);
}

static inline uint32_t take_u32(struct message *message)
{
    return (uint32_t)take_unsigned(message, 4);
}

static inline uint64_t take_u64(struct message *message)
{
    return take_unsigned(message, 8);
}
