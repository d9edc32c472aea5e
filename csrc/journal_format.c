#include "journal_format.h"

#include <errno.h>
#include <openssl/evp.h>
#include <string.h>

#include "aead.h"
#include "digest.h"

#define JOURNAL_KEY_LABEL "vtpmd journal 1"

_Static_assert((int)JOURNAL_SECRET_BYTES == (int)AEAD_KEY_BYTES,
               "the secret is as long as the key");

uint32_t journal_place(uint32_t sector, uint32_t n_sectors)
{
    uint32_t in_page = sector % JOURNAL_PAGE_SECTORS;
    bool crosses = in_page + n_sectors > JOURNAL_PAGE_SECTORS;

    if (crosses && n_sectors <= JOURNAL_PAGE_SECTORS)
        return sector + JOURNAL_PAGE_SECTORS - in_page;
    return sector;
}

uint32_t journal_sectors_of(uint32_t delta_bytes)
{
    return (JOURNAL_RECORD_HEADER_BYTES + delta_bytes + JOURNAL_PART_BYTES - 1) /
           JOURNAL_PART_BYTES;
}

int journal_key(const uint8_t secret[JOURNAL_SECRET_BYTES], const uint8_t *header,
                struct aead **aead)
{
    uint8_t key[AEAD_KEY_BYTES];

    int r = aead_derive(secret, JOURNAL_SECRET_BYTES, header + JOURNAL_AT_SALT, JOURNAL_SALT_BYTES,
                        JOURNAL_KEY_LABEL, key);
    if (r >= 0)
        r = aead_new(aead, key);
    explicit_bzero(key, sizeof(key));
    return r;
}

int journal_first_link(const uint8_t *header_sector, uint8_t link[JOURNAL_LINK_BYTES])
{
    return digest_compute(header_sector, JOURNAL_SECTOR_BYTES, link);
}

int journal_next_link(const uint8_t before[JOURNAL_LINK_BYTES], const uint8_t *content,
                      uint32_t delta_bytes, uint8_t link[JOURNAL_LINK_BYTES])
{
    EVP_MD_CTX *context = EVP_MD_CTX_new();

    bool made =
        context && EVP_DigestInit_ex(context, EVP_sha256(), NULL) == 1 &&
        EVP_DigestUpdate(context, before, JOURNAL_LINK_BYTES) == 1 &&
        EVP_DigestUpdate(context, content, JOURNAL_AT_LINK) == 1 &&
        EVP_DigestUpdate(context, content + JOURNAL_RECORD_HEADER_BYTES, delta_bytes) == 1 &&
        EVP_DigestFinal_ex(context, link, NULL) == 1;
    EVP_MD_CTX_free(context);
    return made ? 0 : -ENOMEM;
}
