#include "tail.h"

#include <errno.h>
#include <openssl/core_names.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>
#include <openssl/params.h>
#include <stdlib.h>
#include <string.h>

#include "aead.h"
#include "bytes.h"
#include "check.h"
#include "delta.h"
#include "digest.h"
#include "lane.h"
#include "link_types.h"
#include "pages.h"

enum {
    AT_VERSION = 8,
    AT_FLAGS = 10,
    AT_SESSION = 12,
    AT_PERMANENT_FROM = 28,
    AT_PERMANENT_TO = 36,
    AT_VOLATILE_FROM = 44,
    AT_VOLATILE_TO = 52,
    AT_NONCE = 60,
};

enum {
    WHOSE_BYTES = LANE_UUID_BYTES + LANE_LINEAGE_BYTES,
    LENGTH_BYTES = 4,
    CONTENT_BYTES_MIN = 1 + 2 * LENGTH_BYTES, /* power, and two records that are empty */
};

_Static_assert(AT_NONCE + AEAD_NONCE_BYTES == (int)TAIL_HEADER_BYTES &&
                   AT_SESSION + LANE_SESSION_BYTES == AT_PERMANENT_FROM,
               "as the document has it");

static const uint8_t magic[] = {'V', 'T', 'P', 'M', 'T', 'A', 'I', 'L'};
static const char nonce_label[] = "vtpmd tail nonce";

/* What is vouched for, beside what is sealed. */
struct associated {
    uint8_t header[TAIL_HEADER_BYTES];
    uint8_t whose[WHOSE_BYTES];
};

struct tail_cipher {
    struct aead *aead;
    EVP_MAC_CTX *mac; /* it has the key that nonces are made with */
    uint8_t session[LANE_SESSION_BYTES];
    uint8_t whose[WHOSE_BYTES];
};

bool tail_is(const uint8_t *bytes, size_t n_bytes)
{
    return n_bytes >= sizeof(magic) && memcmp(bytes, magic, sizeof(magic)) == 0;
}

static EVP_MAC_CTX *new_mac(const uint8_t session_key[LANE_KEY_BYTES])
{
    OSSL_PARAM parameters[] = {
        OSSL_PARAM_construct_utf8_string(OSSL_MAC_PARAM_DIGEST, (char *)"SHA256", 0),
        OSSL_PARAM_construct_end(),
    };
    uint8_t key[DIGEST_BYTES];

    EVP_MAC *mac = EVP_MAC_fetch(NULL, "HMAC", NULL);
    EVP_MAC_CTX *context = EVP_MAC_CTX_new(mac);
    EVP_MAC_free(mac);
    if (context && (!HMAC(EVP_sha256(), session_key, LANE_KEY_BYTES, (const uint8_t *)nonce_label,
                          strlen(nonce_label), key, NULL) ||
                    EVP_MAC_init(context, key, sizeof(key), parameters) != 1)) {
        EVP_MAC_CTX_free(context);
        context = NULL;
    }
    explicit_bzero(key, sizeof(key));
    return context;
}

int tail_cipher_new(struct tail_cipher **out, const struct lane_keying *keying)
{
    struct tail_cipher *cipher = calloc(1, sizeof(*cipher));

    if (!cipher)
        return -ENOMEM;
    memcpy(cipher->session, keying->session, LANE_SESSION_BYTES);
    memcpy(cipher->whose, keying->uuid, LANE_UUID_BYTES);
    memcpy(cipher->whose + LANE_UUID_BYTES, keying->lineage, LANE_LINEAGE_BYTES);
    int r = aead_new(&cipher->aead, keying->key);
    cipher->mac = r == 0 ? new_mac(keying->key) : NULL;
    if (!cipher->mac) {
        tail_cipher_free(cipher);
        return -ENOMEM;
    }
    *out = cipher;
    return 0;
}

void tail_cipher_free(struct tail_cipher *cipher)
{
    if (!cipher)
        return;
    aead_free(cipher->aead);
    EVP_MAC_CTX_free(cipher->mac); /* which overwrites the key */
    free(cipher);
}

/* Make the nonce, of a header that has none yet. Returns 0 or -ENOMEM. */
static int make_nonce(struct tail_cipher *cipher, struct associated *associated,
                      const uint8_t *content, size_t content_bytes)
{
    uint8_t mac[DIGEST_BYTES];
    size_t n;

    if (EVP_MAC_init(cipher->mac, NULL, 0, NULL) != 1 ||
        EVP_MAC_update(cipher->mac, (const uint8_t *)associated, sizeof(*associated)) != 1 ||
        EVP_MAC_update(cipher->mac, content, content_bytes) != 1 ||
        EVP_MAC_final(cipher->mac, mac, &n, sizeof(mac)) != 1)
        return -ENOMEM;
    memcpy(associated->header + AT_NONCE, mac, AEAD_NONCE_BYTES);
    return 0;
}

static uint8_t *put_record(uint8_t *at, const uint8_t *record, size_t n_bytes)
{
    put_be32(at, (uint32_t)n_bytes);
    if (n_bytes > 0)
        memcpy(at + LENGTH_BYTES, record, n_bytes);
    return at + LENGTH_BYTES + n_bytes;
}

static void put_header(const struct tail_cipher *cipher, const struct tail *tail,
                       struct associated *associated)
{
    uint8_t *header = associated->header;

    memset(associated, 0, sizeof(*associated));
    memcpy(header, magic, sizeof(magic));
    put_be16(header + AT_VERSION, TAIL_VERSION);
    memcpy(header + AT_SESSION, cipher->session, LANE_SESSION_BYTES);
    put_be64(header + AT_PERMANENT_FROM, tail->permanent_from);
    put_be64(header + AT_PERMANENT_TO, tail->permanent_to);
    put_be64(header + AT_VOLATILE_FROM, tail->volatile_from);
    put_be64(header + AT_VOLATILE_TO, tail->volatile_to);
    memcpy(associated->whose, cipher->whose, sizeof(associated->whose));
}

static size_t content_bytes_of(const struct tail *tail)
{
    return CONTENT_BYTES_MIN + tail->records.permanent_bytes + tail->records.following_bytes;
}

int tail_seal(struct tail_cipher *cipher, const struct tail *tail, uint8_t **out, size_t *n_bytes)
{
    size_t content_bytes = content_bytes_of(tail);
    size_t all_bytes = TAIL_HEADER_BYTES + content_bytes + AEAD_TAG_BYTES;
    struct associated associated;

    if (all_bytes > TAIL_BYTES_MAX)
        return -EMSGSIZE;
    uint8_t *bytes = malloc(all_bytes);
    if (!bytes)
        return -ENOMEM;
    uint8_t *content = bytes + TAIL_HEADER_BYTES;
    *content = tail->power;
    uint8_t *at = put_record(content + 1, tail->records.permanent, tail->records.permanent_bytes);
    at = put_record(at, tail->records.following, tail->records.following_bytes);
    check(at == content + content_bytes);
    put_header(cipher, tail, &associated);
    int r = make_nonce(cipher, &associated, content, content_bytes);
    if (r == 0)
        r = aead_seal_with(cipher->aead, associated.header + AT_NONCE, (uint8_t *)&associated,
                           sizeof(associated), content, content_bytes, at);
    if (r < 0) {
        explicit_bzero(bytes, all_bytes); /* nothing goes out in the clear */
        free(bytes);
        return r;
    }
    memcpy(bytes, associated.header, TAIL_HEADER_BYTES);
    *out = bytes;
    *n_bytes = all_bytes;
    return 0;
}

static int check_header(const struct tail_cipher *cipher, const uint8_t *bytes, size_t n_bytes)
{
    if (n_bytes < TAIL_HEADER_BYTES + CONTENT_BYTES_MIN + AEAD_TAG_BYTES ||
        n_bytes > TAIL_BYTES_MAX)
        return LINK_TAIL_CUT;
    if (!tail_is(bytes, n_bytes) || get_be16(bytes + AT_VERSION) != TAIL_VERSION ||
        get_be16(bytes + AT_FLAGS) != 0)
        return LINK_TAIL_FORMAT;
    bool is_of_session = memcmp(bytes + AT_SESSION, cipher->session, LANE_SESSION_BYTES) == 0;
    return is_of_session ? 0 : LINK_TAIL_OTHER_SESSION;
}

/* Returns what follows on a record, or NULL: the content ends before that. */
static const uint8_t *get_record(const uint8_t *at, const uint8_t *end, const uint8_t **record,
                                 size_t *record_bytes)
{
    if (!at || end - at < LENGTH_BYTES)
        return NULL;
    *record_bytes = get_be32(at);
    *record = at + LENGTH_BYTES;
    return *record_bytes <= (size_t)(end - *record) ? *record + *record_bytes : NULL;
}

static int decode(const uint8_t *header, struct tail *tail)
{
    struct staged_records *records = &tail->records;
    const uint8_t *end = tail->content + tail->content_bytes;

    tail->permanent_from = get_be64(header + AT_PERMANENT_FROM);
    tail->permanent_to = get_be64(header + AT_PERMANENT_TO);
    tail->volatile_from = get_be64(header + AT_VOLATILE_FROM);
    tail->volatile_to = get_be64(header + AT_VOLATILE_TO);
    tail->power = *tail->content;
    const uint8_t *at =
        get_record(tail->content + 1, end, &records->permanent, &records->permanent_bytes);
    at = get_record(at, end, &records->following, &records->following_bytes);
    bool may_be = tail->power <= LINK_SHUTDOWN_STATE &&
                  tail->permanent_to <= GENERATION_GIVEN_MAX &&
                  tail->volatile_to <= GENERATION_GIVEN_MAX;
    return at == end && may_be ? 0 : LINK_TAIL_IMPOSSIBLE;
}

static int decrypt(struct tail_cipher *cipher, const uint8_t *bytes, struct tail *tail)
{
    const uint8_t *sealed = bytes + TAIL_HEADER_BYTES;
    struct associated associated;

    tail->content = malloc(tail->content_bytes);
    if (!tail->content)
        return -ENOMEM;
    memcpy(tail->content, sealed, tail->content_bytes);
    memcpy(associated.header, bytes, TAIL_HEADER_BYTES);
    memcpy(associated.whose, cipher->whose, WHOSE_BYTES);
    int r =
        aead_open_with(cipher->aead, bytes + AT_NONCE, (uint8_t *)&associated, sizeof(associated),
                       tail->content, tail->content_bytes, sealed + tail->content_bytes);
    return r == AEAD_FORGED ? LINK_TAIL_FORGED : r;
}

int tail_open(struct tail_cipher *cipher, const uint8_t *bytes, size_t n_bytes, struct tail *tail)
{
    *tail = (struct tail){0};
    int r = check_header(cipher, bytes, n_bytes);
    if (r != 0)
        return r;
    tail->content_bytes = n_bytes - TAIL_HEADER_BYTES - AEAD_TAG_BYTES;
    r = decrypt(cipher, bytes, tail);
    if (r == 0)
        r = decode(bytes, tail);
    if (r != 0)
        tail_deinit(tail);
    return r;
}

void tail_deinit(struct tail *tail)
{
    if (tail->content)
        explicit_bzero(tail->content, tail->content_bytes);
    free(tail->content);
    *tail = (struct tail){0};
}

static bool leads(const uint8_t *record, size_t record_bytes, uint64_t from, uint64_t to)
{
    struct delta_header header;

    if (record_bytes == 0)
        return from == to;
    return delta_inspect(record, record_bytes, &header) == 0 && header.from_generation == from &&
           header.to_generation == to;
}

bool tail_is_consistent(const struct tail *tail)
{
    const struct staged_records *records = &tail->records;

    return leads(records->permanent, records->permanent_bytes, tail->permanent_from,
                 tail->permanent_to) &&
           leads(records->following, records->following_bytes, tail->volatile_from,
                 tail->volatile_to);
}
