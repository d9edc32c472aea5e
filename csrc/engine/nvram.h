/* The state of one vTPM as libtpms hands it out and asks for it: three images, and their files.
 *
 * libtpms calls back into these on its own (nvram.c registers itself), always with the TPM's lock
 * held. An image is replaced only after its file is durable, so that what libtpms reads back is
 * never newer than the disk.
 */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "io.h"
#include "link_types.h"

struct journal_settings;
struct store;

/* The store of this process. libtpms is process-global, and so is this. */
void nvram_register(struct io *io);

/* Take what a state file holds as the image that libtpms reads next, without writing it.
 * Returns 0 or a negative errno. */
int nvram_load(enum link_state_type type, const uint8_t *state, size_t state_bytes);

/* The same for a permanent state that is durable elsewhere. */
int nvram_take_permanent(const uint8_t *state, size_t state_bytes);

/* Keep journals of the permanent state from now on. `store` has to outlive this. */
void nvram_set_journal(const struct journal_settings *settings, struct store *store);

/* Put the permanent state into its file, if it is durable elsewhere. Returns 0, also if there is
 * none, or a negative errno. */
int nvram_store_permanent(void);

/* The TPM is on from now on, or off. The latter closes the journal: it returns 0, or a negative
 * errno with the journal left as it is. */
void nvram_begin(void);
int nvram_end(void);

/* True if there is an image of that type. */
bool nvram_has(enum link_state_type type);

/* Make an image durable and keep it. Returns 0 or a negative errno; then the image is the one
 * before. */
int nvram_store(enum link_state_type type, const uint8_t *state, size_t state_bytes);

/* Remove an image, not the permanent one, and its file, durably. Returns 0, also if there was none,
 * or a negative errno. */
int nvram_remove(enum link_state_type type);

/* Overwrite and free every image. */
void nvram_deinit(void);
