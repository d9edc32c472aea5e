#include "message.h"

#include <string.h>

void put_bytes(struct message *message, const void *data, size_t size)
{
    if (message->broken || size > sizeof(message->data) - message->size) {
        message->broken = true;
        return;
    }
    if (size > 0)
        memcpy(message->data + message->size, data, size);
    message->size += size;
}

void put_unsigned(struct message *message, uint64_t value, size_t size)
{
    uint8_t bytes[sizeof(value)];

    for (size_t i = 0; i < size; i++)
        bytes[i] = (uint8_t)(value >> (8 * (size - 1 - i)));
    put_bytes(message, bytes, size);
}

void put_sized(struct message *message, const void *data, size_t size)
{
    put_u16(message, size);
    put_bytes(message, data, size);
}

struct span take_bytes(struct message *message, size_t size)
{
    struct span span = {message->data + message->offset, size};

    if (message->broken || size > message->size - message->offset) {
        message->broken = true;
        return (struct span){message->data, 0};
    }
    message->offset += size;
    return span;
}

uint64_t take_unsigned(struct message *message, size_t size)
{
    struct span span = take_bytes(message, size);
    const uint8_t *bytes = span.data;
    uint64_t value = 0;

    for (size_t i = 0; i < span.size; i++)
        value = value << 8 | bytes[i];
    return value;
}

struct span take_sized(struct message *message)
{
    return take_bytes(message, take_u16(message));
}
