/* SHA-256 and HMAC-SHA-256 over a list of spans, for the software model and for sessions. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define DIGEST_SIZE 32

struct span {
    const void *data;
    size_t size;
};

void sha256(const struct span *spans, size_t count, uint8_t digest[DIGEST_SIZE]);
void hmac_sha256(struct span key, const struct span *spans, size_t count,
                 uint8_t digest[DIGEST_SIZE]);
