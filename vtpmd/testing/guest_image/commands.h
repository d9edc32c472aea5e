/*
 * The TPM commands that the workload uses, one function each, laid out as in part 3 of the TCG
 * "Trusted Platform Module Library". All return 0, or -1 with a failure, unless they say otherwise.
 */
#pragma once

#include "tpm.h"

#define POINT_BYTES 64 /* a P-256 point, or an ECDSA signature: two numbers of 32 bytes */
#define BLOB_BYTES_MAX 512

/* What TPM2_Create gives and TPM2_Load takes: the private and the public part, marshalled. */
struct blob {
    size_t size;
    uint8_t data[BLOB_BYTES_MAX];
};

/* TPMS_TIME_INFO without `time`. */
struct clock {
    uint64_t clock_ms;
    uint32_t reset_count;
    uint32_t restart_count;
};

int get_random(size_t size);
int read_clock(struct clock *clock);
/* TPM2_Shutdown(STATE): what a kernel says before it sleeps. */
int shutdown_state(void);
/* How many failures the TPM counts towards its lockout. */
int read_lockout_counter(uint32_t *counter);

int pcr_read(uint32_t pcr, uint8_t digest[DIGEST_SIZE]);
int pcr_extend(uint32_t pcr, const uint8_t digest[DIGEST_SIZE]);
int pcr_reset(uint32_t pcr);

/* Define an index and, as its name depends on what was done with it, leave the name unset. */
int nv_define(const struct entity *index, size_t size, uint32_t attributes);
int nv_read_name(struct entity *index);
int nv_write(const struct entity *index, struct session *session, size_t offset, struct span data);
int nv_read(const struct entity *index, size_t offset, size_t size, uint8_t *data);
int nv_increment(const struct entity *index, struct session *session);

/* Primary keys under the owner; the new transient object goes into `key`, with its name. */
int create_primary_storage_key(struct entity *key);
int create_primary_signing_key(struct entity *key);
int create_primary_rsa_key(struct entity *key, unsigned int bits);
/* Make a transient object persistent, and forget the transient one: `key` has the new handle. */
int make_persistent(struct entity *key, uint32_t persistent);
/* Refuses a key whose point is not two full numbers. */
int read_public_point(const struct entity *key, uint8_t point[POINT_BYTES]);
int flush(uint32_t handle);

/* Wrap a secret under a parent: a sealed object with a policy, or an HMAC key without. */
int create_sealed(const struct entity *parent, struct span secret,
                  const uint8_t policy[DIGEST_SIZE], struct blob *blob);
int create_hmac_key(const struct entity *parent, struct span secret, struct blob *blob);
int load(const struct entity *parent, const struct blob *blob, struct entity *object);
/* Returns 0, the TPM's error code (positive) or -1. */
int try_unseal(const struct entity *object, struct session *policy, struct message *secret);
int hmac(const struct entity *key, struct span data, uint8_t digest[DIGEST_SIZE]);

int sign(const struct entity *key, struct session *session, const uint8_t digest[DIGEST_SIZE],
         uint8_t signature[POINT_BYTES]);
int verify_signature(const struct entity *key, const uint8_t digest[DIGEST_SIZE],
                     const uint8_t signature[POINT_BYTES]);

/* Bind a policy session to the present value of a PCR. */
int policy_pcr(const struct session *session, uint32_t pcr);
/* Calculate the digest of that policy for a PCR that has a given value. */
void policy_pcr_digest(uint32_t pcr, const uint8_t value[DIGEST_SIZE], uint8_t policy[DIGEST_SIZE]);
