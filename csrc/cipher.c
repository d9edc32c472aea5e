#include "cipher.h"

#include <errno.h>
#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/rand.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

/* Pads as PKCS#7 does, but to a multiple of the key's length: swtpm takes that for the block's. */
static size_t padding_bytes(const struct cipher_key *key, size_t n_bytes)
{
    return key->n_bytes - n_bytes % key->n_bytes;
}

static const EVP_CIPHER *cipher_of(const struct cipher_key *key)
{
    return key->n_bytes == 16 ? EVP_aes_128_cbc() : EVP_aes_256_cbc();
}

static int encrypt(EVP_CIPHER_CTX *context, const struct cipher_key *key, const uint8_t *bytes,
                   size_t n_bytes, struct cipher_output *output)
{
    uint8_t padding[CIPHER_KEY_BYTES_MAX];
    size_t n_padding = padding_bytes(key, n_bytes);
    int first = 0, second = 0;

    memset(padding, (int)n_padding, sizeof(padding));
    if (EVP_EncryptInit_ex(context, cipher_of(key), NULL, key->bytes, output->iv) != 1 ||
        EVP_CIPHER_CTX_set_padding(context, 0) != 1 ||
        EVP_EncryptUpdate(context, output->ciphertext, &first, bytes, (int)n_bytes) != 1 ||
        EVP_EncryptUpdate(context, output->ciphertext + first, &second, padding, (int)n_padding) !=
            1)
        return -ENOMEM;
    check((size_t)first + (size_t)second == output->n_bytes);
    return 0;
}

static int authenticate(const struct cipher_key *key, struct cipher_output *output)
{
    unsigned int mac_bytes = 0;

    if (!HMAC(EVP_sha256(), key->bytes, (int)key->n_bytes, output->ciphertext,
              output->n_bytes + key->n_bytes, output->mac, &mac_bytes))
        return -ENOMEM;
    check(mac_bytes == sizeof(output->mac));
    return 0;
}

/* libcrypto's random numbers: from the kernel, and again in a process that was forked.
 * sandbox: getrandom getpid clock_gettime gettimeofday?=EFAULT time?=EFAULT futex */
int cipher_encrypt(const struct cipher_key *key, const uint8_t *bytes, size_t n_bytes,
                   struct cipher_output *output)
{
    check(key->n_bytes == 16 || key->n_bytes == 32);
    check(n_bytes <= INT32_MAX - CIPHER_KEY_BYTES_MAX);
    *output = (struct cipher_output){.n_bytes = n_bytes + padding_bytes(key, n_bytes)};
    output->ciphertext = malloc(output->n_bytes + key->n_bytes);
    if (!output->ciphertext)
        return -ENOMEM;
    output->iv = output->ciphertext + output->n_bytes;
    if (RAND_bytes(output->ciphertext + output->n_bytes, (int)key->n_bytes) != 1)
        return -EIO;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    if (!context)
        return -ENOMEM;
    int r = encrypt(context, key, bytes, n_bytes, output);
    EVP_CIPHER_CTX_free(context); /* overwrites the key's schedule and the last block */
    return r < 0 ? r : authenticate(key, output);
}

void cipher_output_deinit(struct cipher_output *output)
{
    free(output->ciphertext);
    output->ciphertext = NULL;
}

enum {
    AES_BLOCK_BYTES = 16,
};

/* Returns 0, CIPHER_DOES_NOT_OPEN or -ENOMEM. */
static int verify(const struct cipher_key *key, const struct cipher_input *input)
{
    uint8_t mac[DIGEST_BYTES];

    /* Without the lengths, what ends the ciphertext and what begins the IV could be moved about. */
    if (input->iv_bytes != AES_BLOCK_BYTES && input->iv_bytes != key->n_bytes)
        return CIPHER_DOES_NOT_OPEN;
    EVP_MAC *algorithm = EVP_MAC_fetch(NULL, "HMAC", NULL);
    EVP_MAC_CTX *context = algorithm ? EVP_MAC_CTX_new(algorithm) : NULL;
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_utf8_string("digest", "SHA256", 0),
        OSSL_PARAM_construct_end(),
    };
    bool made = context && EVP_MAC_init(context, key->bytes, key->n_bytes, parameters) == 1 &&
                EVP_MAC_update(context, input->ciphertext, input->n_bytes) == 1 &&
                EVP_MAC_update(context, input->iv, input->iv_bytes) == 1 &&
                EVP_MAC_final(context, mac, NULL, sizeof(mac)) == 1;
    EVP_MAC_CTX_free(context);
    EVP_MAC_free(algorithm);
    if (!made)
        return -ENOMEM;
    return CRYPTO_memcmp(mac, input->mac, sizeof(mac)) == 0 ? 0 : CIPHER_DOES_NOT_OPEN;
}

/* Padding under a right MAC tells nobody anything: its time need not be constant. */
static int remove_padding(const struct cipher_key *key, const uint8_t *bytes, size_t *n_bytes)
{
    uint8_t padding = bytes[*n_bytes - 1];

    if (padding == 0 || padding > key->n_bytes)
        return CIPHER_DOES_NOT_OPEN;
    for (size_t i = *n_bytes - padding; i < *n_bytes; i++)
        if (bytes[i] != padding)
            return CIPHER_DOES_NOT_OPEN;
    *n_bytes -= padding;
    return 0;
}

/* Without its padding. Returns 0, CIPHER_DOES_NOT_OPEN or -ENOMEM. */
static int decrypt(const struct cipher_key *key, const uint8_t *iv, const uint8_t *ciphertext,
                   size_t n_ciphertext, uint8_t *out, size_t *n_bytes)
{
    int n = 0;

    check(key->n_bytes == 16 || key->n_bytes == 32);
    check(n_ciphertext <= INT32_MAX);
    if (n_ciphertext == 0 || n_ciphertext % key->n_bytes != 0)
        return CIPHER_DOES_NOT_OPEN;
    EVP_CIPHER_CTX *context = EVP_CIPHER_CTX_new();
    bool made = context && EVP_DecryptInit_ex(context, cipher_of(key), NULL, key->bytes, iv) == 1 &&
                EVP_CIPHER_CTX_set_padding(context, 0) == 1 &&
                EVP_DecryptUpdate(context, out, &n, ciphertext, (int)n_ciphertext) == 1;
    EVP_CIPHER_CTX_free(context);
    if (!made)
        return -ENOMEM;
    check((size_t)n == n_ciphertext);
    *n_bytes = n_ciphertext;
    return remove_padding(key, out, n_bytes);
}

int cipher_decrypt(const struct cipher_key *key, const struct cipher_input *input, uint8_t *out,
                   size_t *n_bytes)
{
    int r = verify(key, input);

    return r != 0 ? r : decrypt(key, input->iv, input->ciphertext, input->n_bytes, out, n_bytes);
}

int cipher_decrypt_old(const struct cipher_key *key, const uint8_t *ciphertext, size_t n_ciphertext,
                       uint8_t *out, size_t *n_bytes)
{
    static const uint8_t no_iv[AES_BLOCK_BYTES];
    uint8_t digest[DIGEST_BYTES];

    int r = decrypt(key, no_iv, ciphertext, n_ciphertext, out, n_bytes);
    if (r != 0)
        return r;
    if (*n_bytes < DIGEST_BYTES)
        return CIPHER_DOES_NOT_OPEN;
    *n_bytes -= DIGEST_BYTES;
    r = digest_compute(out + DIGEST_BYTES, *n_bytes, digest);
    if (r != 0)
        return r;
    if (memcmp(out, digest, sizeof(digest)) != 0)
        return CIPHER_DOES_NOT_OPEN;
    memmove(out, out + DIGEST_BYTES, *n_bytes);
    return 0;
}
