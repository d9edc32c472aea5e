/*
 * Execute TPM 2.0 commands on the device, with password, HMAC or policy authorisation.
 *
 * The raw device, not the resource manager's: transient objects and sessions stay in the TPM, so
 * that a migration has to carry them. TCG "Trusted Platform Module Library" part 1 section 19 says
 * how sessions are computed, part 3 how commands are laid out.
 */
#pragma once

#include "message.h"

#define NAME_BYTES_MAX (2 + DIGEST_SIZE)

enum {
    TPM_HANDLE_OWNER = 0x40000001,
    TPM_HANDLE_NULL = 0x40000007,
    TPM_HANDLE_PASSWORD = 0x40000009,
};

enum {
    TPM_CC_EVICT_CONTROL = 0x120,
    TPM_CC_NV_DEFINE_SPACE = 0x12a,
    TPM_CC_CREATE_PRIMARY = 0x131,
    TPM_CC_NV_INCREMENT = 0x134,
    TPM_CC_NV_WRITE = 0x137,
    TPM_CC_PCR_RESET = 0x13d,
    TPM_CC_SHUTDOWN = 0x145,
    TPM_CC_NV_READ = 0x14e,
    TPM_CC_CREATE = 0x153,
    TPM_CC_HMAC = 0x155,
    TPM_CC_LOAD = 0x157,
    TPM_CC_SIGN = 0x15d,
    TPM_CC_UNSEAL = 0x15e,
    TPM_CC_FLUSH_CONTEXT = 0x165,
    TPM_CC_NV_READ_PUBLIC = 0x169,
    TPM_CC_READ_PUBLIC = 0x173,
    TPM_CC_START_AUTH_SESSION = 0x176,
    TPM_CC_VERIFY_SIGNATURE = 0x177,
    TPM_CC_GET_CAPABILITY = 0x17a,
    TPM_CC_GET_RANDOM = 0x17b,
    TPM_CC_PCR_READ = 0x17e,
    TPM_CC_POLICY_PCR = 0x17f,
    TPM_CC_READ_CLOCK = 0x181,
    TPM_CC_PCR_EXTEND = 0x182,
};

/* Something with a handle. Authorisations hash its name; its authValue is part of the HMAC's key.
 */
struct entity {
    uint32_t handle;
    const char *auth; /* NULL: the empty authValue */
    size_t name_size; /* 0: the handle is the name */
    uint8_t name[NAME_BYTES_MAX];
};

/* A session in the TPM; with `key_size` 0 it is a policy session that needs no HMAC. */
struct session {
    uint32_t handle;
    uint32_t bound_handle; /* what it was bound to: that entity's authValue is already in the key */
    size_t key_size;
    uint8_t key[DIGEST_SIZE];
    uint8_t nonce_tpm[DIGEST_SIZE];
    uint64_t uses;
};

/* A command under construction. */
struct request {
    uint32_t code;
    size_t handle_count;
    const struct entity *handles[2];
    bool authorized;         /* the first handle needs an authorisation */
    struct session *session; /* that gives it; NULL: by password */
    bool returns_handle;
    struct message parameters;
};

/* A response without errors: its handle, if it has one, and its parameters, ready to be taken. */
struct response {
    uint32_t handle;
    struct message parameters;
};

/* How long the commands took, as the guest saw it. */
struct latency {
    uint64_t commands;
    uint64_t total_us;
    uint64_t max_us;
};

/*
 * Execute a request. Returns 0 on success, the TPM's error code (positive) when it answered with
 * one, -1 with a failure when the device or the response is broken, or its HMAC is wrong.
 */
int tpm_try(struct request *request, struct response *response);

/* The same, but an error of the TPM is a failure, too: returns 0 or -1. */
int tpm_execute(struct request *request, struct response *response);

/* Start a session: HMAC when `bind` is given, policy when it is NULL. Returns 0 or -1. */
int tpm_start_session(struct session *session, const struct entity *bind);

/* What the commands since the last call took. */
struct latency tpm_take_latency(void);
