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

void guest_starts_up(void)
{
    static const uint8_t startup[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0};
    static const uint8_t define[] = {
        0x80, 2, 0, 0,  0, 45,   0, 0, 1,    0x2a,                      /* NV_DefineSpace */
        0x40, 0, 0, 1,  0, 0,    0, 9, 0x40, 0,    0, 9, 0, 0, 0, 0, 0, /* the owner's */
        0,    0, 0, 14, 1, 0x50, 0, 0, 0,    0x0b, 2, 6, 0, 6, 0, 0, 0, 8,
    };

    check(execute(startup, sizeof(startup)) == 0);
    check(execute(define, sizeof(define)) == 0);
}

void guest_extends_pcr(void)
{
    static uint8_t extend[65] = {
        0x80, 2, 0, 0, 0, 65, 0, 0, 1,    0x82, /* PCR_Extend */
        0,    0, 0, 9, 0, 0,  0, 9, 0x40, 0,    0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0x0b,
    };

    extend[sizeof(extend) - 1]++;
    check(execute(extend, sizeof(extend)) == 0);
}

void guest_writes_nv(void)
{
    static uint8_t write[] = {
        0x80, 2,    0, 0, 0, 43,   0, 0, 1, 0x37, /* NV_Write */
        1,    0x50, 0, 0, 1, 0x50, 0, 0, 0, 0,    0, 9, 0x40, 0, 0, 9, 0,
        0,    0,    0, 0, 0, 8,    0, 0, 0, 0,    0, 0, 0,    0, 0, 0,
    };

    write[sizeof(write) - 3]++;
    check(execute(write, sizeof(write)) == 0);
}

void guest_goes_to_sleep(void)
{
    static const uint8_t shutdown[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x45, 0, 1};

    check(execute(shutdown, sizeof(shutdown)) == 0);
}

bool guest_is_served(void)
{
    static const uint8_t get_random[] = {0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x7b, 0, 8};
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
