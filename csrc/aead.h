/* AES-256-GCM and HKDF-SHA256, by libcrypto. */
#pragma once

#include <stddef.h>
#include <stdint.h>

enum {
    AEAD_KEY_BYTES = 32,
    AEAD_NONCE_BYTES = 12, /* the size that GCM takes as it is */
    AEAD_TAG_BYTES = 16,
};

/* Derive `key` from a secret (RFC 5869). `label` says what for. Returns 0 or -ENOMEM. */
int aead_derive(const uint8_t *secret, size_t secret_bytes, const uint8_t *salt, size_t salt_bytes,
                const char *label, uint8_t key[AEAD_KEY_BYTES]);

/* A key, in use in one thread. */
struct aead;

int aead_new(struct aead **aead, const uint8_t key[AEAD_KEY_BYTES]);

/* Overwrite and free the key; NULL is nothing. */
void aead_free(struct aead *aead);

/* Encrypt in place. A `number`, which makes the nonce, is used once with a key. `associated` is
 * vouched for too. Returns 0 or -ENOMEM. */
int aead_seal(struct aead *aead, uint64_t number, const uint8_t *associated,
              size_t associated_bytes, uint8_t *bytes, size_t n_bytes, uint8_t tag[AEAD_TAG_BYTES]);

/* The same with a whole nonce: with one key numbers are used, or nonces. */
int aead_seal_with(struct aead *aead, const uint8_t nonce[AEAD_NONCE_BYTES],
                   const uint8_t *associated, size_t associated_bytes, uint8_t *bytes,
                   size_t n_bytes, uint8_t tag[AEAD_TAG_BYTES]);

enum {
    AEAD_FORGED = 1, /* not what was sealed with this key and nonce */
};

/* Decrypt in place. Returns 0, -ENOMEM, or AEAD_FORGED and overwrites the bytes. */
int aead_open(struct aead *aead, uint64_t number, const uint8_t *associated,
              size_t associated_bytes, uint8_t *bytes, size_t n_bytes,
              const uint8_t tag[AEAD_TAG_BYTES]);

/* The same with a whole nonce. */
int aead_open_with(struct aead *aead, const uint8_t nonce[AEAD_NONCE_BYTES],
                   const uint8_t *associated, size_t associated_bytes, uint8_t *bytes,
                   size_t n_bytes, const uint8_t tag[AEAD_TAG_BYTES]);
