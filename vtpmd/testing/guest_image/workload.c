#include "workload.h"

#include "commands.h"
#include "failure.h"
#include "tpm12.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum {
    PCR_SEAL = 16,            /* fixed after set-up; the sealed object's policy demands its value */
    PCR_CHAIN = 23,           /* extended by the load */
    STORAGE_KEY = 0x81000000, /* not 0x8101xxxx: endorsement keys are there */
    SIGNING_KEY = 0x81000001,
    NV_ORDINARY = 0x01500001,
    NV_COUNTER = 0x01500002,
    NV_SIZE = 512,
    NV_WRITE_SIZE = 32,
    COUNTER_SIZE = 8,
};

/* TPMA_NV: read and written with the index's authValue, outside dictionary-attack protection. */
enum {
    NV_ATTRIBUTES = 0x4 | 0x40000 | 0x2000000,
    NV_ATTRIBUTE_COUNTER = 0x10,
};

static const char secret[] = "known to the sealed object and to this program";
static const char hmac_secret[] = "the transient object's key";
static const char pcr_event[] = "what the sealed object's PCR was extended with";

static struct entity storage_key = {.auth = NULL};
static struct entity signing_key = {.auth = "auth of the signing key"};
static struct entity nv_ordinary = {.handle = NV_ORDINARY, .auth = "auth of the index"};
static struct entity nv_counter = {.handle = NV_COUNTER, .auth = "auth of the counter"};
static struct entity hmac_key; /* the transient object */
static struct session session; /* bound to the signing key, open from set-up to the end */
static struct blob sealed;

/* What the TPM must hold, as the guest calculates it. */
static struct {
    uint8_t seal[DIGEST_SIZE];
    uint8_t chain[DIGEST_SIZE];
    uint64_t extends;
    uint8_t nv[NV_SIZE];
    uint64_t counter;
    struct clock clock;
    uint64_t operations;
} model;

static void fact_bytes(const char *name, const void *data, size_t size)
{
    const uint8_t *bytes = data;

    printf("fact %s ", name);
    for (size_t i = 0; i < size; i++)
        printf("%02x", bytes[i]);
    putchar('\n');
}

static void fact_number(const char *name, uint64_t value)
{
    printf("fact %s %" PRIu64 "\n", name, value);
}

static void hash_text(const char *text, uint8_t digest[DIGEST_SIZE])
{
    sha256(&(struct span){text, strlen(text)}, 1, digest);
}

static void model_extend(uint8_t pcr[DIGEST_SIZE], const uint8_t digest[DIGEST_SIZE])
{
    struct span spans[] = {{pcr, DIGEST_SIZE}, {digest, DIGEST_SIZE}};

    sha256(spans, 2, pcr);
}

static int setup_pcrs(void)
{
    uint8_t digest[DIGEST_SIZE];

    hash_text(pcr_event, digest);
    if (pcr_reset(PCR_SEAL) < 0 || pcr_reset(PCR_CHAIN) < 0 || pcr_extend(PCR_SEAL, digest) < 0)
        return -1;
    model_extend(model.seal, digest);
    return 0;
}

static int setup_keys(void)
{
    uint8_t policy[DIGEST_SIZE];
    struct blob blob;

    if (create_primary_storage_key(&storage_key) < 0 ||
        make_persistent(&storage_key, STORAGE_KEY) < 0 ||
        create_primary_signing_key(&signing_key) < 0 ||
        make_persistent(&signing_key, SIGNING_KEY) < 0)
        return -1;
    policy_pcr_digest(PCR_SEAL, model.seal, policy);
    if (create_sealed(&storage_key, (struct span){secret, strlen(secret)}, policy, &sealed) < 0)
        return -1;
    if (create_hmac_key(&storage_key, (struct span){hmac_secret, strlen(hmac_secret)}, &blob) < 0)
        return -1;
    return load(&storage_key, &blob, &hmac_key);
}

static int read_counter(uint64_t *value)
{
    uint8_t bytes[COUNTER_SIZE];

    if (nv_read(&nv_counter, 0, sizeof(bytes), bytes) < 0)
        return -1;
    *value = 0;
    for (size_t i = 0; i < sizeof(bytes); i++)
        *value = *value << 8 | bytes[i];
    return 0;
}

/* An index's name changes with its first write: it is read after that. */
static int setup_nv(void)
{
    for (size_t i = 0; i < NV_SIZE; i++)
        model.nv[i] = (uint8_t)i;
    if (nv_define(&nv_ordinary, NV_SIZE, NV_ATTRIBUTES) < 0 ||
        nv_write(&nv_ordinary, NULL, 0, (struct span){model.nv, NV_SIZE}) < 0 ||
        nv_read_name(&nv_ordinary) < 0)
        return -1;
    if (nv_define(&nv_counter, COUNTER_SIZE, NV_ATTRIBUTES | NV_ATTRIBUTE_COUNTER) < 0 ||
        nv_increment(&nv_counter, NULL) < 0 || nv_read_name(&nv_counter) < 0)
        return -1;
    return read_counter(&model.counter);
}

int workload_setup(void)
{
    if (setup_pcrs() < 0 || setup_keys() < 0 || setup_nv() < 0)
        return -1;
    if (tpm_start_session(&session, &signing_key) < 0)
        return -1;
    return read_clock(&model.clock);
}

static int check_pcr(uint32_t pcr, const uint8_t expected[DIGEST_SIZE], const char *fact)
{
    uint8_t digest[DIGEST_SIZE];

    if (pcr_read(pcr, digest) < 0)
        return -1;
    if (memcmp(digest, expected, DIGEST_SIZE) != 0)
        return failure("PCR %u differs from the model after %" PRIu64 " extends", pcr,
                       model.extends);
    fact_bytes(fact, digest, DIGEST_SIZE);
    return 0;
}

static int step_extend(void)
{
    uint8_t digest[DIGEST_SIZE], read[DIGEST_SIZE];

    model.extends++;
    sha256(&(struct span){&model.extends, sizeof(model.extends)}, 1, digest);
    model_extend(model.chain, digest);
    if (pcr_extend(PCR_CHAIN, digest) < 0 || pcr_read(PCR_CHAIN, read) < 0)
        return -1;
    if (memcmp(read, model.chain, DIGEST_SIZE) != 0)
        return failure("the PCR chain broke at extend %" PRIu64, model.extends);
    return 0;
}

static int step_nv_write(void)
{
    size_t offset = (model.operations * NV_WRITE_SIZE) % NV_SIZE;
    uint8_t *window = model.nv + offset, read[NV_WRITE_SIZE];

    sha256(&(struct span){&model.operations, sizeof(model.operations)}, 1, window);
    if (nv_write(&nv_ordinary, &session, offset, (struct span){window, NV_WRITE_SIZE}) < 0 ||
        nv_read(&nv_ordinary, offset, NV_WRITE_SIZE, read) < 0)
        return -1;
    if (memcmp(read, window, NV_WRITE_SIZE) != 0)
        return failure("NV at offset %zu differs from what was just written", offset);
    return 0;
}

static int check_counter(void)
{
    uint64_t value;

    if (read_counter(&value) < 0)
        return -1;
    if (value != model.counter)
        return failure("the counter is %" PRIu64 ", the model's %" PRIu64, value, model.counter);
    return 0;
}

static int step_increment(void)
{
    model.counter++;
    if (nv_increment(&nv_counter, &session) < 0)
        return -1;
    return check_counter();
}

static int step_sign(void)
{
    uint8_t digest[DIGEST_SIZE], signature[POINT_BYTES];

    sha256(&(struct span){&model.operations, sizeof(model.operations)}, 1, digest);
    if (sign(&signing_key, &session, digest, signature) < 0)
        return -1;
    return verify_signature(&signing_key, digest, signature);
}

/* The transient object's HMAC must be what this program calculates with the same key. */
static int check_transient_object(void)
{
    struct span key = {hmac_secret, strlen(hmac_secret)};
    struct span data = {&model.operations, sizeof(model.operations)};
    uint8_t expected[DIGEST_SIZE], digest[DIGEST_SIZE];

    hmac_sha256(key, &data, 1, expected);
    if (hmac(&hmac_key, data, digest) < 0)
        return -1;
    if (memcmp(digest, expected, DIGEST_SIZE) != 0)
        return failure("the transient object's HMAC is wrong");
    return 0;
}

static int step_rsa(unsigned int bits)
{
    struct entity key = {.auth = NULL};

    if (create_primary_rsa_key(&key, bits) < 0)
        return -1;
    return flush(key.handle);
}

static int step_random(void)
{
    return get_random(DIGEST_SIZE);
}

int workload_step(enum load_kind kind)
{
    static int (*const mixed[])(void) = {step_extend, step_nv_write, step_increment,
                                         step_random, step_sign,     check_transient_object};

    model.operations++;
    if (kind == LOAD_RSA_2048)
        return step_rsa(2048);
    if (kind == LOAD_RSA_3072)
        return step_rsa(3072);
    if (kind == LOAD_TPM_1_2)
        return tpm12_step();
    return mixed[model.operations % (sizeof(mixed) / sizeof(mixed[0]))]();
}

static int check_nv(void)
{
    uint8_t read[NV_SIZE], digest[DIGEST_SIZE];

    if (nv_read(&nv_ordinary, 0, NV_SIZE, read) < 0)
        return -1;
    if (memcmp(read, model.nv, NV_SIZE) != 0)
        return failure("NV contents differ from the model");
    sha256(&(struct span){read, NV_SIZE}, 1, digest);
    fact_bytes("nv", digest, DIGEST_SIZE);
    if (check_counter() < 0)
        return -1;
    fact_number("counter", model.counter);
    return 0;
}

/* Unseal with a fresh policy session; returns 0, the TPM's error code (positive) or -1. */
static int unseal(struct message *unsealed)
{
    struct entity object;
    struct session policy;
    int result;

    if (load(&storage_key, &sealed, &object) < 0 || tpm_start_session(&policy, NULL) < 0 ||
        policy_pcr(&policy, PCR_SEAL) < 0)
        return -1;
    result = try_unseal(&object, &policy, unsealed);
    if (result < 0 || flush(policy.handle) < 0 || flush(object.handle) < 0)
        return -1;
    return result;
}

static int check_unseals(void)
{
    struct message unsealed;
    int result = unseal(&unsealed);

    if (result != 0)
        return failure("the sealed object does not unseal: TPM_RC %#x", (unsigned int)result);
    if (unsealed.size != strlen(secret) || memcmp(unsealed.data, secret, unsealed.size) != 0)
        return failure("the sealed object unseals to something else");
    return 0;
}

/* PCR 16 can be reset, so that a wrong value can be tried, and the right one restored. */
static int check_policy_refuses(void)
{
    uint8_t digest[DIGEST_SIZE];
    struct message unsealed;
    int result;

    hash_text(pcr_event, digest);
    if (pcr_extend(PCR_SEAL, digest) < 0)
        return -1;
    result = unseal(&unsealed);
    if (result == 0)
        return failure("the sealed object unseals with a wrong PCR value");
    if (result < 0 || pcr_reset(PCR_SEAL) < 0)
        return -1;
    return pcr_extend(PCR_SEAL, digest);
}

static int check_sealed_object(void)
{
    if (check_unseals() < 0 || check_policy_refuses() < 0 || check_unseals() < 0)
        return -1;
    printf("fact sealed_object unseals-by-policy\n");
    return 0;
}

static int check_signing_key(struct span nonce)
{
    uint8_t digest[DIGEST_SIZE], signature[POINT_BYTES], point[POINT_BYTES];

    sha256(&nonce, 1, digest);
    if (read_public_point(&signing_key, point) < 0 ||
        sign(&signing_key, &session, digest, signature) < 0 ||
        verify_signature(&signing_key, digest, signature) < 0)
        return -1;
    fact_bytes("signing_key", point, sizeof(point));
    fact_bytes("signature", signature, sizeof(signature));
    return 0;
}

static int check_clock(void)
{
    struct clock clock;

    if (read_clock(&clock) < 0)
        return -1;
    if (clock.reset_count != model.clock.reset_count ||
        clock.restart_count != model.clock.restart_count)
        return failure("the TPM was restarted: %u resets and %u restarts, before %u and %u",
                       clock.reset_count, clock.restart_count, model.clock.reset_count,
                       model.clock.restart_count);
    if (clock.clock_ms < model.clock.clock_ms)
        return failure("the TPM's clock went back by %" PRIu64 " ms",
                       model.clock.clock_ms - clock.clock_ms);
    model.clock = clock;
    fact_number("reset_count", clock.reset_count);
    fact_number("restart_count", clock.restart_count);
    fact_number("clock_ms", clock.clock_ms);
    return 0;
}

int workload_check(struct span nonce)
{
    if (check_pcr(PCR_SEAL, model.seal, "pcr_seal") < 0 ||
        check_pcr(PCR_CHAIN, model.chain, "pcr_chain") < 0 || check_nv() < 0 ||
        check_sealed_object() < 0 || check_signing_key(nonce) < 0 || check_transient_object() < 0 ||
        check_clock() < 0)
        return -1;
    fact_number("extends", model.extends);
    printf("fact transient_object %#x\n", hmac_key.handle);
    printf("fact session %#x\n", session.handle);
    fact_number("session_uses", session.uses);
    return 0;
}

int workload_read(void)
{
    uint8_t seal[DIGEST_SIZE], chain[DIGEST_SIZE], nv[NV_SIZE], digest[DIGEST_SIZE];
    uint8_t point[POINT_BYTES];
    const struct entity key = {.handle = SIGNING_KEY};
    struct clock clock;
    uint64_t counter;

    if (pcr_read(PCR_SEAL, seal) < 0 || pcr_read(PCR_CHAIN, chain) < 0 ||
        nv_read(&nv_ordinary, 0, NV_SIZE, nv) < 0 || read_counter(&counter) < 0 ||
        read_public_point(&key, point) < 0 || read_clock(&clock) < 0)
        return -1;
    sha256(&(struct span){nv, NV_SIZE}, 1, digest);
    fact_bytes("pcr_seal", seal, DIGEST_SIZE);
    fact_bytes("pcr_chain", chain, DIGEST_SIZE);
    fact_bytes("nv", digest, DIGEST_SIZE);
    fact_number("counter", counter);
    fact_bytes("signing_key", point, sizeof(point));
    fact_number("reset_count", clock.reset_count);
    fact_number("restart_count", clock.restart_count);
    fact_number("clock_ms", clock.clock_ms);
    return 0;
}

void workload_report(uint64_t operations)
{
    struct latency latency = tpm_take_latency();

    fact_number("operations", operations);
    fact_number("commands", latency.commands);
    fact_number("latency_mean_us", latency.commands ? latency.total_us / latency.commands : 0);
    fact_number("latency_max_us", latency.max_us);
}
