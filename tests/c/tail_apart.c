#include "tail_apart.h"

#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "lane.h"

enum { HEADER_BYTES = 72, NONCE_BYTES = 12, TAG_BYTES = 16, ASSOCIATED_BYTES = 72 + 16 + 16 };

static void make_nonce(const struct lane_keying *keying, const uint8_t associated[ASSOCIATED_BYTES],
                       const uint8_t *content, size_t content_bytes, uint8_t nonce[NONCE_BYTES])
{
    static const char label[] = "vtpmd tail nonce";
    uint8_t key[32], mac[32];
    size_t all_bytes = ASSOCIATED_BYTES + content_bytes;
    uint8_t *all = malloc(all_bytes);

    check(all);
    memcpy(all, associated, ASSOCIATED_BYTES);
    if (content_bytes > 0)
        memcpy(all + ASSOCIATED_BYTES, content, content_bytes);
    check(HMAC(EVP_sha256(), keying->key, 32, (const uint8_t *)label, strlen(label), key, NULL));
    check(HMAC(EVP_sha256(), key, sizeof(key), all, all_bytes, mac, NULL));
    memcpy(nonce, mac, NONCE_BYTES);
    free(all);
}

uint8_t *tail_seal_apart(const struct lane_keying *keying, const uint8_t header[60],
                         const uint8_t *content, size_t content_bytes)
{
    uint8_t associated[ASSOCIATED_BYTES] = {0}, *nonce = associated + 60;
    uint8_t *tail = malloc(HEADER_BYTES + content_bytes + TAG_BYTES);
    int n;

    check(tail);
    memcpy(associated, header, 60);
    memcpy(associated + 72, keying->uuid, 16);
    memcpy(associated + 88, keying->lineage, 16);
    make_nonce(keying, associated, content, content_bytes, nonce);
    memcpy(tail, associated, HEADER_BYTES);
    uint8_t *sealed = tail + HEADER_BYTES, *tag = sealed + content_bytes;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    check(EVP_EncryptInit_ex(context, EVP_aes_256_gcm(), NULL, keying->key, nonce) == 1);
    check(EVP_EncryptUpdate(context, NULL, &n, associated, ASSOCIATED_BYTES) == 1);
    check(EVP_EncryptUpdate(context, sealed, &n, content, (int)content_bytes) == 1);
    check(EVP_EncryptFinal_ex(context, tag, &n) == 1);
    check(EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, TAG_BYTES, tag) == 1);
    EVP_CIPHER_CTX_free(context);
    return tail;
}
