#include "commands.h"

#include "failure.h"

#include <string.h>

enum {
    ALG_RSA = 0x0001,
    ALG_HMAC = 0x0005,
    ALG_AES = 0x0006,
    ALG_KEYEDHASH = 0x0008,
    ALG_SHA256 = 0x000b,
    ALG_NULL = 0x0010,
    ALG_RSASSA = 0x0014,
    ALG_ECDSA = 0x0018,
    ALG_ECC = 0x0023,
    ALG_CFB = 0x0043,
    CURVE_P256 = 0x0003,
    SHUTDOWN_STATE = 0x0001,
    CAPABILITY_PROPERTIES = 0x00000006,
    PROPERTY_LOCKOUT_COUNTER = 0x0000020e,
    TAG_HASHCHECK = 0x8024,
    PCR_SELECTION_BYTES = 3,
};

/* TPMA_OBJECT. No dictionary-attack protection: a workload must not lock its TPM. */
enum {
    OBJECT_FIXED = 0x2 | 0x10, /* to the TPM and to the parent */
    OBJECT_SENSITIVE_DATA_ORIGIN = 0x20,
    OBJECT_USER_WITH_AUTH = 0x40,
    OBJECT_NO_DICTIONARY_ATTACK = 0x400,
    OBJECT_RESTRICTED = 0x10000,
    OBJECT_DECRYPT = 0x20000,
    OBJECT_SIGN = 0x40000,
};

#define OBJECT_KEY                                                                                 \
    (OBJECT_FIXED | OBJECT_SENSITIVE_DATA_ORIGIN | OBJECT_USER_WITH_AUTH |                         \
     OBJECT_NO_DICTIONARY_ATTACK)

static const struct entity owner = {.handle = TPM_HANDLE_OWNER};

static int copy(struct message *from, struct span span, void *to, size_t size)
{
    if (from->broken || span.size != size)
        return failure("a field of %zu bytes has %zu", size, span.size);
    memcpy(to, span.data, size);
    return 0;
}

int get_random(size_t size)
{
    struct request request = {.code = TPM_CC_GET_RANDOM};
    struct response response;

    put_u16(&request.parameters, (uint16_t)size);
    if (tpm_execute(&request, &response) < 0)
        return -1;
    if (take_sized(&response.parameters).size != size)
        return failure("GetRandom gave too few bytes");
    return 0;
}

int read_clock(struct clock *clock)
{
    struct request request = {.code = TPM_CC_READ_CLOCK};
    struct response response;

    if (tpm_execute(&request, &response) < 0)
        return -1;
    take_u64(&response.parameters); /* the time since this TPM was started: another host's */
    clock->clock_ms = take_u64(&response.parameters);
    clock->reset_count = take_u32(&response.parameters);
    clock->restart_count = take_u32(&response.parameters);
    return response.parameters.broken ? failure("ReadClock gave too few bytes") : 0;
}

int shutdown_state(void)
{
    struct request request = {.code = TPM_CC_SHUTDOWN};
    struct response response;

    put_u16(&request.parameters, SHUTDOWN_STATE);
    return tpm_execute(&request, &response);
}

int read_lockout_counter(uint32_t *counter)
{
    struct request request = {.code = TPM_CC_GET_CAPABILITY};
    struct response response;
    struct message *parameters = &response.parameters;

    put_u32(&request.parameters, CAPABILITY_PROPERTIES);
    put_u32(&request.parameters, PROPERTY_LOCKOUT_COUNTER);
    put_u32(&request.parameters, 1);
    if (tpm_execute(&request, &response) < 0)
        return -1;
    take_bytes(parameters, 1 + 4 + 4); /* whether there is more, the capability, the count */
    if (take_u32(parameters) != PROPERTY_LOCKOUT_COUNTER)
        return failure("GetCapability gave another property");
    *counter = take_u32(parameters);
    return parameters->broken ? failure("GetCapability gave too few bytes") : 0;
}

static void put_pcr_selection(struct message *message, uint32_t pcr)
{
    put_u32(message, 1);
    put_u16(message, ALG_SHA256);
    put_u8(message, PCR_SELECTION_BYTES);
    for (uint32_t byte = 0; byte < PCR_SELECTION_BYTES; byte++)
        put_u8(message, pcr / 8 == byte ? (uint8_t)(1 << pcr % 8) : 0);
}

int pcr_read(uint32_t pcr, uint8_t digest[DIGEST_SIZE])
{
    struct request request = {.code = TPM_CC_PCR_READ};
    struct response response;
    struct message *parameters = &response.parameters;

    put_pcr_selection(&request.parameters, pcr);
    if (tpm_execute(&request, &response) < 0)
        return -1;
    take_u32(parameters); /* how often PCRs changed */
    take_bytes(parameters, request.parameters.size);
    take_u32(parameters); /* how many digests follow */
    return copy(parameters, take_sized(parameters), digest, DIGEST_SIZE);
}

int pcr_extend(uint32_t pcr, const uint8_t digest[DIGEST_SIZE])
{
    const struct entity entity = {.handle = pcr};
    struct request request = {
        .code = TPM_CC_PCR_EXTEND, .handle_count = 1, .handles = {&entity}, .authorized = true};
    struct response response;

    put_u32(&request.parameters, 1);
    put_u16(&request.parameters, ALG_SHA256);
    put_bytes(&request.parameters, digest, DIGEST_SIZE);
    return tpm_execute(&request, &response);
}

int pcr_reset(uint32_t pcr)
{
    const struct entity entity = {.handle = pcr};
    struct request request = {
        .code = TPM_CC_PCR_RESET, .handle_count = 1, .handles = {&entity}, .authorized = true};
    struct response response;

    return tpm_execute(&request, &response);
}

int nv_define(const struct entity *index, size_t size, uint32_t attributes)
{
    struct request request = {
        .code = TPM_CC_NV_DEFINE_SPACE, .handle_count = 1, .handles = {&owner}, .authorized = true};
    struct response response;
    struct message public = {0};

    put_u32(&public, index->handle);
    put_u16(&public, ALG_SHA256);
    put_u32(&public, attributes);
    put_sized(&public, NULL, 0); /* no policy */
    put_u16(&public, (uint16_t)size);
    put_sized(&request.parameters, index->auth, strlen(index->auth));
    put_sized(&request.parameters, public.data, public.size);
    return tpm_execute(&request, &response);
}

int nv_read_name(struct entity *index)
{
    struct request request = {.code = TPM_CC_NV_READ_PUBLIC, .handle_count = 1, .handles = {index}};
    struct response response;

    if (tpm_execute(&request, &response) < 0)
        return -1;
    take_sized(&response.parameters); /* the public area */
    index->name_size = NAME_BYTES_MAX;
    return copy(&response.parameters, take_sized(&response.parameters), index->name,
                NAME_BYTES_MAX);
}

int nv_write(const struct entity *index, struct session *session, size_t offset, struct span data)
{
    struct request request = {.code = TPM_CC_NV_WRITE,
                              .handle_count = 2,
                              .handles = {index, index},
                              .authorized = true,
                              .session = session};
    struct response response;

    put_sized(&request.parameters, data.data, data.size);
    put_u16(&request.parameters, (uint16_t)offset);
    return tpm_execute(&request, &response);
}

int nv_read(const struct entity *index, size_t offset, size_t size, uint8_t *data)
{
    struct request request = {
        .code = TPM_CC_NV_READ, .handle_count = 2, .handles = {index, index}, .authorized = true};
    struct response response;

    put_u16(&request.parameters, (uint16_t)size);
    put_u16(&request.parameters, (uint16_t)offset);
    if (tpm_execute(&request, &response) < 0)
        return -1;
    return copy(&response.parameters, take_sized(&response.parameters), data, size);
}

int nv_increment(const struct entity *index, struct session *session)
{
    struct request request = {.code = TPM_CC_NV_INCREMENT,
                              .handle_count = 2,
                              .handles = {index, index},
                              .authorized = true,
                              .session = session};
    struct response response;

    return tpm_execute(&request, &response);
}

static int create_primary(struct entity *key, const struct message *template)
{
    struct request request = {.code = TPM_CC_CREATE_PRIMARY,
                              .handle_count = 1,
                              .handles = {&owner},
                              .authorized = true,
                              .returns_handle = true};
    struct message sensitive = {0}, *parameters;
    struct response response;

    put_sized(&sensitive, key->auth, key->auth ? strlen(key->auth) : 0);
    put_sized(&sensitive, NULL, 0);
    put_sized(&request.parameters, sensitive.data, sensitive.size);
    put_sized(&request.parameters, template->data, template->size);
    put_sized(&request.parameters, NULL, 0); /* outside information */
    put_u32(&request.parameters, 0);         /* creation PCRs */
    if (tpm_execute(&request, &response) < 0)
        return -1;
    parameters = &response.parameters;
    key->handle = response.handle;
    take_sized(parameters); /* the public area */
    take_sized(parameters); /* creation data */
    take_sized(parameters); /* its hash */
    take_u16(parameters);   /* the creation ticket: tag, */
    take_u32(parameters);   /* hierarchy, */
    take_sized(parameters); /* digest */
    key->name_size = NAME_BYTES_MAX;
    return copy(parameters, take_sized(parameters), key->name, NAME_BYTES_MAX);
}

static void put_object_head(struct message *template, uint16_t type, uint32_t attributes)
{
    put_u16(template, type);
    put_u16(template, ALG_SHA256); /* of the name */
    put_u32(template, attributes);
}

int create_primary_storage_key(struct entity *key)
{
    struct message template = {0};

    put_object_head(&template, ALG_ECC, OBJECT_KEY | OBJECT_RESTRICTED | OBJECT_DECRYPT);
    put_sized(&template, NULL, 0); /* no policy */
    put_u16(&template, ALG_AES);
    put_u16(&template, 128);
    put_u16(&template, ALG_CFB);
    put_u16(&template, ALG_NULL); /* scheme */
    put_u16(&template, CURVE_P256);
    put_u16(&template, ALG_NULL);  /* key derivation */
    put_sized(&template, NULL, 0); /* x */
    put_sized(&template, NULL, 0); /* y */
    return create_primary(key, &template);
}

int create_primary_signing_key(struct entity *key)
{
    struct message template = {0};

    put_object_head(&template, ALG_ECC, OBJECT_KEY | OBJECT_SIGN);
    put_sized(&template, NULL, 0); /* no policy */
    put_u16(&template, ALG_NULL);  /* symmetric algorithm */
    put_u16(&template, ALG_ECDSA);
    put_u16(&template, ALG_SHA256);
    put_u16(&template, CURVE_P256);
    put_u16(&template, ALG_NULL);  /* key derivation */
    put_sized(&template, NULL, 0); /* x */
    put_sized(&template, NULL, 0); /* y */
    return create_primary(key, &template);
}

int create_primary_rsa_key(struct entity *key, unsigned int bits)
{
    struct message template = {0};
    /* A primary key is derived from its template: another one each time, for other primes. */
    static uint32_t distinction;
    uint8_t unique[sizeof(distinction)];

    distinction++;
    memcpy(unique, &distinction, sizeof(unique));
    put_object_head(&template, ALG_RSA, OBJECT_KEY | OBJECT_SIGN);
    put_sized(&template, NULL, 0); /* no policy */
    put_u16(&template, ALG_NULL);  /* symmetric algorithm */
    put_u16(&template, ALG_RSASSA);
    put_u16(&template, ALG_SHA256);
    put_u16(&template, (uint16_t)bits);
    put_u32(&template, 0); /* exponent: 65537 */
    put_sized(&template, unique, sizeof(unique));
    return create_primary(key, &template);
}

int make_persistent(struct entity *key, uint32_t persistent)
{
    struct request request = {.code = TPM_CC_EVICT_CONTROL,
                              .handle_count = 2,
                              .handles = {&owner, key},
                              .authorized = true};
    struct response response;
    uint32_t transient = key->handle;

    put_u32(&request.parameters, persistent);
    if (tpm_execute(&request, &response) < 0)
        return -1;
    key->handle = persistent;
    return flush(transient);
}

/* Two TPM2Bs into one array: the coordinates of a point, or the numbers of a signature. */
static int take_point(struct message *message, uint8_t point[POINT_BYTES])
{
    struct span number;

    memset(point, 0, POINT_BYTES);
    for (size_t half = 1; half <= 2; half++) {
        number = take_sized(message);
        if (message->broken || number.size > POINT_BYTES / 2)
            return failure("a point's number has %zu bytes", number.size);
        memcpy(point + half * POINT_BYTES / 2 - number.size, number.data, number.size);
    }
    return 0;
}

int read_public_point(const struct entity *key, uint8_t point[POINT_BYTES])
{
    struct request request = {.code = TPM_CC_READ_PUBLIC, .handle_count = 1, .handles = {key}};
    struct response response;
    struct message *parameters = &response.parameters;

    if (tpm_execute(&request, &response) < 0)
        return -1;
    take_u16(parameters);      /* the public area's size, */
    take_bytes(parameters, 8); /* type, name algorithm and attributes */
    take_sized(parameters);    /* policy */
    /* symmetric, scheme, its hash, curve, key derivation */
    take_bytes(parameters, 10);
    return take_point(parameters, point);
}

int flush(uint32_t handle)
{
    struct request request = {.code = TPM_CC_FLUSH_CONTEXT};
    struct response response;

    put_u32(&request.parameters, handle);
    return tpm_execute(&request, &response);
}

/* TPM2_Create of a keyed-hash object whose sensitive part is given. */
static int create_keyed_hash(const struct entity *parent, struct span secret,
                             const struct message *template, struct blob *blob)
{
    struct request request = {
        .code = TPM_CC_CREATE, .handle_count = 1, .handles = {parent}, .authorized = true};
    struct message sensitive = {0};
    struct response response;
    struct message *parameters = &response.parameters;

    put_sized(&sensitive, NULL, 0); /* authValue */
    put_sized(&sensitive, secret.data, secret.size);
    put_sized(&request.parameters, sensitive.data, sensitive.size);
    put_sized(&request.parameters, template->data, template->size);
    put_sized(&request.parameters, NULL, 0); /* outside information */
    put_u32(&request.parameters, 0);         /* creation PCRs */
    if (tpm_execute(&request, &response) < 0)
        return -1;
    take_sized(parameters); /* private */
    take_sized(parameters); /* public */
    blob->size = parameters->offset;
    if (parameters->broken || blob->size > sizeof(blob->data))
        return failure("Create gave a blob of %zu bytes", blob->size);
    memcpy(blob->data, parameters->data, blob->size);
    return 0;
}

int create_sealed(const struct entity *parent, struct span secret,
                  const uint8_t policy[DIGEST_SIZE], struct blob *blob)
{
    struct message template = {0};

    put_object_head(&template, ALG_KEYEDHASH, OBJECT_FIXED | OBJECT_NO_DICTIONARY_ATTACK);
    put_sized(&template, policy, DIGEST_SIZE);
    put_u16(&template, ALG_NULL);  /* scheme */
    put_sized(&template, NULL, 0); /* unique */
    return create_keyed_hash(parent, secret, &template, blob);
}

int create_hmac_key(const struct entity *parent, struct span secret, struct blob *blob)
{
    struct message template = {0};

    put_object_head(&template, ALG_KEYEDHASH,
                    OBJECT_FIXED | OBJECT_NO_DICTIONARY_ATTACK | OBJECT_USER_WITH_AUTH |
                        OBJECT_SIGN);
    put_sized(&template, NULL, 0); /* no policy */
    put_u16(&template, ALG_HMAC);
    put_u16(&template, ALG_SHA256);
    put_sized(&template, NULL, 0); /* unique */
    return create_keyed_hash(parent, secret, &template, blob);
}

int load(const struct entity *parent, const struct blob *blob, struct entity *object)
{
    struct request request = {.code = TPM_CC_LOAD,
                              .handle_count = 1,
                              .handles = {parent},
                              .authorized = true,
                              .returns_handle = true};
    struct response response;

    put_bytes(&request.parameters, blob->data, blob->size);
    if (tpm_execute(&request, &response) < 0)
        return -1;
    *object = (struct entity){.handle = response.handle, .name_size = NAME_BYTES_MAX};
    return copy(&response.parameters, take_sized(&response.parameters), object->name,
                NAME_BYTES_MAX);
}

int try_unseal(const struct entity *object, struct session *policy, struct message *secret)
{
    struct request request = {.code = TPM_CC_UNSEAL,
                              .handle_count = 1,
                              .handles = {object},
                              .authorized = true,
                              .session = policy};
    struct response response;
    struct span span;
    int result = tpm_try(&request, &response);

    if (result != 0)
        return result;
    span = take_sized(&response.parameters);
    *secret = (struct message){0};
    put_bytes(secret, span.data, span.size);
    return 0;
}

int hmac(const struct entity *key, struct span data, uint8_t digest[DIGEST_SIZE])
{
    struct request request = {
        .code = TPM_CC_HMAC, .handle_count = 1, .handles = {key}, .authorized = true};
    struct response response;

    put_sized(&request.parameters, data.data, data.size);
    put_u16(&request.parameters, ALG_NULL); /* the key's own hash */
    if (tpm_execute(&request, &response) < 0)
        return -1;
    return copy(&response.parameters, take_sized(&response.parameters), digest, DIGEST_SIZE);
}

int sign(const struct entity *key, struct session *session, const uint8_t digest[DIGEST_SIZE],
         uint8_t signature[POINT_BYTES])
{
    struct request request = {.code = TPM_CC_SIGN,
                              .handle_count = 1,
                              .handles = {key},
                              .authorized = true,
                              .session = session};
    struct response response;

    put_sized(&request.parameters, digest, DIGEST_SIZE);
    put_u16(&request.parameters, ALG_NULL); /* the key's own scheme */
    put_u16(&request.parameters, TAG_HASHCHECK);
    put_u32(&request.parameters, TPM_HANDLE_NULL);
    put_sized(&request.parameters, NULL, 0); /* no ticket */
    if (tpm_execute(&request, &response) < 0)
        return -1;
    take_u32(&response.parameters); /* signature algorithm and hash */
    return take_point(&response.parameters, signature);
}

int verify_signature(const struct entity *key, const uint8_t digest[DIGEST_SIZE],
                     const uint8_t signature[POINT_BYTES])
{
    struct request request = {.code = TPM_CC_VERIFY_SIGNATURE, .handle_count = 1, .handles = {key}};
    struct response response;

    put_sized(&request.parameters, digest, DIGEST_SIZE);
    put_u16(&request.parameters, ALG_ECDSA);
    put_u16(&request.parameters, ALG_SHA256);
    put_sized(&request.parameters, signature, POINT_BYTES / 2);
    put_sized(&request.parameters, signature + POINT_BYTES / 2, POINT_BYTES / 2);
    return tpm_execute(&request, &response);
}

int policy_pcr(const struct session *session, uint32_t pcr)
{
    const struct entity entity = {.handle = session->handle};
    struct request request = {.code = TPM_CC_POLICY_PCR, .handle_count = 1, .handles = {&entity}};
    struct response response;

    put_sized(&request.parameters, NULL, 0); /* the PCR's present value */
    put_pcr_selection(&request.parameters, pcr);
    return tpm_execute(&request, &response);
}

void policy_pcr_digest(uint32_t pcr, const uint8_t value[DIGEST_SIZE], uint8_t policy[DIGEST_SIZE])
{
    static const uint8_t none[DIGEST_SIZE];
    uint8_t values[DIGEST_SIZE];
    struct message step = {0};

    sha256(&(struct span){value, DIGEST_SIZE}, 1, values);
    put_bytes(&step, none, DIGEST_SIZE); /* the policy before this step */
    put_u32(&step, TPM_CC_POLICY_PCR);
    put_pcr_selection(&step, pcr);
    put_bytes(&step, values, DIGEST_SIZE);
    sha256(&(struct span){step.data, step.size}, 1, policy);
}
