/*
 * libcrypto's low-level SHA-256 and SHA-1 are used, not EVP: EVP would pull all of libcrypto into a
 * static program that must be unpacked at every boot.
 */
#define OPENSSL_API_COMPAT 0x10100000L

#include "hash.h"

#include <openssl/sha.h>
#include <string.h>

#define HMAC_INNER_PAD 0x36
#define HMAC_OUTER_PAD 0x5c

static void update(SHA256_CTX *context, const struct span *spans, size_t count)
{
    for (size_t i = 0; i < count; i++)
        SHA256_Update(context, spans[i].data, spans[i].size);
}

void sha256(const struct span *spans, size_t count, uint8_t digest[DIGEST_SIZE])
{
    SHA256_CTX context;

    SHA256_Init(&context);
    update(&context, spans, count);
    SHA256_Final(digest, &context);
}

void sha1(const struct span *spans, size_t count, uint8_t digest[20])
{
    SHA_CTX context;

    SHA1_Init(&context);
    for (size_t i = 0; i < count; i++)
        SHA1_Update(&context, spans[i].data, spans[i].size);
    SHA1_Final(digest, &context);
}

static void keyed(SHA256_CTX *context, const uint8_t block[SHA256_CBLOCK], uint8_t pad)
{
    uint8_t padded[SHA256_CBLOCK];

    for (size_t i = 0; i < sizeof(padded); i++)
        padded[i] = block[i] ^ pad;
    SHA256_Init(context);
    SHA256_Update(context, padded, sizeof(padded));
}

void hmac_sha256(struct span key, const struct span *spans, size_t count,
                 uint8_t digest[DIGEST_SIZE])
{
    uint8_t block[SHA256_CBLOCK] = {0};
    SHA256_CTX context;

    if (key.size > sizeof(block))
        sha256(&key, 1, block);
    else if (key.size > 0)
        memcpy(block, key.data, key.size);
    keyed(&context, block, HMAC_INNER_PAD);
    update(&context, spans, count);
    SHA256_Final(digest, &context);
    keyed(&context, block, HMAC_OUTER_PAD);
    SHA256_Update(&context, digest, DIGEST_SIZE);
    SHA256_Final(digest, &context);
}
