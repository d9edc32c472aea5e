/* SHA-256, by libcrypto. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    DIGEST_BYTES = 32,
};

/* Compute the SHA-256 of `n_bytes` bytes. Returns 0 or -ENOMEM. */
int digest_compute(const uint8_t *bytes, size_t n_bytes, uint8_t digest[DIGEST_BYTES]);
