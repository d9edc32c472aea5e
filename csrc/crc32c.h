/* CRC-32C (Castagnoli), as iSCSI and SSE 4.2 compute it: reflected polynomial 0x82f63b78, initial
 * value and final inversion of all ones (RFC 3720, 12.1). It finds accidents; against intent there
 * are digests. */
#pragma once

#include <stddef.h>
#include <stdint.h>

/* Return the CRC-32C of `n_bytes` bytes, with the processor's instruction where it has one. */
uint32_t crc32c(const uint8_t *bytes, size_t n_bytes);

/* The same on any processor. */
uint32_t crc32c_portable(const uint8_t *bytes, size_t n_bytes);
