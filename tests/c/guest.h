/* What a guest does with the TPM in memory, and what that is then. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "image.h"
#include "link_types.h"

struct staged_records;

void guest_starts_up(void);

/* Do something that changes no permanent state; or the permanent state; or have the TPM ready to go
 * on after a sleep. */
void guest_extends_pcr(void);
void guest_writes_nv(void);
void guest_goes_to_sleep(void);

/* Return true if a guest's command is executed. */
bool guest_is_served(void);

/* Both states, as they were captured: 0 is the permanent one. */
struct guest_states {
    struct image of[2];
    enum link_shutdown said;
};

/* What is captured now. The caller ends it. */
struct guest_states guest_states_capture(void);

void guest_states_deinit(struct guest_states *states);

void guest_states_digests(const struct guest_states *states, struct link_digests *digests);

/* The records that make of some states others, or, of NULL, these; of what is the same there is
 * none. The caller frees both records. */
struct staged_records guest_states_encode(const struct guest_states *from,
                                          const struct guest_states *to);

void guest_records_free(struct staged_records *records);
