#include "guest.h"

#include <libtpms/tpm_error.h>
#include <stdlib.h>
#include <string.h>

#include "bytes.h"
#include "check.h"
#include "pages.h"
#include "staged.h"
#include "tpm.h"
#include "tpm_in_memory.h"
#include "version.h"

enum { COMMAND_BYTES_MAX = 128 }; /* of those here */

/* Return the response's code. */
static uint32_t execute(const uint8_t *bytes, size_t n_bytes)
{
    uint8_t command[COMMAND_BYTES_MAX];
    struct tpm_response response;

    check(n_bytes <= sizeof(command));
    memcpy(command, bytes, n_bytes);
    tpm_response_init(&response);
    tpm_execute(tpm, command, n_bytes, &response);
    uint32_t code = get_be32(response.bytes + TPM_AT_CODE);
    tpm_response_deinit(&response);
    return code;
}

static void do_it(const uint8_t *bytes, size_t n_bytes)
{
    check(execute(bytes, n_bytes) == 0);
}

/* A TPM 1.2's guest, in TPM_ORD of its specification's part 2, section 17. */

static void starts_up_12(void)
{
    static const uint8_t startup[] = {0, 0xc1, 0, 0, 0, 12, 0, 0, 0, 0x99, 0, 1},
                         enable[] = {0, 0xc1, 0, 0, 0, 12, 0x40, 0, 0, 0x0a, 0, 0x20},
                         present[] = {0, 0xc1, 0, 0, 0, 12, 0x40, 0, 0, 0x0a, 0, 8};

    do_it(startup, sizeof(startup));
    do_it(enable, sizeof(enable)); /* TSC_PhysicalPresence, */
    do_it(present, sizeof(present));
}

static void extends_pcr_12(void)
{
    static uint8_t extend[34] = {0, 0xc1, 0, 0, 0, 34, 0, 0, 0, 0x14, 0, 0, 0, 5};

    extend[sizeof(extend) - 1]++;
    do_it(extend, sizeof(extend));
}

/* What it needs to be present for: TPM_PhysicalSetDeactivated, from the next start on or not. */
static void writes_nv_12(void)
{
    static uint8_t set[] = {0, 0xc1, 0, 0, 0, 11, 0, 0, 0, 0x72, 0};

    set[sizeof(set) - 1] ^= 1;
    do_it(set, sizeof(set));
}

static void goes_to_sleep_12(void)
{
    static const uint8_t save[] = {0, 0xc1, 0, 0, 0, 10, 0, 0, 0, 0x98};

    do_it(save, sizeof(save));
}

static bool is_served_12(void)
{
    static const uint8_t get_random[] = {0, 0xc1, 0, 0, 0, 14, 0, 0, 0, 0x46, 0, 0, 0, 8};
    uint32_t code = execute(get_random, sizeof(get_random));

    return code != TPM_FAIL && code != TPM_RETRY;
}

static bool is_12(void)
{
    return !version_now()->has_shutdown;
}

void guest_starts_up(void)
{
    if (is_12()) {
        starts_up_12();
        return;
    }
    static const uint8_t startup[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0};
    static const uint8_t define[] = {
        0x80, 2, 0, 0,  0, 45,   0, 0, 1,    0x2a,                      /* NV_DefineSpace */
        0x40, 0, 0, 1,  0, 0,    0, 9, 0x40, 0,    0, 9, 0, 0, 0, 0, 0, /* the owner's */
        0,    0, 0, 14, 1, 0x50, 0, 0, 0,    0x0b, 2, 6, 0, 6, 0, 0, 0, 8,
    };

    do_it(startup, sizeof(startup));
    do_it(define, sizeof(define));
}

void guest_extends_pcr(void)
{
    static uint8_t extend[65] = {
        0x80, 2, 0, 0, 0, 65, 0, 0, 1,    0x82, /* PCR_Extend */
        0,    0, 0, 9, 0, 0,  0, 9, 0x40, 0,    0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x0b,
    };

    if (is_12()) {
        extends_pcr_12();
        return;
    }
    extend[sizeof(extend) - 1]++;
    do_it(extend, sizeof(extend));
}

void guest_writes_nv(void)
{
    static uint8_t write[] = {
        0x80, 2,    0, 0, 0, 43,   0, 0, 1, 0x37, /* NV_Write */
        1,    0x50, 0, 0, 1, 0x50, 0, 0, 0, 0,    0, 9, 0x40, 0, 0, 9, 0,
        0,    0,    0, 0, 0, 8,    0, 0, 0, 0,    0, 0, 0,    0, 0, 0,
    };

    if (is_12()) {
        writes_nv_12();
        return;
    }
    write[sizeof(write) - 3]++;
    do_it(write, sizeof(write));
}

void guest_goes_to_sleep(void)
{
    static const uint8_t shutdown[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x45, 0, 1};

    if (is_12()) {
        goes_to_sleep_12();
        return;
    }
    do_it(shutdown, sizeof(shutdown));
}

bool guest_is_served(void)
{
    static const uint8_t get_random[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8};

    if (is_12())
        return is_served_12();
    uint32_t code = execute(get_random, sizeof(get_random));
    return code != TPM2_RC_FAILURE && code != TPM2_RC_RETRY;
}

static unsigned type_of(int which)
{
    return which ? LINK_STATE_VOLATILE : LINK_STATE_PERMANENT;
}

struct guest_states guest_states_capture(void)
{
    struct guest_states states = {0};
    bool worked;

    check(tpm_capture(tpm, store, &worked, &states.said) == TPM_SUCCESS);
    for (int i = 0; i < 2; i++) {
        struct image *image = &states.of[i];
        check(image_reserve(image, IMAGE_BYTES_MAX) == 0);
        check(store_read(store, type_of(i), image->bytes, &image->n_bytes, &image->generation) ==
              0);
        image->exists = image->is_numbered = true;
        check(image_compute_digest(image, NULL, NULL) == 0);
    }
    return states;
}

void guest_states_deinit(struct guest_states *states)
{
    image_deinit(&states->of[0]);
    image_deinit(&states->of[1]);
}

void guest_states_digests(const struct guest_states *states, struct link_digests *digests)
{
    memcpy(digests->permanent_digest, states->of[0].digest.whole, DIGEST_BYTES);
    memcpy(digests->volatile_digest, states->of[1].digest.whole, DIGEST_BYTES);
}

static uint8_t *encode(int which, const struct guest_states *from, const struct guest_states *to,
                       size_t *record_bytes)
{
    struct delta_image base = {.bytes = (const uint8_t *)""};
    struct delta_image next = image_as_delta(&to->of[which]);

    if (from)
        base = image_as_delta(&from->of[which]);
    if (base.generation == next.generation)
        return NULL;
    uint8_t *record = malloc(DELTA_RECORD_BYTES_MAX);
    check(record);
    check(delta_encode(type_of(which), &base, &next, record, record_bytes) == 0);
    return record;
}

struct staged_records guest_states_encode(const struct guest_states *from,
                                          const struct guest_states *to)
{
    struct staged_records records = {0};

    records.permanent = encode(0, from, to, &records.permanent_bytes);
    records.following = encode(1, from, to, &records.following_bytes);
    return records;
}

void guest_records_free(struct staged_records *records)
{
    free((void *)records->permanent);
    free((void *)records->following);
    *records = (struct staged_records){0};
}
