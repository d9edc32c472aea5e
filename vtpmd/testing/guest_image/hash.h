/* SHA-256, HMAC-SHA-256 and a TPM 1.2's SHA-1 over a list of spans, for the software model and for
 * sessions. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#define DIGEST_SIZE 32

struct span {
    const void *data;
    size_t size;
};

void sha256(const struct span *spans, size_t count, uint8_t digest[DIGEST_SIZE]);
void sha1(const struct span *spans, size_t count, uint8_t digest[20]);
void hmac_sha256(struct span key, const struct span *spans, size_t count,
                 uint8_t digest[DIGEST_SIZE]);
