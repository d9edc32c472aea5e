/* swtpm's encryption of a state: AES-CBC under a random IV, then HMAC-SHA256 over ciphertext and
 * IV, both under one key (docs/state-format.md; swtpm's swtpm_aes.c and swtpm_nvstore.c).
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "digest.h"

enum {
    CIPHER_KEY_BYTES_MAX = 32, /* or 16: AES-256 or AES-128 */
};

/* The key is its owner's to wipe. */
struct cipher_key {
    uint32_t n_bytes; /* 16 or 32 */
    uint8_t bytes[CIPHER_KEY_BYTES_MAX];
};

/* An encrypted state. `ciphertext` is followed by the IV, which is as long as the key. */
struct cipher_output {
    uint8_t *ciphertext;
    size_t n_bytes; /* of the ciphertext alone */
    const uint8_t *iv;
    uint8_t mac[DIGEST_BYTES];
};

/* Encrypt `n_bytes` bytes under a new IV. Returns 0, or -ENOMEM or -EIO without a random number;
 * the caller ends the output. */
int cipher_encrypt(const struct cipher_key *key, const uint8_t *bytes, size_t n_bytes,
                   struct cipher_output *output);

void cipher_output_deinit(struct cipher_output *output);

/* What is to be decrypted. */
struct cipher_input {
    const uint8_t *ciphertext;
    size_t n_bytes;
    const uint8_t *iv; /* as long as the key, or 16 bytes; else it does not open */
    size_t iv_bytes;
    const uint8_t *mac; /* of DIGEST_BYTES */
};

enum {
    CIPHER_DOES_NOT_OPEN = 1, /* it was altered, or the key is another one */
};

/* Decrypt into `out`, which has room for as much as the ciphertext has; the result is shorter. The
 * MAC is checked before all else. Returns 0, CIPHER_DOES_NOT_OPEN or -ENOMEM; what is in `out` then
 * is for the caller to wipe, too. */
int cipher_decrypt(const struct cipher_key *key, const struct cipher_input *input, uint8_t *out,
                   size_t *n_bytes);

/* Decrypt what swtpm wrote in version 1 of its format: SHA-256 and data, by AES-CBC under an IV of
 * zeros. Else as cipher_decrypt(). */
int cipher_decrypt_old(const struct cipher_key *key, const uint8_t *ciphertext, size_t n_ciphertext,
                       uint8_t *out, size_t *n_bytes);
