/* A tail as docs/stream-format.md has it, apart from the code under test: also one that no source
 * makes, under the seal of one that does. */
#pragma once

#include <stddef.h>
#include <stdint.h>

struct lane_keying;

/* Seal any content behind a header that has everything but its nonce. The caller frees it. */
uint8_t *tail_seal_apart(const struct lane_keying *keying, const uint8_t header[60],
                         const uint8_t *content, size_t content_bytes);
