#include "digest.h"

#include <errno.h>
#include <openssl/evp.h>
#include <pthread.h>

#include "check.h"

static pthread_once_t is_looked_up = PTHREAD_ONCE_INIT;
static EVP_MD *sha256;

/* Once: each time takes longer than to hash a list of digests. */
static void look_up(void)
{
    sha256 = EVP_MD_fetch(NULL, "SHA256", NULL);
}

/* sandbox: futex */
int digest_compute(const uint8_t *bytes, size_t n_bytes, uint8_t digest[DIGEST_BYTES])
{
    unsigned int digest_bytes = 0;

    check(pthread_once(&is_looked_up, look_up) == 0);
    /* It has no other reason to fail than a lack of memory. */
    if (!sha256 || EVP_Digest(bytes, n_bytes, digest, &digest_bytes, sha256, NULL) != 1)
        return -ENOMEM;
    check(digest_bytes == DIGEST_BYTES);
    return 0;
}
