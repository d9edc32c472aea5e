#include "tpm.h"

#include "device.h"
#include "failure.h"

#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
    HEADER_SIZE = 10,
    TAG_NO_SESSIONS = 0x8001,
    TAG_SESSIONS = 0x8002,
    ALG_SHA256 = 0x000b,
    ALG_NULL = 0x0010,
    SESSION_HMAC = 0x00,
    SESSION_POLICY = 0x01,
    ATTRIBUTE_CONTINUE_SESSION = 0x01,
    RC_RETRY = 0x922,        /* "not now": the command can be sent again as it is */
    RETRY_PAUSE_US = 20000,  /* Linux has sent it again several times, with longer pauses */
    RETRY_US_MAX = 15000000, /* a vTPM's hosts may have to find out which of them has it */
};

static struct latency latency;

struct latency tpm_take_latency(void)
{
    struct latency taken = latency;

    latency = (struct latency){0};
    return taken;
}

static uint64_t now_us(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Send a command to the device and take the response to it. */
static int transact(uint32_t code, const struct message *command, struct message *response)
{
    uint64_t start_us = now_us(), taken_us;

    if (command->broken)
        return failure("command %#x is larger than a TPM takes", code);
    if (device_transact(code, command, response) < 0)
        return -1;
    taken_us = now_us() - start_us;
    latency.commands++;
    latency.total_us += taken_us;
    if (taken_us > latency.max_us)
        latency.max_us = taken_us;
    return 0;
}

static struct span entity_name(const struct entity *entity, uint8_t handle[4])
{
    struct message bytes = {0};

    if (entity->name_size > 0)
        return (struct span){entity->name, entity->name_size};
    put_u32(&bytes, entity->handle);
    memcpy(handle, bytes.data, 4);
    return (struct span){handle, 4};
}

static struct span entity_auth(const struct entity *entity)
{
    return (struct span){entity->auth, entity->auth ? strlen(entity->auth) : 0};
}

/* The HMAC over a hash of the parameters and both nonces; part 1, section 19.6.5. */
static void session_hmac(const struct session *session, const struct entity *entity,
                         const uint8_t parameters_hash[DIGEST_SIZE],
                         const uint8_t nonce_newer[DIGEST_SIZE],
                         const uint8_t nonce_older[DIGEST_SIZE], uint8_t hmac[DIGEST_SIZE])
{
    const uint8_t attributes = ATTRIBUTE_CONTINUE_SESSION;
    struct message key = {0};
    struct span auth = entity_auth(entity);
    struct span spans[] = {{parameters_hash, DIGEST_SIZE},
                           {nonce_newer, DIGEST_SIZE},
                           {nonce_older, DIGEST_SIZE},
                           {&attributes, 1}};

    put_bytes(&key, session->key, session->key_size);
    if (entity->handle != session->bound_handle)
        put_bytes(&key, auth.data, auth.size);
    hmac_sha256((struct span){key.data, key.size}, spans, 4, hmac);
}

static void hash_command(const struct request *request, uint8_t hash[DIGEST_SIZE])
{
    struct message command = {0};
    uint8_t handle[4];

    put_u32(&command, request->code);
    for (size_t i = 0; i < request->handle_count; i++) {
        struct span name = entity_name(request->handles[i], handle);
        put_bytes(&command, name.data, name.size);
    }
    put_bytes(&command, request->parameters.data, request->parameters.size);
    sha256(&(struct span){command.data, command.size}, 1, hash);
}

/* Nonces must differ, not be secret: a hash of the TPM's last one does, and needs no generator. */
static void next_nonce(const struct session *session, uint8_t nonce[DIGEST_SIZE])
{
    struct span spans[] = {{"caller", 6}, {session->nonce_tpm, DIGEST_SIZE}};

    sha256(spans, 2, nonce);
}

static void put_authorization(struct message *command, const struct request *request,
                              const uint8_t nonce_caller[DIGEST_SIZE])
{
    const struct session *session = request->session;
    struct message area = {0};
    uint8_t hash[DIGEST_SIZE], hmac[DIGEST_SIZE];
    struct span auth = entity_auth(request->handles[0]);

    if (session == NULL) {
        put_u32(&area, TPM_HANDLE_PASSWORD);
        put_sized(&area, NULL, 0);
        put_u8(&area, 0);
        put_sized(&area, auth.data, auth.size);
    } else {
        hash_command(request, hash);
        session_hmac(session, request->handles[0], hash, nonce_caller, session->nonce_tpm, hmac);
        put_u32(&area, session->handle);
        put_sized(&area, nonce_caller, DIGEST_SIZE);
        put_u8(&area, ATTRIBUTE_CONTINUE_SESSION);
        put_sized(&area, hmac, session->key_size > 0 ? DIGEST_SIZE : 0);
    }
    put_u32(command, area.size);
    put_bytes(command, area.data, area.size);
}

static void put_header(struct message *command, const struct request *request, size_t size)
{
    put_u16(command, request->authorized ? TAG_SESSIONS : TAG_NO_SESSIONS);
    put_u32(command, size);
    put_u32(command, request->code);
}

static struct message marshal(const struct request *request,
                              const uint8_t nonce_caller[DIGEST_SIZE])
{
    struct message command = {0}, body = {.broken = request->parameters.broken};

    for (size_t i = 0; i < request->handle_count; i++)
        put_u32(&body, request->handles[i]->handle);
    if (request->authorized)
        put_authorization(&body, request, nonce_caller);
    put_bytes(&body, request->parameters.data, request->parameters.size);
    put_header(&command, request, HEADER_SIZE + body.size);
    put_bytes(&command, body.data, body.size);
    command.broken = command.broken || body.broken;
    return command;
}

/* Take the response's session area: keep the TPM's new nonce, and check its HMAC. */
static int take_authorization(const struct request *request, struct message *received,
                              struct span parameters, const uint8_t nonce_caller[DIGEST_SIZE])
{
    struct session *session = request->session;
    struct span nonce = take_sized(received), hmac;
    uint8_t hash[DIGEST_SIZE], expected[DIGEST_SIZE];
    struct message head = {0};

    take_u8(received); /* attributes: those that were sent */
    hmac = take_sized(received);
    if (received->broken || received->offset != received->size)
        return failure("command %#x: the response's session area is malformed", request->code);
    if (session == NULL)
        return 0;
    if (nonce.size != DIGEST_SIZE)
        return failure("command %#x: the TPM's nonce has %zu bytes", request->code, nonce.size);
    memcpy(session->nonce_tpm, nonce.data, DIGEST_SIZE);
    session->uses++;
    if (session->key_size == 0)
        return 0;
    put_u32(&head, 0); /* the response code */
    put_u32(&head, request->code);
    sha256((struct span[]){{head.data, head.size}, parameters}, 2, hash);
    session_hmac(session, request->handles[0], hash, session->nonce_tpm, nonce_caller, expected);
    if (hmac.size != DIGEST_SIZE || memcmp(hmac.data, expected, DIGEST_SIZE) != 0)
        return failure("command %#x: the HMAC of the response is wrong", request->code);
    return 0;
}

/* Pause before a command is sent again, as TSS2 does; return false when it was enough. */
static bool wait_to_retry(uint64_t began_us)
{
    usleep(RETRY_PAUSE_US);
    return now_us() - began_us < RETRY_US_MAX;
}

int tpm_try(struct request *request, struct response *response)
{
    uint8_t nonce_caller[DIGEST_SIZE] = {0};
    struct message command, received;
    struct span parameters;
    uint64_t began_us = now_us();
    uint32_t code, size;

    if (request->session != NULL)
        next_nonce(request->session, nonce_caller);
    command = marshal(request, nonce_caller);
    do {
        if (transact(request->code, &command, &received) < 0)
            return -1;
        take_u16(&received);
        size = take_u32(&received);
        code = take_u32(&received);
    } while (code == RC_RETRY && wait_to_retry(began_us));
    if (received.broken || size != received.size || code > INT32_MAX)
        return failure("command %#x: the response's header is malformed", request->code);
    if (code != 0)
        return (int)code;
    *response = (struct response){0};
    if (request->returns_handle)
        response->handle = take_u32(&received);
    size = request->authorized ? take_u32(&received) : received.size - received.offset;
    parameters = take_bytes(&received, size);
    put_bytes(&response->parameters, parameters.data, parameters.size);
    if (received.broken)
        return failure("command %#x: the response is short", request->code);
    return request->authorized ? take_authorization(request, &received, parameters, nonce_caller)
                               : 0;
}

int tpm_execute(struct request *request, struct response *response)
{
    int result = tpm_try(request, response);

    return result > 0 ? failure("command %#x: TPM_RC %#x", request->code, (unsigned int)result)
                      : result;
}

/* KDFa(SHA-256, authValue, "ATH", nonceTPM, nonceCaller, 256); part 1, section 19.6.8. */
static void bound_session_key(struct session *session, const struct entity *bind,
                              const uint8_t nonce_caller[DIGEST_SIZE])
{
    static const uint8_t counter[] = {0, 0, 0, 1}, bits[] = {0, 0, 1, 0};
    struct span spans[] = {{counter, sizeof(counter)},
                           {"ATH", 4}, /* the label's final zero counts */
                           {session->nonce_tpm, DIGEST_SIZE},
                           {nonce_caller, DIGEST_SIZE},
                           {bits, sizeof(bits)}};

    hmac_sha256(entity_auth(bind), spans, 5, session->key);
    session->key_size = DIGEST_SIZE;
    session->bound_handle = bind->handle;
}

int tpm_start_session(struct session *session, const struct entity *bind)
{
    const struct entity null = {.handle = TPM_HANDLE_NULL};
    struct request request = {.code = TPM_CC_START_AUTH_SESSION,
                              .handle_count = 2,
                              .handles = {&null, bind ? bind : &null},
                              .returns_handle = true};
    struct response response;
    uint8_t nonce_caller[DIGEST_SIZE];
    struct span nonce;

    *session = (struct session){0};
    next_nonce(session, nonce_caller);
    put_sized(&request.parameters, nonce_caller, DIGEST_SIZE);
    put_sized(&request.parameters, NULL, 0); /* not salted */
    put_u8(&request.parameters, bind ? SESSION_HMAC : SESSION_POLICY);
    put_u16(&request.parameters, ALG_NULL); /* no parameter encryption */
    put_u16(&request.parameters, ALG_SHA256);
    if (tpm_execute(&request, &response) < 0)
        return -1;
    nonce = take_sized(&response.parameters);
    if (nonce.size != DIGEST_SIZE)
        return failure("a new session's nonce has %zu bytes", nonce.size);
    session->handle = response.handle;
    memcpy(session->nonce_tpm, nonce.data, DIGEST_SIZE);
    if (bind != NULL)
        bound_session_key(session, bind, nonce_caller);
    return 0;
}
