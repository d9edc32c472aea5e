#include "aead.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/kdf.h>
#include <openssl/params.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"

struct aead {
    EVP_CIPHER_CTX *sealing, *opening; /* each has the key, expanded */
};

int aead_derive(const uint8_t *secret, size_t secret_bytes, const uint8_t *salt, size_t salt_bytes,
                const char *label, uint8_t key[AEAD_KEY_BYTES])
{
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_KDF_PARAM_DIGEST, (char *)"SHA256", 0),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_KEY, (void *)secret, secret_bytes),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_SALT, (void *)salt, salt_bytes),
        OSSL_PARAM_construct_octet_string(OSSL_KDF_PARAM_INFO, (void *)label, strlen(label)),
        OSSL_PARAM_construct_end(),
    };

    EVP_KDF *kdf = EVP_KDF_fetch(NULL, "HKDF", NULL);
    EVP_KDF_CTX *context = EVP_KDF_CTX_new(kdf);
    EVP_KDF_free(kdf);
    int derived = context ? EVP_KDF_derive(context, key, AEAD_KEY_BYTES, parameters) : 0;
    EVP_KDF_CTX_free(context);
    /* Lengths and names are right, so that there is no other reason to fail. */
    return derived == 1 ? 0 : -ENOMEM;
}

int aead_new(struct aead **out, const uint8_t key[AEAD_KEY_BYTES])
{
    struct aead *aead = calloc(1, sizeof(*aead));

    if (!aead)
        return -ENOMEM;
    aead->sealing = EVP_CIPHER_CTX_new();
    aead->opening = EVP_CIPHER_CTX_new();
    if (!aead->sealing || !aead->opening ||
        EVP_EncryptInit_ex(aead->sealing, EVP_aes_256_gcm(), NULL, key, NULL) != 1 ||
        EVP_DecryptInit_ex(aead->opening, EVP_aes_256_gcm(), NULL, key, NULL) != 1) {
        aead_free(aead);
        return -ENOMEM;
    }
    check(EVP_CIPHER_CTX_get_iv_length(aead->sealing) == AEAD_NONCE_BYTES);
    *out = aead;
    return 0;
}

void aead_free(struct aead *aead)
{
    if (!aead)
        return;
    EVP_CIPHER_CTX_free(aead->sealing); /* which overwrites the key */
    EVP_CIPHER_CTX_free(aead->opening);
    free(aead);
}

static void make_nonce(uint64_t number, uint8_t nonce[AEAD_NONCE_BYTES])
{
    memset(nonce, 0, AEAD_NONCE_BYTES);
    put_be64(nonce + AEAD_NONCE_BYTES - sizeof(number), number);
}

int aead_seal_with(struct aead *aead, const uint8_t nonce[AEAD_NONCE_BYTES],
                   const uint8_t *associated, size_t associated_bytes, uint8_t *bytes,
                   size_t n_bytes, uint8_t tag[AEAD_TAG_BYTES])
{
    int n;

    if (EVP_EncryptInit_ex(aead->sealing, NULL, NULL, NULL, nonce) != 1 ||
        EVP_EncryptUpdate(aead->sealing, NULL, &n, associated, (int)associated_bytes) != 1 ||
        EVP_EncryptUpdate(aead->sealing, bytes, &n, bytes, (int)n_bytes) != 1 ||
        EVP_EncryptFinal_ex(aead->sealing, bytes + n, &n) != 1 ||
        EVP_CIPHER_CTX_ctrl(aead->sealing, EVP_CTRL_AEAD_GET_TAG, AEAD_TAG_BYTES, tag) != 1)
        return -ENOMEM;
    return 0;
}

int aead_seal(struct aead *aead, uint64_t number, const uint8_t *associated,
              size_t associated_bytes, uint8_t *bytes, size_t n_bytes, uint8_t tag[AEAD_TAG_BYTES])
{
    uint8_t nonce[AEAD_NONCE_BYTES];

    make_nonce(number, nonce);
    return aead_seal_with(aead, nonce, associated, associated_bytes, bytes, n_bytes, tag);
}

int aead_open_with(struct aead *aead, const uint8_t nonce[AEAD_NONCE_BYTES],
                   const uint8_t *associated, size_t associated_bytes, uint8_t *bytes,
                   size_t n_bytes, const uint8_t tag[AEAD_TAG_BYTES])
{
    int n, r = 0;

    if (EVP_DecryptInit_ex(aead->opening, NULL, NULL, NULL, nonce) != 1 ||
        EVP_DecryptUpdate(aead->opening, NULL, &n, associated, (int)associated_bytes) != 1 ||
        EVP_DecryptUpdate(aead->opening, bytes, &n, bytes, (int)n_bytes) != 1 ||
        EVP_CIPHER_CTX_ctrl(aead->opening, EVP_CTRL_AEAD_SET_TAG, AEAD_TAG_BYTES, (void *)tag) != 1)
        r = -ENOMEM;
    else if (EVP_DecryptFinal_ex(aead->opening, bytes + n, &n) != 1)
        r = AEAD_FORGED;
    if (r != 0)
        explicit_bzero(bytes, n_bytes);
    return r;
}

int aead_open(struct aead *aead, uint64_t number, const uint8_t *associated,
              size_t associated_bytes, uint8_t *bytes, size_t n_bytes,
              const uint8_t tag[AEAD_TAG_BYTES])
{
    uint8_t nonce[AEAD_NONCE_BYTES];

    make_nonce(number, nonce);
    return aead_open_with(aead, nonce, associated, associated_bytes, bytes, n_bytes, tag);
}
